"""Where scripts write: what stands in the way stays as it is, byte for byte, and the refusal is one sentence before any work."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from utils import describe

import pytest

import evaluate
import export_model
import prepare_data
import tokenizer_train
import train
from formats import data_directory, outputs
from formats.data_directory import DataDirectory, DataDirectoryWriter, finish_commit
from formats.export_record import add_record
from formats.metrics import read_metrics
from formats.outputs import naming, output_file, sole_writer
from formats.run_directory import clear_run, newest_checkpoint, sole_trainer, written_names
from tests.conftest import ROOT, tiny

TEXT = "".join(f"{i} little frogs jumped over a log.\n" for i in range(200))
TOKENIZER = json.dumps({"version": "1.0", "model": {"type": "BPE"}, "added_tokens": []})
MEASURES = json.dumps({"./data": {"val": {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.0}}})


def snapshot(directory: Path) -> dict[str, object]:
    """Everything in a directory: contents of files, targets of links, kinds of the rest."""

    def state(path: Path) -> object:
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else path.stat().st_mode

    return {str(path.relative_to(directory)): state(path) for path in sorted(directory.rglob("*"))}


@pytest.fixture
def refused(tmp_path, mistake):
    """refused("train.py", *arguments) -> the one sentence, where the call changed nothing below tmp_path, in which it runs."""

    def run(name: str, *args) -> str:
        before = snapshot(tmp_path)
        sentence = mistake(name, *args, cwd=tmp_path).strip().splitlines()[-1]
        assert snapshot(tmp_path) == before
        return sentence

    return run


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "s.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def run(tmp_path, trained_run) -> Path:
    return shutil.copytree(trained_run, tmp_path / "run")


# ---------------------------------------------------------------- files

IN_THE_WAY = {
    "": ("is empty", lambda path: None),
    "bad\udcff.json": ("is not UTF-8", lambda path: None),
    "folder": ("is a directory", lambda path: path.mkdir()),
    "new/": ("is a directory", lambda path: None),
    "link.json": ("symbolic link", lambda path: path.symlink_to("elsewhere.json")),
    "pipe": ("no ordinary file", os.mkfifo),
    "s.txt": ("this command reads it", lambda path: None),
    "hard.json": ("this command reads it", lambda path: path.hardlink_to(path.with_name("s.txt"))),
    "story.txt": ("is there already", lambda path: path.write_text("a story")),
    "theirs.json": ("is there already", lambda path: path.write_text('{"a": {"b": {"c": 1}}}')),
    "list.json": ("is there already", lambda path: path.write_text("[]")),
    "model.pt": ("is there already", lambda path: path.write_bytes(b"PK\3\4\xff")),
    "s.txt/e.json": ("no directory", lambda path: None),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
@pytest.mark.parametrize("script", ["evaluate.py", "tokenizer_train.py"])
def test_a_file_in_the_way_is_refused_before_any_work(tmp_path, text, trained_run, refused, monkeypatch, script, name):
    for work in ("evaluate.load_network", "tokenizer_train.make_tokenizer"):
        monkeypatch.setattr(work, lambda *_: pytest.fail("the work began"))
    sentence, make = IN_THE_WAY[name]
    make(tmp_path / name)
    arguments = {"evaluate.py": ["--checkpoint", trained_run, "--text", text], "tokenizer_train.py": ["--input", text]}
    assert sentence in refused(script, *arguments[script], "--output", name)


def test_the_directory_of_a_file_must_be_there(tmp_path, text, run, sample_dir, refused):
    arguments = ["--checkpoint", "run", "--text", "s.txt", "--output"]
    shutil.copytree(sample_dir, tmp_path / "d")
    assert "there is no directory missing" in refused("evaluate.py", *arguments, "missing/e.json")
    for source in ("d/val.bin", "run/metrics.jsonl", "run/config.json", "d/meta.json"):
        assert "is there already" in refused("evaluate.py", *arguments, source)
    assert "this command reads it" in refused("evaluate.py", *arguments, "run/best_model.pt")


def test_an_evaluation_replaces_an_evaluation_and_nothing_beside_it(tmp_path, text, run, refused):
    user = {name: f"mine {name}" for name in ("e.json.tmp", ".e.json.tmp", ".other.json.0123456789abcdef.tmp")}
    for name, content in user.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "e.json").touch()  # as mktemp makes it: nothing to lose
    (tmp_path / "e.json").chmod(0o644)
    for _ in range(2):
        assert evaluate.main(["--checkpoint", str(run), "--text", str(text), "--output", str(tmp_path / "e.json")]) == 0
    assert list(json.loads((tmp_path / "e.json").read_text())) == [str(text)]
    assert {name: (tmp_path / name).read_text() for name in user} == user
    (run / "evaluation.json").write_text('{"mine": 1}')  # where it is written without --output
    assert "is there already" in refused("evaluate.py", "--checkpoint", "run", "--text", "s.txt")


def test_a_tokenizer_replaces_a_tokenizer_unless_it_belongs_to_a_model_or_data(tmp_path, text, sample_dir, run, refused):
    (tmp_path / "t.json").write_text(TOKENIZER)
    assert tokenizer_train.main(["--input", str(text), "--kind", "byte", "--output", str(tmp_path / "t.json")]) == 0
    assert (tmp_path / "t.json").read_text() != TOKENIZER
    shutil.copytree(sample_dir, tmp_path / "d")
    for place in ("d", "run"):
        assert "belongs to what is in" in refused("tokenizer_train.py", "--input", "s.txt", "--output", f"{place}/tokenizer.json")


def test_what_a_killed_process_left_is_removed_after_an_hour(tmp_path):
    old, new, other = (tmp_path / f".{name}.0123456789abcde{n}.tmp" for n, name in enumerate(("e.json", "e.json", "f.json")))
    for path in (old, new, other):
        path.write_text("{")
    for path in (old, other):
        os.utime(path, (time.time() - 4000,) * 2)
    output_file(str(tmp_path / "e.json"), "evaluation", [])
    assert not old.exists() and new.exists() and other.exists()


def test_a_file_gets_the_usual_permissions_and_any_long_name(tmp_path):
    outputs.write_text(tmp_path / ("n" * 250), "ours")
    (tmp_path / "usual").write_text("")
    assert (tmp_path / ("n" * 250)).stat().st_mode == (tmp_path / "usual").stat().st_mode


# ---------------------------------------------------------------- data

FOREIGN_TO_DATA = {
    "train.bin": b"their tokens",
    "tokenizer.json": TOKENIZER.encode(),
    "meta.json": b'{"title": "mine"}',
    "data_report.png": b"a picture",
    "floor.json": b"{}",
    "commit.json": b'{"message": "mine"}',
    "train.bin.new": b"mine",
    "meta.json/x": b"a folder of that name",
    "train.bin/x": b"a folder of that name",
}


def prepare(place) -> list:
    return ["--input", "s.txt", "--tokenizer", "byte", "--no_report", "--output", place]


@pytest.mark.parametrize("name", FOREIGN_TO_DATA)
def test_data_replaces_no_file_of_others(tmp_path, text, refused, name):
    (tmp_path / "d" / name).parent.mkdir(parents=True)
    (tmp_path / "d" / name).write_bytes(FOREIGN_TO_DATA[name])
    assert "is in the way and was not written by this program" in refused("prepare_data.py", *prepare("d"))


def test_data_goes_neither_into_a_run_nor_over_a_file(tmp_path, text, run, refused):
    (run / "tokenizer.json").unlink()
    assert "holds a run" in refused("prepare_data.py", *prepare("run"))
    assert "s.txt is not a directory" in refused("prepare_data.py", *prepare("s.txt"))
    assert "output is empty" in refused("prepare_data.py", *prepare(""))
    assert "not UTF-8" in refused("prepare_data.py", *prepare("d\udcff"))
    (tmp_path / "nowhere").symlink_to("missing")
    assert "is not a directory" in refused("prepare_data.py", *prepare("nowhere"))


def test_data_of_ours_is_replaced_beside_files_of_others(tmp_path, text, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("notes.txt", "config.json", "train.bin.tmp"):
        (tmp_path / "d" / name).write_text("mine")
    for _ in range(2):
        assert prepare_data.main(prepare("d")) == 0
    assert {(tmp_path / "d" / name).read_text() for name in ("notes.txt", "config.json", "train.bin.tmp")} == {"mine"}
    (tmp_path / "d" / "data_report.png").write_text("mine")  # no preparation wrote one
    assert "data_report.png is in the way" in refused("prepare_data.py", *prepare("d"))
    (tmp_path / "d" / "data_report.png").unlink()
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    del meta["files"]
    for content in (json.dumps(meta), "{damaged"):  # prepared before there were lists; damaged: "prepare the data again"
        (tmp_path / "d" / "meta.json").write_text(content)
        assert prepare_data.main(prepare("d")) == 0
    os.link("d/meta.json", "own.jsonl")
    assert "this command reads" in refused("prepare_data.py", *prepare("d"), "--val_input", "d/tokenizer.json")


def test_a_folder_in_the_place_of_a_file_never_leaves_a_commit_stuck(tmp_path, text, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert prepare_data.main(prepare("d")) == 0
    shutil.move("d/train.bin", "kept")
    (tmp_path / "d" / "train.bin").mkdir()
    assert "train.bin is in the way" in refused("prepare_data.py", *prepare("d"))
    (tmp_path / "d" / "commit.json").write_text(json.dumps({"new": ["train.bin"], "remove": []}))  # stuck by an older version
    shutil.copy("kept", "d/train.bin.new")
    with pytest.raises(OSError) as caught:
        finish_commit(tmp_path / "d")
    assert "train.bin; move it away" in describe(caught.value)
    (tmp_path / "d" / "train.bin").rmdir()
    assert len(DataDirectory(tmp_path / "d").tokens("train"))


# ---------------------------------------------------------------- runs

FOREIGN_TO_RUNS = {
    "config.json": b"{}",
    "tokenizer.json": TOKENIZER.encode(),
    "metrics.jsonl": b"{}\n",
    "best_model.pt": b"another program's weights",
    "step_00000005.pt": b"another program's weights",
    "loss.png": b"a picture",
    "evaluation.json": MEASURES.encode(),
    "export.json": b'{"exports": []}',
}


@pytest.mark.parametrize("name", FOREIGN_TO_RUNS)
@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_run_replaces_no_file_of_others(tmp_path, sample_dir, refused, name, flags):
    for folder in ("hf", "hf.tmp", "tensorboard"):
        (tmp_path / "o" / folder).mkdir(parents=True)
        (tmp_path / "o" / folder / "notes").write_text("mine")
    (tmp_path / "o" / name).write_bytes(FOREIGN_TO_RUNS[name])
    sentence = refused("train.py", *tiny(data_dir=sample_dir, out_dir="o", max_steps=1), *flags)
    assert f"{name} is in the way and was not written by this program" in sentence


def test_a_run_takes_no_directory_of_another_kind(tmp_path, text, sample_dir, trained_run, refused):
    pytest.importorskip("transformers")
    shutil.copytree(sample_dir, tmp_path / "d")
    assert "holds prepared data" in refused("train.py", *tiny(data_dir="d", out_dir="d", max_steps=1))
    assert export_model.main(["--checkpoint", str(trained_run), "--format", "hf", "--output", str(tmp_path / "o")]) == 0
    fine = ["--data_dir", sample_dir, "--max_steps", 1, "--device", "cpu"]
    assert "config.json is in the way" in refused("train.py", "--init_from", "o/hf", "--out_dir", "o/hf", *fine)
    assert "export.json is in the way" in refused("train.py", "--init_from", "o/hf", "--out_dir", "o", *fine)
    assert "is not a directory" in refused("train.py", *tiny(data_dir=sample_dir, out_dir="s.txt"))
    assert "out_dir" in refused("train.py", *tiny(data_dir=sample_dir, out_dir=""))
    assert "not UTF-8" in refused("train.py", *tiny(data_dir=sample_dir, out_dir="\udcff"))


@pytest.mark.parametrize("source", ["run", "run/best_model.pt", "run/hf", "link.pt"])
def test_overwrite_never_deletes_its_source(tmp_path, run, sample_dir, refused, source):
    (tmp_path / "link.pt").symlink_to("run/best_model.pt")
    if source == "run/hf":
        pytest.importorskip("transformers")
        assert export_model.main(["--checkpoint", str(run), "--format", "hf"]) == 0
    flags = ["--init_from", source, "--data_dir", sample_dir, "--max_steps", 1, "--device", "cpu", "--out_dir", "run", "--overwrite"]
    assert "this command reads" in refused("train.py", *flags)


@pytest.mark.parametrize(
    "wrong", [{"block_size": 100_000}, {"weight_decay": "nan"}, {"grad_clip": "inf"}, {"rope_theta": "nan"}, {"export": "hf"}]
)
def test_overwrite_deletes_and_prepares_nothing_before_all_is_checked(tmp_path, text, run, refused, monkeypatch, wrong):
    (tmp_path / "a.txt").write_text(TEXT.upper())
    monkeypatch.chdir(tmp_path)
    assert train.main(tiny(dataset="a.txt", tokenizer="byte", out_dir="o", max_steps=1)) == 0
    monkeypatch.setattr("export.formats.find_spec", lambda name: None)
    refused("train.py", *tiny(dataset="s.txt", tokenizer="byte", out_dir="o", max_steps=1, **wrong), "--overwrite")


def test_overwrite_with_another_text_takes_its_data_over(tmp_path, text, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT.upper())
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "s.txt"):
        assert train.main([*tiny(dataset=name, tokenizer="byte", out_dir="o", max_steps=1), "--overwrite"]) == 0
        (tmp_path / "o" / "data" / "notes").write_text("mine")
    assert DataDirectory("o/data").meta["sources"][0]["name"] == "s.txt" and (tmp_path / "o" / "data" / "notes").exists()
    assert [path.name for path in (tmp_path / "o").iterdir() if path.name.startswith(".")] == []
    assert json.loads((tmp_path / "o" / "config.json").read_text())["train"]["data_dir"] == ["o/data"]
    assert train.main([*tiny(dataset="s.txt", tokenizer="byte", out_dir="o", max_steps=2), "--resume", "auto"]) == 0


def test_only_what_a_run_wrote_is_cleared(run):
    add_record(run, "best_model.onnx", {})
    written = {path.name for path in run.iterdir()} | {"evaluation.json", "best_model.onnx"}
    for name, content in {"evaluation.json": MEASURES, "best_model.onnx": "", "notes.txt": "", "best_model.ts.pt": ""}.items():
        (run / name).write_text(content)
    for folder in ("tensorboard", "hf", "data"):
        (run / folder).mkdir()
    assert written_names(run) <= written
    clear_run(run)
    assert {path.name for path in run.iterdir()} == {"notes.txt", "best_model.ts.pt", "tensorboard", "hf", "data"}


def test_a_run_without_a_list_is_known_by_its_names(run):
    config = json.loads((run / "config.json").read_text())
    del config["files"]
    (run / "config.json").write_text(json.dumps(config))
    (run / "tensorboard").mkdir()
    (run / "evaluation.json").write_text('{"mine": 1}')
    clear_run(run)
    assert [path.name for path in run.iterdir()] == ["evaluation.json"]


def test_a_run_whose_configuration_is_gone_stays_a_run(run):
    for damage in (lambda path: path.write_text("{"), Path.unlink):
        damage(run / "config.json")
        with sole_trainer(run, False):
            assert {"best_model.pt", "metrics.jsonl", "config.json"} <= written_names(run)


# ---------------------------------------------------------------- exports


@pytest.mark.parametrize("name", ["best_model.onnx", "export.json"])
def test_an_export_replaces_no_file_of_others(tmp_path, run, sample_dir, refused, name):
    (tmp_path / "o").mkdir()
    (run / name).write_text('{"mine": 1}')
    (tmp_path / "o" / name).write_text('{"mine": 1}')
    (tmp_path / "o" / ".export.tmp").mkdir()
    assert f"{name} is " in refused("export_model.py", "--checkpoint", "run", "--output", "o")
    arguments = tiny(data_dir=sample_dir, out_dir="run", max_steps=40, eval_interval=15, checkpoint_interval=10)
    assert f"{name} is " in refused("train.py", *arguments, "--resume", "auto", "--export", "onnx")
    assert "output is empty" in refused("export_model.py", "--checkpoint", "run", "--output", "")
    assert "is not a directory" in refused("export_model.py", "--checkpoint", "run", "--output", "run/best_model.pt")


def test_missing_packages_are_told_before_a_training(tmp_path, sample_dir, refused, monkeypatch):
    monkeypatch.setattr("export.formats.find_spec", lambda name: None)
    assert "pip install transformers" in refused("train.py", *tiny(data_dir=sample_dir, out_dir="o", max_steps=1, export="hf"))


# ---------------------------------------------------------------- one writer at a time


@pytest.mark.parametrize("kind", ["data", "train", "export"])
def test_a_second_writer_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path, text, trained_run, sample_dir, mistake, monkeypatch, kind):
    arguments = {
        "data": ["prepare_data.py", *prepare("o")],
        "train": ["train.py", *tiny(data_dir=sample_dir, out_dir="o", max_steps=1)],
        "export": ["export_model.py", "--checkpoint", trained_run, "--output", "o"],
    }[kind]
    holding = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from formats.outputs import sole_writer
with sole_writer(Path({str(tmp_path / "o")!r}), {kind!r}, "output", "x"):
    print("here", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    (tmp_path / "o" / "train.bin.new").write_text("the first writer's")
    before = snapshot(tmp_path)
    assert "another process is writing to o; wait for its end" in mistake(*arguments, cwd=tmp_path)
    assert snapshot(tmp_path) == before
    process.kill()
    process.wait()
    if kind == "data":
        monkeypatch.chdir(tmp_path)
        assert prepare_data.main(prepare("o")) == 0
        assert sorted(os.listdir("o")) == ["meta.json", "test.bin", "tokenizer.json", "train.bin", "val.bin"]
    else:
        with sole_writer(tmp_path / "o", kind, "output", "x") as killed:
            assert killed


def test_a_directory_that_stays_empty_is_removed(tmp_path):
    with pytest.raises(ValueError), sole_writer(tmp_path / "a" / "b", "train", "out_dir", "x"):
        raise ValueError
    assert not (tmp_path / "a").exists()


def test_one_writer_does_not_touch_the_temporary_files_of_another_kind(tmp_path):
    paths = [outputs.temporary_path(tmp_path / name) for name in ("best_model.pt", "evaluation.json", "export")]
    for path in paths:
        path.write_text("")
    with sole_trainer(tmp_path, False):
        assert [path.exists() for path in paths] == [False, True, True]


# ---------------------------------------------------------------- full disks, hang-ups, pipes


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_file_and_what_to_do(tmp_path):
    with pytest.raises(OSError) as caught:
        outputs.write_atomically(tmp_path / "e.json", full)
    assert describe(caught.value) == f"No space left on device: {tmp_path / 'e.json'}; make room on that disk, or write to another one"
    with pytest.raises(OSError) as caught, DataDirectoryWriter(tmp_path / "d") as writer:
        writer.files["val"] = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        writer.add("val", data_directory.np.zeros(9, "u2"), 1, 9)
    assert "d/val.bin; make room" in describe(caught.value) and not (tmp_path / "d").exists()
    with pytest.raises(OSError) as caught, naming(tmp_path / "x"):
        open(tmp_path / "missing" / "y").close()
    assert str(tmp_path / "x") in describe(caught.value)


@pytest.fixture
def hang_ups_heard():
    """As in a terminal; a test suite under nohup would ignore them."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no hang-ups")
def test_a_hang_up_saves_everything_unless_it_is_ignored(tmp_path, sample_dir, monkeypatch, hang_ups_heard):
    original = train.training_step

    def step(learner, batches, number, stopped):
        if number == 3:
            signal.raise_signal(signal.SIGHUP)
        return original(learner, batches, number, stopped)

    monkeypatch.setattr(train, "training_step", step)
    arguments = tiny(data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=6)
    assert train.main(arguments) == 129 and newest_checkpoint(tmp_path / "run")[1]["step"] == 3
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train.main([*arguments, "--resume", "auto"]) == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_training_outlives_whoever_reads_its_output(tmp_path, sample_dir, monkeypatch):
    """As `train.py 2>&1 | head` does: both streams are pipes that nobody reads any more."""
    for name in ("stdout", "stderr"):
        reading, writing = os.pipe()
        os.close(reading)
        monkeypatch.setattr(sys, name, os.fdopen(writing, "w", buffering=1))
    assert train.main(tiny(data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=4, eval_interval=2)) == 0
    assert newest_checkpoint(tmp_path / "run")[1]["step"] == 4 and (tmp_path / "run" / "loss.png").is_file()
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4]


def shell(command: str, cwd: Path) -> int:
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_files(tmp_path, text, closed):
    """The number of a closed stream must not go to a file that is opened next: what is printed would land in it."""
    command = f"{sys.executable} {ROOT}/tokenizer_train.py --input s.txt --kind byte --vocab_size 300 --output t.json {closed}"
    assert shell(command, tmp_path) == 0
    assert json.loads((tmp_path / "t.json").read_text())["model"]["type"] == "BPE"


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "2>&1 | head -n 1"])
def test_a_training_without_streams(tmp_path, sample_dir, streams):
    flags = " ".join(tiny(data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=30, eval_interval=10))
    assert shell(f"{sys.executable} {ROOT}/train.py {flags} {streams}", tmp_path) == 0
    assert newest_checkpoint(tmp_path / "run")[1]["step"] == 30
