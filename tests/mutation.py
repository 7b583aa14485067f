"""Mutation testing: a seeded sample of cosmic-ray's mutants, each judged by the test files of its module (mutation.toml).

python tests/mutation.py draw mutants.sqlite 60 1     # keeps 60 of the mutants, drawn with seed 1
python tests/mutation.py judge                        # cosmic-ray's test command: runs the tests of the module that git sees changed
"""

import random
import sqlite3
import subprocess
import sys

JUDGES = {
    "models": "models optimizers generate finetuning",
    "formats/checkpoint": "schemas faults train",
    "formats/data_directory": "data_directory outputs schemas prepare",
    "formats/fast_encoding": "tokenizers",
    "formats/huggingface": "finetuning schemas export",
    "formats/metrics": "schemas outputs train",
    "formats/outputs": "outputs faults prepare_faults",
    "formats/run_directory": "schemas faults outputs train",
    "formats/schemas": "schemas scores finetuning",
    "formats/tokenizer": "tokenizers schemas generate",
    "training/data_order": "data_order exact train",
    "training/estimates": "faults compile journeys parallel",
    "training/pace": "compile train",
    "training/processes": "bad_flags parallel",
    "training/start": "bad_flags finetuning config journeys train",
    "training/step": "train exact",
    "training/learner": "parallel train exact",
    "training/optimizers": "optimizers train",
}


def draw(path: str, count: int, seed: int) -> None:
    """Deletes all mutants but `count`; those that a filter has skipped are none."""
    with sqlite3.connect(path) as session:
        order = "module_path, start_pos_row, start_pos_col, operator_name, operator_args, occurrence"
        mutants = session.execute(
            f"SELECT job_id FROM mutation_specs WHERE job_id NOT IN (SELECT job_id FROM work_results) ORDER BY {order}"
        ).fetchall()
        kept = {job for (job,) in random.Random(seed).sample(mutants, count)}
        for table in ("work_results", "mutation_specs", "work_items"):
            jobs = {job for (job,) in session.execute(f"SELECT job_id FROM {table}")}
            session.executemany(f"DELETE FROM {table} WHERE job_id = ?", [(job,) for job in jobs - kept])
    print(f"{count} of {len(mutants)} mutants")


def judge() -> int:
    changed = subprocess.run(["git", "diff", "--name-only", "--", "*.py"], capture_output=True, text=True, check=True).stdout.split()[0]
    files = [f"tests/test_{name}.py" for name in JUDGES[changed.removesuffix(".py")].split()]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-n0", *files]).returncode


if __name__ == "__main__":
    if sys.argv[1] == "draw":
        draw(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        sys.exit(judge())
