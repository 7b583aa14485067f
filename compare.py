"""Several runs -> which data (or model) is better, and how sure that is.

    python compare.py checkpoints/stories_* checkpoints/books_* --data_dir ./data_stories ./data_books
    python compare.py stories=runs/a,runs/b,runs/c books=runs/d,runs/e,runs/f --data_dir ./data --output comparison
    python compare.py --recipe recipes/sample.toml

Runs that are equal but for seed and run directory are one variant. Each run reads the same documents with its own tokenizer; bits per byte
make them comparable whatever the tokenizers are. The intervals cover the luck of the training (its seeds) and of the held-out items.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from utils import Checked, Count, choose_device, flag_types, notice, read_command_line, run_script

import numpy as np
import tyro

from evaluation.comparison import Variants, compare_variants
from evaluation.comparison_report import comparison_directory, render, write_comparison
from evaluation.held_out import Scorer, from_texts, read_texts
from evaluation.measures import why_no_bits_per_byte
from evaluation.plans import Texts
from evaluation.recipes import Script
from evaluation.studies import StudyFlags, run_study
from evaluation.tasks import find_tasks
from evaluation.variants import Run, budget_notes, by_variant, group_runs, read_run
from formats.data_directory import DataDirectory
from formats.run_directory import load_model
from formats.scores import SCORES, ItemScores, read_scores
from preparation import sample_tasks
from preparation.overlap import file_texts, seen_in_training, split_texts
from preparation.sources import find_files


@dataclass(frozen=True)
class Arguments(Checked):
    """Flags of compare.py."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Runs, as evaluate.py --checkpoint takes them, or variants as NAME=RUN,RUN; two or more."""
    data_dir: tuple[str, ...] = ("./data",)
    """Data directories whose documents are read."""
    split: Literal["train", "val", "test"] | None = None
    """Split of each data directory. Default: test, or val where there is no test."""
    max_documents: Count | None = None
    """Read only this many documents of each split, from its beginning."""
    batch_size: Count = 32
    """Windows in one forward pass; changes the results by no more than the last bits of float32."""
    verify_data: bool = False
    """Compare token files above 2 GB too with the SHA-256 in meta.json; smaller ones always are."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    output: str | None = None
    """Directory for compare.json, compare.md and compare.png, a picture of differences and learning curves."""
    study: StudyFlags = field(default_factory=StudyFlags)

    def problems(self) -> list[str]:
        problems = []
        of_runs = ("data_dir", "split", "max_documents", "batch_size", "verify_data", "device", "output")
        given = [f"--{name}" for name in of_runs if getattr(self, name) != getattr(Arguments, name)]
        if self.study.recipe is not None and self.runs:
            problems.append("give runs or a --recipe, not both")
        elif self.study.recipe is not None and given:
            problems.append(f"{', '.join(given)}: a study doesn't read them; its recipe says all, and --out_dir where it is written")
        elif self.study.recipe is None and len(self.runs) < 2:
            problems.append("give two or more runs to compare")
        if len(set(self.runs)) < len(self.runs) or len(set(map(Path, self.data_dir))) < len(self.data_dir):
            problems.append("a run or data directory is named twice; name each once")
        if not self.data_dir:
            problems.append("--data_dir needs a directory whose documents are read")
        return problems


def read_documents(data: DataDirectory, split: str, limit: int | None) -> list[str]:
    """The documents of a split as text. Raises ValueError where its tokenizer can't give them back."""
    tokens = np.asarray(data.tokens(split))
    reason = why_no_bits_per_byte(data.tokenizer, tokens)
    if reason:
        raise ValueError(f"{data.name} can't be compared on: {reason}; prepare it with a byte-level tokenizer, e.g. --tokenizer bpe")
    return read_texts(data.tokenizer, tokens)[:limit]


def read_sets(args: Arguments) -> dict[str, list[str]]:
    """The texts to compare on, by the names of their directory and split. Raises FileNotFoundError, ValueError."""
    sets = {}
    for data in [DataDirectory(name, verify=args.verify_data) for name in args.data_dir]:
        split = args.split or ("val" if "val" in data.splits and "test" not in data.splits else "test")
        if args.split is None and split == "val":
            notice(f"{data.name} has no test split; its val split is read")
        sets[f"{data.name} {split}"] = read_documents(data, split, args.max_documents)
    return sets


def run_scores(run: Run, sets: dict[str, list[str]], device: str, batch_size: int) -> dict[str, ItemScores]:
    """What a run makes of each document of each set, and the tasks that evaluate.py ran with this model.

    What evaluate.py has scored before is taken from there. Raises ValueError for a lossy tokenizer or a broken model.
    """
    model, tokenizer, path, _ = load_model(run.name, device)
    known = read_scores(path.parent / SCORES)
    scorer = Scorer(model, tokenizer, str(path), known.values(), batch_size)
    scores = {name: saved for name, saved in known.items() if saved.model == scorer.hash and "correct" in saved.columns}
    for name, texts in sets.items():
        held_out = from_texts(tokenizer, texts)
        reason = why_no_bits_per_byte(tokenizer, held_out.tokens)
        if reason:
            raise ValueError(f"{path} can't be compared: {reason}; train it with a byte-level tokenizer")
        scores[name] = scorer.score(held_out)
    return scores


def finish(directory: Path, variants: Variants) -> None:
    """Compare a study's variants, write the result into its folder, print it. Raises ValueError, OSError."""
    runs = {name: [read_run(run) for run in members] for name, members in variants.items()}
    comparison = compare_variants(variants, budget_notes(runs))
    write_comparison(
        comparison_directory(str(directory)), comparison, {name: [run.curve for run in members] for name, members in runs.items()}
    )
    print(render(comparison))
    notice(f"written to {directory}")


def study(flags: StudyFlags) -> int:
    """Run a study with the scripts that stand beside this one."""
    import evaluate
    import prepare_data
    import training.start

    def read_by(kind: type):
        return lambda words: read_command_line(kind, words, None)

    def digests(evaluating: evaluate.Arguments) -> list:
        tasks, foreign = find_tasks(evaluating.tasks, Path(evaluating.task_data), sample_tasks.MADE)
        files = [file.describe()["sha256"] for file in find_files(evaluating.text, evaluating.form)]
        return [*files, *(task.items_hash for task in tasks), *foreign]

    def seen(directory: Path, held_out: dict[str, Path], evaluating: evaluate.Arguments) -> dict[str, int]:
        sets = {name: split_texts(path, "test") for name, path in held_out.items()}
        return seen_in_training(directory, sets | {name: file_texts([name], evaluating.form) for name in evaluating.text})

    readers = {
        "prepare_data": (prepare_data.Arguments, read_by(prepare_data.Arguments)),
        "train": (training.start.Arguments, lambda words: training.start.read_arguments(words, None)),
        "evaluate": (evaluate.Arguments, read_by(evaluate.Arguments)),
    }
    here = Path(__file__).resolve().parent
    scripts = {name: Script(here / f"{name}.py", frozenset(flag_types(kind)), read) for name, (kind, read) in readers.items()}
    return run_study(flags, scripts, Texts(prepare_data.content_of, digests, seen), finish)


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__)
    if args.study.recipe is not None:
        return study(args.study)
    device, sets = choose_device(args.device), read_sets(args)
    variants, notes = group_runs(list(args.runs))
    directory = None if args.output is None else comparison_directory(args.output)
    for name, runs in variants.items():
        notice(f"{name}: {', '.join(run.name for run in runs)}")
    for note in notes:
        notice(f"warning: {note}")
    every = [run for runs in variants.values() for run in runs]
    scores = {run.name: run_scores(run, sets, device, args.batch_size) for run in every}
    comparison = compare_variants(by_variant(variants, scores), notes)
    if directory is not None:
        write_comparison(directory, comparison, {name: [run.curve for run in runs] for name, runs in variants.items()})
        notice(f"written to {directory}")
    print(render(comparison))
    return 0


if __name__ == "__main__":
    run_script(main)
