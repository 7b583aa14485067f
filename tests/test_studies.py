"""Studies: what is planned, what is run again and what isn't, what is killed and goes on, what is told."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import utils

import numpy as np
import pytest

import compare
from evaluation.studies import scores_of
from evaluation.tasks import task_files
from formats.scores import SCORES, ItemScores, read_scores, write_scores
from tests.conftest import ROOT
from tests.runs import assert_same_run, documents, lines, start, write_stories

# Scripts that do in a moment what the real ones do in a minute: write the same files, lock and resume in the same way, keep a diary.
FAKES = {
    "prepare_data.py": """
        shutil.copytree(home / "data", flag("--output"), dirs_exist_ok=True)
    """,
    "train.py": """
        import filelock, json, signal, time
        run = pathlib.Path(flag("--out_dir"))
        if (home / "broken").exists() and (home / "broken").read_text() in run.name:
            sys.exit("warning: something odd\\nerror: this one is broken\\nnext: nothing")
        run.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run / ".train.lock", timeout=0.2)
        lock.acquire()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        steps = int(flag("--max_steps"))
        (run / "config.json").write_text(json.dumps({"train": {"max_steps": steps}}))
        log = run / "metrics.jsonl"
        for step in range(len(log.read_text().splitlines()) if log.exists() else 0, steps):
            time.sleep(0.05)
            with open(log, "a") as file:
                file.write(json.dumps({"step": step + 1}) + "\\n")
        (run / "best_model.pt").touch()
    """,
    "evaluate.py": """
        with zipfile.ZipFile(home / "evaluation.npz") as old, zipfile.ZipFile(flag("--checkpoint") + "/evaluation.npz", "w") as new:
            for name in old.namelist():
                data = old.read(name)
                new.writestr(name, data.replace(b"@" * 200, flag("--data_dir").encode()).ljust(len(data)))
    """,
}
BEGINNING = """
import pathlib, shutil, sys, zipfile
home = pathlib.Path(__file__).parent
def flag(name):
    return sys.argv[sys.argv.index(name) + 1]
with open(home / "diary", "a") as diary:
    diary.write(pathlib.Path(__file__).stem + " " + " ".join(sys.argv[1:]) + "\\n")
"""
RECIPE = """
[study]
seeds = [1, 2]
[variants.plain]
sample = true
sample_stories = 300
[variants.shuffled]
sample = true
sample_stories = 300
shuffle_words = 0.5
[models.tiny]
preset = "nano"
max_steps = 2
"""
MIXTURE = """
[data]
tokenizer = "byte"
[mixture]
pilots = 6
[mixture.sources]
a = "a.txt"
b = ["b.txt"]
[mixture.training]
max_steps = 1
[models.tiny]
preset = "nano"
max_steps = 2
"""


def print_means(out_dir: Path, variants: dict) -> None:
    """What is to be compared: each variant's mean on each set."""
    for variant, runs in variants.items():
        for name in next(iter(runs.values())):
            bits = [sets[name].summary["bits_per_byte"] for sets in runs.values()]
            print(f"{variant}, {name}: {np.mean(bits):.4f} bits/byte in {len(bits)} runs")


@pytest.fixture
def study(tmp_path, monkeypatch, sample_dir, capsys):
    """study(*flags) -> (exit code, stdout, stderr) of compare.py --recipe r.toml with fake scripts; study.home holds them."""
    home = tmp_path / "scripts"
    home.mkdir()
    (home / "data").symlink_to(sample_dir)
    for name, body in FAKES.items():
        (home / name).write_text(BEGINNING + "\n".join(line[8:] for line in body.splitlines()))
    text = ItemScores("0" * 64, "1" * 64, "text", {"bits_per_byte": 1.5}, {"nats": np.ones(3), "bytes": np.ones(3, int)}, "2" * 64)
    write_scores(home / "evaluation.npz", {"@" * 200 + " test": text, "texts/more.txt text": text, "of an earlier recipe": text})
    monkeypatch.setattr(compare, "__file__", str(home / "compare.py"))
    monkeypatch.setattr(compare, "finish", print_means)  # there are no models to compare
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text(RECIPE)

    def run(*flags) -> tuple[int, str, str]:
        capsys.readouterr()
        return compare.main(["--recipe", "r.toml", *map(str, flags)]), *capsys.readouterr()

    run.home = home
    return run


def diary(study, script="") -> list[str]:
    """What the fake scripts were called with since the last look."""
    path = study.home / "diary"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line for line in lines if line.startswith(script)]


def change(old: str, new: str) -> None:
    text = Path("r.toml").read_text()
    assert old in text
    Path("r.toml").write_text(text.replace(old, new))


# ---------------------------------------------------------------- what is run


def test_a_study_runs_what_is_not_done_and_nothing_else(study):
    code, out, err = study()
    assert code == 0 and "4 cells" in err and err.count(": done") == 4
    union, plain, *calls = [line.split()[0] for line in diary(study)]
    assert {union, plain} == {"prepare_data"} and calls == ["train", "evaluate", "prepare_data", *["train", "evaluate"] * 3]
    assert out == "plain, held_out: 1.5000 bits/byte in 2 runs\nshuffled, held_out: 1.5000 bits/byte in 2 runs\n"
    assert study()[0] == 0 and not diary(study)
    change("seeds = [1, 2]", "seeds = [1, 2, 3]")
    assert study()[0] == 0 and len(diary(study)) == 4  # a seed costs its own two cells
    change("[models.tiny]", "[evaluation]\nbatch_size = 8\n[models.tiny]")
    assert study()[0] == 0 and [line.split()[0] for line in diary(study)] == ["evaluate"] * 6
    change("shuffle_words = 0.5", "shuffle_words = 0.4")
    assert study()[0] == 0 and len(diary(study)) == 1 + 3 * 2
    change("max_steps = 2", "max_steps = 2\nlog_interval = 1")  # changes no weight
    assert study()[0] == 0 and not diary(study)


def test_the_plan_is_printed_and_runs_nothing(study):
    code, out, _ = study("--dry_run")
    assert code == 0 and not diary(study) and not Path("studies").exists()
    commands = [line for line in out.splitlines() if not line.startswith("#")]
    assert out.startswith("# 4 cells, 0 done; 11 commands to run") and len(commands) == 11
    assert sum("--shuffle_words 0.5" in line for line in commands) == 1
    union = next(line.split("--output ")[1] for line in commands if "union" in line)
    assert sum(f"--tokenizer {union}/tokenizer.json" in line for line in commands) == 2  # one tokenizer for all
    assert all(f"--data_dir {union} --split test" in line for line in commands if "evaluate.py" in line)  # one set for all
    assert study("--cells")[1] == "4\n"


def test_a_failed_cell_is_told_and_does_not_stop_the_others(study):
    (study.home / "broken").write_text("plain-seed1")
    code, out, err = study()
    assert code == 1 and err.count(": done") == 3
    assert "plain, seed 1: failed, train.py: this one is broken (all it said: studies/r/logs/plain-seed1-" in err
    assert "not compared, for they failed: plain, seed 1" in err and "plain, held_out: 1.5000 bits/byte in 1 runs" in out
    (study.home / "broken").write_text("plain")
    change("seeds = [1, 2]", "seeds = [1, 3]")
    code, _, err = study()
    assert code == 1 and "fewer than two variants are done" in err
    (study.home / "broken").unlink()
    diary(study)
    assert study()[0] == 0 and len(diary(study)) == 4


def test_held_out_documents_in_training_data_and_small_data_fail(study, sample_dir):
    Path("seen.txt").write_text(documents(sample_dir, "train")[3])
    change("[models.tiny]", '[evaluation]\ntext = "seen.txt"\n[models.tiny]')
    code, _, err = study()
    assert code == 1 and "trains on documents that models are measured on (1 of seen.txt)" in err and not diary(study, "train")
    change("[study]", "[study]\nallow_overlap = true")
    change('text = "seen.txt"', 'text = "more.txt"')
    Path("texts").mkdir()
    Path("seen.txt").rename("texts/more.txt")
    code, out, _ = study("--data_root", "texts")
    assert code == 0 and len(diary(study, "train")) == 4
    assert "plain, more.txt: 1.5000" in out and "plain, held_out: 1.5000" in out  # sets by the recipe's names


def test_a_source_too_small_for_its_budget_fails(study):
    Path("a.txt").write_text("some text")
    Path("r.toml").write_text(RECIPE.replace("sample = true\nsample_stories = 300", 'input = "a.txt"') + "[data]\nmax_tokens = 1_000_000\n")
    code, _, err = study()
    assert code == 1 and "of max_tokens = 1,000,000 training tokens; give more text" in err
    change("[study]", "[study]\nallow_smaller = true")
    assert study()[0] == 0


# ---------------------------------------------------------------- several processes, killed ones


def background(*flags) -> multiprocessing.Process:
    """compare.py --recipe r.toml in a process of its own."""

    def run():
        with open("err.txt", "a") as sys.stderr:
            utils.run_script(lambda: compare.main(["--recipe", "r.toml", *map(str, flags)]))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_for(pattern: str) -> Path:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := next(Path().glob(pattern), None):
            return found
        time.sleep(0.01)
    raise AssertionError(f"no {pattern}")


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_share_a_study_of_which_one_is_killed(study):
    """Nothing is trained twice: what the killed one had begun goes on by itself, and the other one waits for it."""
    change("max_steps = 2", "max_steps = 12")
    killed = background()
    run = wait_for("studies/r/runs/*/metrics.jsonl").parent
    other = background()
    killed.kill()
    killed.join()
    other.join()
    assert other.exitcode == 0
    runs = [*Path("studies/r/runs").iterdir()]
    assert len(runs) == 4 and run in runs and all(steps(one) == [*range(1, 13)] for one in runs)
    assert study()[0] == 0 and len(diary(study, "prepare_data")) == 3


def test_a_stopped_study_goes_on_where_it_was(study):
    change("max_steps = 2", "max_steps = 20")
    stopped = background()
    run = wait_for("studies/r/runs/*/metrics.jsonl").parent
    os.kill(stopped.pid, signal.SIGTERM)
    stopped.join()
    assert stopped.exitcode == 143 and "goes on from here" in Path("err.txt").read_text()
    assert not (run / "best_model.pt").exists() and 0 < len(steps(run)) < 20
    change("max_steps = 20", "max_steps = 20 # as it was")
    assert study()[0] == 0 and steps(run) == [*range(1, 21)]


def test_cells_one_by_one(study, mistake, tmp_path):
    first, second = background("--cell", 0), background("--cell", 1)
    first.join()
    second.join()
    assert (first.exitcode, second.exitcode) == (0, 0)
    calls = [line.split()[0] for line in diary(study)]
    assert sorted(calls) == ["evaluate"] * 2 + ["prepare_data"] * 3 + ["train"] * 2  # the shared data is prepared once
    assert study("--cell", 1)[0] == 0 and not diary(study)
    assert "4 cells, from 0 to 3" in mistake("compare.py", "--recipe", "r.toml", "--cell", 4, cwd=tmp_path)
    assert study()[0] == 0 and len(diary(study, "train")) == 2


REAL = """
[study]
seeds = [1]
[data]
vocab_size = 300
[variants]
plain = "a.txt"
both = ["a.txt:0.6", "b.txt:0.4"]
[training]
max_steps = 200
eval_interval = 50
checkpoint_interval = 10
log_interval = 1
n_layer = 1
n_embd = 32
block_size = 32
device = "cpu"
[models.tiny]
preset = "nano"
"""


def kill_trainings(directory: Path) -> None:
    """Kill every train.py that was started in a directory."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").resolve() == directory and b"train.py" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.slow
def test_a_real_study_killed_twice_is_the_undisturbed_one(tmp_path, sample_dir, script):
    """With the real scripts: killed once with its training, once without it; then the same weights and scores."""
    texts = documents(sample_dir, "train")
    write_stories(tmp_path / "a.txt", texts[:200])
    write_stories(tmp_path / "b.txt", texts[200:])
    (tmp_path / "r.toml").write_text(REAL)
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    command, killed = ("--recipe", "../r.toml", "--data_root", ".."), set()
    for directory in (whole, disturbed):
        directory.mkdir()
    script("compare.py", *command, cwd=whole)
    for with_training in (True, False):
        process = start(*command, program=ROOT / "compare.py", cwd=disturbed)
        while not (begun := [run for run in disturbed.glob("studies/r/runs/*") if run not in killed and len(lines(run)) in range(25, 150)]):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.communicate()
        killed |= {*begun}
        if with_training:
            kill_trainings(disturbed)
    script("compare.py", *command, cwd=disturbed)
    for run in (whole / "studies" / "r" / "runs").iterdir():
        other = disturbed / run.relative_to(whole)
        assert_same_run(run, other)
        ours, theirs = read_scores(run / SCORES), read_scores(other / SCORES)
        assert len(ours) == 1 and [one.summary for one in ours.values()] == [one.summary for one in theirs.values()]
    assert len(killed) == 2 and "2 of 2 cells are done" in script("compare.py", *command, cwd=disturbed).stderr


def test_a_run_that_was_evaluated_by_hand_as_well(tmp_path):
    """Scores of other splits, scored in another way, or of a text whose name begins alike, are not taken for the study's own."""

    def scores(bits: float) -> ItemScores:
        return ItemScores("0" * 64, "1" * 64, "text", {"bits_per_byte": bits}, {"nats": np.ones(3), "bytes": np.ones(3, int)}, "2" * 64)

    names = {"held test": 1.0, "held val": 2.0, "held test stride 8": 3.0, "wiki text": 4.0, "wiki2 text": 5.0}
    write_scores(tmp_path / SCORES, {name: scores(bits) for name, bits in names.items()})
    step = SimpleNamespace(directory=tmp_path)
    set_names = {"held test": "held", "wiki text": "wiki", "wiki2 text": "wiki2"}
    planner = SimpleNamespace(recipe=SimpleNamespace(evaluation={}), set_names=set_names)
    found = scores_of(planner, [SimpleNamespace(done=True, variant="a", evaluate=step, train=step)])
    bits = {name: one.summary["bits_per_byte"] for name, one in found["a"][str(tmp_path)].items()}
    assert bits == {"held": 1.0, "wiki": 4.0, "wiki2": 5.0}


def test_another_checkpoint_s_scores_are_not_the_run_s(study):
    """evaluate.py, called by hand for another checkpoint of a run, replaces the run's scores."""
    change("seeds = [1, 2]", "seeds = [1]")
    study()
    diary(study)
    scores = next(Path("studies/r/runs").glob(f"plain*/{SCORES}"))
    write_scores(scores, {})
    assert study()[0] == 0 and len(diary(study)) == 1 and read_scores(scores)


def test_a_study_in_a_folder_of_another_name_evaluates_again(study, tmp_path):
    """Scores carry the names of what was read, so those of the new name have to be there. Nothing is trained again."""
    change("seeds = [1, 2]", "seeds = [1]")
    assert study("--out_dir", "s")[0] == 0
    diary(study)
    assert study("--out_dir", tmp_path / "s")[0] == 0
    assert [line.split()[0] for line in diary(study)] == ["evaluate", "evaluate"]
    assert study("--out_dir", tmp_path / "s")[0] == 0 and diary(study) == []


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("[study]", "[study", "r.toml is no TOML: Expected ']'"),
        ("[study]", "[stduy]", "r.toml: the recipe has an unknown key 'stduy'; did you mean 'study'?"),
        ("seeds = [1, 2]", "seed = [1, 2]", "r.toml: [study] has an unknown key 'seed'; did you mean 'seeds'?"),
        ("seeds = [1, 2]", "seeds = [1, -2]", "[study] seeds=-2 must be at least 0"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds are given twice"),
        ("seeds = [1, 2]", "seeds = []", "[study] seeds is empty; give it a value"),
        ("seeds = [1, 2]", "seeds = ['x']", "[study] seeds='x' must be a valid integer\n"),
        ("shuffle_words", "shufle_words", "[variants.shuffled] has an unknown key 'shufle_words'; did you mean 'shuffle_words'?"),
        ("shuffle_words = 0.5", "shuffle_words = 1.5", "[variants.shuffled]: shuffle_words=1.5 must be at most 1"),
        ("shuffle_words = 0.5", "shuffle_words = {a = 1}", "must be a text, number, true, false, or a list"),
        ("shuffle_words = 0.5", "vocab_size = 500", "must be the same for all; set it in [data]"),
        ("shuffle_words = 0.5", 'output = "x"', "sets output, which the study itself sets"),
        ("max_steps = 2", 'max_steps = "few"', "[models.tiny] and [training]:"),
        ("max_steps = 2", "max_step = 2", "did you mean 'max_steps'?"),
        ('preset = "nano"', 'preset = "nono"', "unknown preset 'nono'"),
        ("[models.tiny]", '[models."a/b"]', "'a/b' can't be a name"),
        ("[models.tiny]", "[model.tiny]", "did you mean 'models'?"),
        ("[models.tiny]\n", "[data]\ntokenizer = 'my.json'\n[models.tiny]\n", "tokenizer='my.json' is no file"),
        ("[models.tiny]\n", "[evaluation]\ntext = 'none.txt'\n[models.tiny]\n", "no text files at none.txt"),
        ("[models.tiny]\n", "[evaluation]\nstrid = 3\n[models.tiny]\n", "[evaluation] has an unknown key 'strid'; did you mean 'stride'?"),
        ("[models.tiny]\n", "[mixture]\n[models.tiny]\n", "both [variants] and a [mixture]"),
        (RECIPE[RECIPE.index("[variants.shuffled]") : RECIPE.index("[models")], "", "one variant of one model"),
        (RECIPE, MIXTURE.replace('b = ["b.txt"]', ""), "has 1 sources; 2 to 5"),
        (RECIPE, MIXTURE.replace("pilots = 6", "pilots = 3"), "[mixture] pilots=3 must be at least 4"),
        (RECIPE, MIXTURE.replace("pilots = 6", "seed = 1"), "seed = 1 is one of the study's seeds"),
        (RECIPE, MIXTURE.replace("pilots = 6", 'target = ["c"]'), "target names c, but the held-out sets are a, b"),
        (RECIPE, MIXTURE.replace('"a.txt"', '"a.txt:0.5"'), "gives a a weight, which is what is searched"),
        (RECIPE, MIXTURE, "no text files at a.txt"),
    ],
)
def test_mistakes_in_a_recipe_are_one_sentence(study, mistake, tmp_path, old, new, part):
    change(old, new)
    assert part in mistake("compare.py", "--recipe", "r.toml", cwd=tmp_path)
    assert not Path("studies").exists() and not diary(study)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--recipe", "s.toml"], "no recipe at s.toml; there is r.toml"),
        (["--recipe", "r.toml", "runs/a"], "give runs or a --recipe, not both"),
        (["--dry_run", "a", "b"], "--dry_run belong to --recipe"),
        (["--recipe", "r.toml", "--dry_run", "--cells"], "exclude each other"),
    ],
)
def test_mistakes_on_the_command_line(study, mistake, tmp_path, flags, part):
    assert part in mistake("compare.py", *flags, cwd=tmp_path)


def test_paths_begin_at_the_data_root(study, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"text {name}")
    Path("r.toml").write_text(RECIPE.replace("sample = true\nsample_stories = 300", 'input = ["a.txt:0.7", "b.txt:0.3"]'))
    plans = [study("--dry_run", "--data_root", root)[1] for root in ("texts", tmp_path / "texts")]
    assert "--input texts/a.txt:0.7 texts/b.txt:0.3" in plans[0] and "--input texts/a.txt texts/b.txt --output" in plans[0]
    keys = [[line.rsplit("-", 1)[1] for line in plan.splitlines() if line.startswith("python prepare_data.py")] for plan in plans]
    assert keys[0] == keys[1]  # by content, not by name


def phenomena() -> list[str]:
    group = task_files()["blimp"][1]
    return [task["task"].removeprefix("blimp_") for task in group["task"]]


def test_our_recipes_are_plans(tmp_path, monkeypatch, capsys):
    for name in ("tinystories/train", "books/a", "wikitext2/valid"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.txt").write_text("text")
    pair, choice = {"sentence_good": "It is.", "sentence_bad": "It are."}, {"query": "It", "choices": ["is.", "are."], "gold": 0}
    for names, item in (([f"blimp/{part}" for part in phenomena()], pair), (["hellaswag_1000"], choice)):
        for name in names:
            path = tmp_path / "eval" / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(item) + "\n")
    monkeypatch.chdir(tmp_path)
    for name, cells in (("sample", 6), ("study", 15)):
        assert compare.main(["--recipe", f"{ROOT}/recipes/{name}.toml", "--data_root", str(tmp_path), "--dry_run"]) == 0
        assert capsys.readouterr().out.count("python train.py") == cells


def test_the_recipes_of_the_page_are_recipes(study):
    """docs/studies.md: the example, and the search with the example's other tables."""
    whole, search = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "studies.md").read_text(), re.DOTALL)
    for name in ("stories", "wikipedia", "books/a"):
        Path(f"{name}.txt").parent.mkdir(exist_ok=True)
        Path(f"{name}.txt").write_text("text")
    start, end = whole.index("[variants]"), whole.index("[held_out]")
    for text, cells in ((whole, 9), (whole[:start] + search + whole[end:], 12 + 9)):
        Path("r.toml").write_text(text)
        assert study("--cells")[1] == f"{cells}\n"
