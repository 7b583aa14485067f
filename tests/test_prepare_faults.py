"""Preparation that is killed, stopped, or runs out of disk: the old data directory stays, nothing half-written trains."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import prepare_data
from formats.data_directory import OUR_FILES, DataDirectory, finish_commit
from tests.conftest import ROOT
from tests.runs import start, write_stories
from tests.test_prepare import STORIES


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name in OUR_FILES}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """About six megabytes of stories, several batches."""
    path = tmp_path_factory.mktemp("source") / "stories.txt"
    return write_stories(path, [f"{i} {text}" for i in range(30) for text in STORIES])


def flags(source: Path, output: Path) -> list:
    return ["--input", source, "--tokenizer", "byte", "--num_workers", 2, "--no_report", "--output", output]


@pytest.fixture
def old(tmp_path) -> Path:
    """A data directory with a foreign file."""
    directory = tmp_path / "data"
    prepare_data.prepare(prepare_data.Arguments(sample=True, sample_stories=60, vocab_size=300, output=str(directory), report=False))
    (directory / "notes.txt").write_text("mine")
    return directory


def processes_that_name(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_text():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def kill_at_random(tmp_path, source, old, seed: int) -> None:
    """A kill at a random moment of the run; then the directory holds the old data or the new, whole, and no process is left."""
    whole = tmp_path / "whole"
    started = time.perf_counter()
    process = start(*flags(source, whole), program=ROOT / "prepare_data.py")
    assert process.wait() == 0
    duration = time.perf_counter() - started
    before = content(old)
    process = start(*flags(source, old), program=ROOT / "prepare_data.py")
    time.sleep(random.Random(seed).uniform(0.1, 1.05) * duration)
    process.kill()
    process.wait()
    DataDirectory(old).tokens("train")  # what a reader of the moment sees
    assert content(old) in (before, content(whole))
    assert (old / "notes.txt").read_text() == "mine"
    deadline = time.time() + 30
    while processes_that_name(str(old)) and time.time() < deadline:
        time.sleep(0.05)
    assert not processes_that_name(str(old))
    process = start(*flags(source, old), program=ROOT / "prepare_data.py")
    assert process.wait() == 0 and content(old) == content(whole)
    assert not list(old.glob("*.new")) and not (old / "commit.json").exists()


@pytest.mark.parametrize("seed", range(5))
def test_a_kill_at_any_moment(tmp_path, source, old, seed):
    kill_at_random(tmp_path, source, old, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 35))
def test_many_kills(tmp_path, source, old, seed):
    kill_at_random(tmp_path, source, old, seed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_no_traces(source, old, number, code):
    before = content(old)
    process = start(*flags(source, old), program=ROOT / "prepare_data.py")
    while not (old / "train.bin.new").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    stderr = process.communicate()[1]
    assert process.returncode == code and "Traceback" not in stderr, stderr
    assert content(old) == before and sorted(path.name for path in old.iterdir()) == sorted([*before, "notes.txt"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source) -> tuple[Path, float]:
    """What an undisturbed run makes, and its seconds."""
    output = tmp_path_factory.mktemp("undisturbed") / "data"
    started = time.perf_counter()
    assert start(*flags(source, output), program=ROOT / "prepare_data.py").wait() == 0
    return output, time.perf_counter() - started


def signal_the_group(source, old, undisturbed, seeds: range) -> None:
    """SIGINT or SIGTERM to all processes of a run at random moments: it ends, with its code, and nothing half-written or running stays."""
    whole, seconds = undisturbed
    before, after = content(old), content(whole)
    for seed in seeds:
        rng = random.Random(seed)
        number = rng.choice([signal.SIGINT, signal.SIGTERM])
        process = start(*flags(source, old), program=ROOT / "prepare_data.py", start_new_session=True)
        time.sleep(rng.uniform(0.2, 1.05) * seconds)
        if process.poll() is None:
            os.killpg(process.pid, number)
        stderr = process.communicate(timeout=120)[1]
        ended = process.returncode if process.returncode >= 0 else 128 - process.returncode  # so a shell calls a death by signal
        assert ended in (0, 128 + number), (seed, stderr)
        finish_commit(old)  # as the next reader does, where the signal fell among the renames
        assert content(old) == after if ended == 0 else content(old) in (before, after), seed
        assert not processes_that_name(str(old)), seed
        assert (old / "notes.txt").read_text() == "mine", seed


def test_a_signal_to_all_processes(source, old, undisturbed):
    signal_the_group(source, old, undisturbed, range(5))


@pytest.mark.slow
def test_a_signal_to_all_processes_at_200_moments(source, old, undisturbed):
    signal_the_group(source, old, undisturbed, range(5, 205))


def test_a_full_disk(small_disk, source, script):
    prepare_data.prepare(prepare_data.Arguments(sample=True, sample_stories=60, vocab_size=300, output=str(small_disk / "d"), report=False))
    before = content(small_disk / "d")
    process = script("prepare_data.py", *flags(source, small_disk / "d"), code=2)
    assert "No space left" in process.stderr
    assert content(small_disk / "d") == before and not list((small_disk / "d").glob("*.new"))


def test_a_write_that_is_refused(source, old):
    """Like a full disk, but without root: the process may not write files beyond 100 kB."""
    before = content(old)
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import prepare_data
from utils import run_script
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run_script(lambda: prepare_data.main({[str(flag) for flag in flags(source, old)]!r}))
"""
    process = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert process.returncode == 2 and "File too large" in process.stderr and "Traceback" not in process.stderr
    assert content(old) == before and not list(old.glob("*.new"))


def test_an_output_that_cannot_be_written(tmp_path, source, script):
    """Root may write everywhere, so a file stands where the directory should be."""
    (tmp_path / "place").write_text("a file")
    assert "Not a directory" in script("prepare_data.py", *flags(source, tmp_path / "place" / "d"), code=2).stderr
    assert (tmp_path / "place").read_text() == "a file"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers in /proc")
def test_a_worker_that_is_killed_is_one_sentence(source, old):
    before = content(old)
    process = start(*flags(source, old), program=ROOT / "prepare_data.py")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not (workers := children.read_text().split()):
        time.sleep(0.002)
    subprocess.run(["kill", "-9", workers[0]], check=True)
    stderr = process.communicate()[1]
    assert process.returncode == 2 and "was killed" in stderr and "Traceback" not in stderr
    assert content(old) == before
