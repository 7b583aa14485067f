"""benchmark.py on tiny shapes, beside a stand-in for nanoGPT that prints what nanoGPT prints."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import benchmark
from benchmarks import harness, nanogpt, preparation, training
from tests.conftest import ROOT

PEER = """
import sys
steps = int(next(a.split("=")[1] for a in sys.argv if a.startswith("--max_iters")))
assert any(a.startswith("--n_layer=") for a in sys.argv) and "--compile=False" in sys.argv
print("step 0: train loss 4.2, val loss 4.2")
for i in range(steps + 1):
    print(f"iter {i}: loss 4.0000, time {1000 if i in (0, steps) else 20 + i % 2:.2f}ms, mfu -100.00%")
"""


@pytest.fixture
def peer(tmp_path):
    directory = tmp_path / "peer"
    directory.mkdir()
    (directory / "train.py").write_text(PEER)
    for name in ("model.py", "configurator.py"):
        (directory / name).write_text("")
    return directory


def test_seconds_of_nanogpt_leave_out_iterations_with_an_evaluation():
    output = "iter 0: loss 10.9, time 900.0ms, mfu -100%\niter 1: loss 9.1, time 20.50ms, mfu 1%\niter 2: loss 9.0, time 700.00ms, mfu 1%"
    assert nanogpt.step_seconds(output) == [0.0205]


def test_train_beside_a_peer(peer, monkeypatch, capsys):
    """A line for each way of ours and for the peer, with ratios of speed and memory that follow from the rates printed."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4}
    monkeypatch.setitem(training.SHAPES, "cpu", shape)
    monkeypatch.setattr(training, "VOCABULARY", 300)
    monkeypatch.setattr(
        training, "OUR_WAYS", {name: training.OUR_WAYS[name] | {"compile": False} for name in ("AdamW, eager", "Muon, compiled")}
    )
    assert benchmark.main(["train", "--against", "nanogpt", str(peer), "--rounds", "1", "--steps", "6", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0].split(" (")[0].strip(): line for line in out.splitlines()[2:]}
    assert len(rows) == 3 and re.match(r"this machine's matrix products: [\d,]+ GFLOP/s in (bfloat16|float32)\n", out)
    rates = {name[:14].strip(): float(re.search(r"([\d,]+) \(", line)[1].replace(",", "")) for name, line in rows.items()}
    theirs = next(rate for name, rate in rates.items() if name.startswith("nanoGPT"))
    assert theirs == pytest.approx(4 * 16 / 0.0205, rel=0.05)
    for line in rows.values():
        if "nanoGPT's speed" in line:
            ratio, rate = float(re.search(r"; ([\d.e+]+) \(", line)[1]), float(re.search(r"([\d,]+) \(", line)[1].replace(",", ""))
            assert ratio == pytest.approx(rate / theirs, rel=0.02)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["train", "--against", "llama", "."], "unknown peer 'llama'"),
        (["train", "--against", "nanogpt", "nowhere"], "no train.py in nowhere"),
        (["quality"], "quality needs --text"),
        (["speed"], "speed"),
        (["train", "--rounds", "0"], "rounds=0"),
    ],
)
def test_mistakes(tmp_path, mistake, flags, part):
    assert part in mistake("benchmark.py", *flags, cwd=tmp_path)


def test_prepare_beside_peers(tmp_path, monkeypatch, capsys):
    """A line for each way, with ratios that follow from the rates printed, and the memory; without GPT-2's files for bpe alone."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(preparation, "gpt2_tokenizer", lambda: (_ for _ in ()).throw(ValueError("no files")))
    text = tmp_path / "t.txt"
    text.write_text("<|endoftext|>".join(f"A story about the number {i}, and the next, {i + 1}." for i in range(300)))
    assert benchmark.main(["prepare", "--text", str(text), "--megabytes", "1", "--large_megabytes", "2", "--rounds", "1"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 7 and "GFLOP/s in" in lines[0] and "without gpt2: no files" in captured.err
    rates = [float(re.search(r"([\d.e+]+) \(", line)[1]) for line in lines[2:6]]
    for line, rate in zip(lines[4:6], rates[2:]):
        ratios = [float(found) for found in re.findall(r"; ([\d.e+-]+) \(", line)]
        assert ratios == [pytest.approx(rate / peer, rel=0.02) for peer in rates[:2]]
    assert re.search(r"1 MB of text [\d,]+ MB, 2 MB of text [\d,]+ MB", lines[6])


def test_a_peer_that_fails_is_one_sentence(peer, tmp_path, mistake, monkeypatch):
    (peer / "train.py").write_text("raise SystemExit('no such option')")
    monkeypatch.setitem(training.SHAPES, "cpu", {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "batch_size": 1})
    monkeypatch.setattr(training, "VOCABULARY", 300)
    monkeypatch.setattr(training, "our_training", lambda *args: harness.Finished("", 1.0, 1.0))
    monkeypatch.setattr(training, "step_seconds", lambda out: [1.0] * 9)
    assert "no such option" in mistake("benchmark.py", "train", "--against", "nanogpt", peer, "--rounds", "1", cwd=tmp_path)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes as Linux shows them")
def test_sigterm_ends_the_children_and_leaves_nothing_behind(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmark.py"), "train", "--rounds", "1", "--device", "cpu"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline, children = time.time() + 120, []
    while not (children and any(tmp_path.iterdir())) and time.time() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.3)
    assert children and any(tmp_path.iterdir())
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir()) and not any(Path(f"/proc/{child}").exists() for child in children)
