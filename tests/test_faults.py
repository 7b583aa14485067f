"""Faults while a run is saved or read: full disks, read-only directories, damaged and malicious files, too little memory."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from config import GPTConfig, TrainConfig
from formats.checkpoint import load_checkpoint
from formats.run_directory import step_checkpoints
from models import GPT
from tests.conftest import ROOT, tiny
from tests.runs import assert_same_run, start_training, wait_for_lines
from training import estimates
from training.machine import Machine
from training.processes import Processes


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, small_disk, sample_dir, script):
    """A checkpoint is 400 kB here: the first fits beside the best model, the second does not. With room again the run goes on exactly."""
    arguments = tiny(data_dir=sample_dir, max_steps=9, eval_interval=100, checkpoint_interval=4)
    script("train.py", *arguments, "--out_dir", tmp_path / "whole")
    process = script("train.py", *arguments, "--out_dir", small_disk / "run", code=2)
    assert "is the disk full?" in process.stderr or "No space left" in process.stderr
    assert [path.name for path in step_checkpoints(small_disk / "run")] == ["step_00000004.pt"]
    assert not list((small_disk / "run").glob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    script("train.py", *arguments, "--out_dir", small_disk / "run", "--resume", "auto")
    assert_same_run(tmp_path / "whole", small_disk / "run")


def test_a_write_that_is_refused_leaves_the_old_file(tmp_path, trained_run):
    """Twin of the full disk that needs no root: the process may not write files beyond 10 kB."""
    path = tmp_path / "best_model.pt"
    shutil.copy(trained_run / "best_model.pt", path)
    before = path.read_bytes()
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from formats.checkpoint import load_checkpoint, save_checkpoint
from pathlib import Path
content = load_checkpoint(Path({str(path)!r}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_checkpoint(Path({str(path)!r}), content)
except OSError as error:
    sys.exit(7)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 7
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["best_model.pt"]


def test_a_read_only_directory_is_one_sentence(tmp_path, sample_dir, script):
    """Root may write everywhere: then a file stands where the directory should be."""
    place = tmp_path / "place"
    if os.geteuid():
        place.mkdir()
        place.chmod(0o500)
    else:
        place.write_text("a file")
    stderr = script("train.py", *tiny(data_dir=sample_dir, out_dir=place / "run", max_steps=2), code=2).stderr
    assert "Permission denied" in stderr or "Not a directory" in stderr


def flip_bits(path: Path, content: dict, copy: Path, flips: int) -> None:
    rng, whole = np.random.RandomState(0), path.read_bytes()

    def equal(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b

    found = 0
    for _ in range(flips):
        damaged = bytearray(whole)
        damaged[rng.randint(len(whole))] ^= 1 << rng.randint(8)
        copy.write_bytes(damaged)
        try:
            loaded = load_checkpoint(copy)
        except ValueError as error:
            assert copy.name in str(error)
            found += 1
        else:
            assert equal(loaded, content)
    assert found > 0.8 * flips


def test_every_flipped_bit_is_found_or_harmless(tmp_path, trained_run):
    """500 flips over a checkpoint of weights only and a complete one."""
    for name in ("best_model.pt", "step_00000030.pt"):
        flip_bits(trained_run / name, load_checkpoint(trained_run / name), tmp_path / "flipped.pt", 250)


def test_truncated_and_foreign_files_are_refused(tmp_path, trained_run):
    whole, path = (trained_run / "best_model.pt").read_bytes(), tmp_path / "part.pt"
    for length in {0, 1, 100, len(whole) - 1, *np.random.RandomState(0).randint(0, len(whole), 60).tolist()}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"part\.pt is damaged"):
            load_checkpoint(path)
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="no checkpoint of this project"):
        load_checkpoint(path)


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_code_in_files_is_not_run(tmp_path, sample_dir, trained_run, mistake):
    """A pickle that runs code, in each place where a script reads a file."""
    code = Malicious(tmp_path / "owned")
    raw, archive = tmp_path / "raw.pt", tmp_path / "archive.pt"
    raw.write_bytes(pickle.dumps(code))
    content = load_checkpoint(trained_run / "step_00000030.pt")
    torch.save(content | {"model": code}, archive)
    for bad in (raw, archive):
        for name in ("generate.py", "evaluate.py", "export_model.py", "train.py"):
            flags = {
                "train.py": ["--init_from", bad, "--data_dir", sample_dir],
                "export_model.py": ["--checkpoint", bad, "--format", "onnx"],
            }
            assert bad.name in mistake(name, *flags.get(name, ["--checkpoint", bad]), cwd=tmp_path)
        assert bad.name in mistake("train.py", "--data_dir", sample_dir, "--resume", bad, cwd=tmp_path)
        assert bad.name in mistake("compare.py", bad, trained_run, "--data_dir", sample_dir, cwd=tmp_path)
        assert bad.name in mistake("prepare_data.py", "--sample", "--tokenizer", bad, cwd=tmp_path)
    for place in ("meta.json", "tokenizer.json", "commit.json"):
        data = tmp_path / place.replace(".", "_")
        shutil.copytree(sample_dir, data)
        (data / place).write_bytes(pickle.dumps(code))
        assert place in mistake("train.py", *tiny(data_dir=data, max_steps=1, out_dir=tmp_path / "run"), cwd=tmp_path)
    shutil.copytree(sample_dir, tmp_path / "nanogpt")  # its meta.pkl is not even looked at
    for name in ("meta.json", "tokenizer.json"):
        (tmp_path / "nanogpt" / name).unlink()
    (tmp_path / "nanogpt" / "meta.pkl").write_bytes(pickle.dumps(code))
    assert "--tokenizer" in mistake("train.py", "--data_dir", tmp_path / "nanogpt", cwd=tmp_path)
    run = tmp_path / "resumed"
    shutil.copytree(trained_run, run)
    (run / "metrics.jsonl").write_bytes(pickle.dumps(code))
    again = tiny(data_dir=sample_dir, out_dir=run, max_steps=40, eval_interval=15, checkpoint_interval=10, resume="auto")
    assert "metrics.jsonl was changed" in mistake("train.py", *again, cwd=tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_bytes(pickle.dumps(code))
    (folder / "model.safetensors").write_bytes(pickle.dumps(code))
    assert "HF folder" in mistake("train.py", "--init_from", folder, "--data_dir", sample_dir, cwd=tmp_path)
    assert not (tmp_path / "owned").exists()


def test_names_inside_files_never_lead_outside(tmp_path, sample_dir, mistake):
    """A commit marker and an index of weights that name files elsewhere."""
    outside = tmp_path / "precious.txt"
    outside.write_text("precious")
    data = tmp_path / "data"
    shutil.copytree(sample_dir, data)
    (data / "commit.json").write_text(json.dumps({"new": ["../precious.txt"], "remove": ["../precious.txt", str(outside)]}))
    import train

    assert train.main(tiny(data_dir=data, out_dir=tmp_path / "run", max_steps=1)) == 0
    assert outside.read_text() == "precious"
    folder = tmp_path / "folder"
    folder.mkdir()
    values = {"model_type": "gpt2", "n_positions": 32, "vocab_size": 512, "n_layer": 1, "n_head": 2, "n_embd": 32}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": "../precious.txt"}}))
    assert "outside of the folder" in mistake("train.py", "--init_from", folder, "--data_dir", sample_dir, cwd=tmp_path)


def evaluate_forever() -> None:
    def evaluate(*args):
        while True:
            time.sleep(0.05)

    train.evaluate = evaluate


def test_a_second_signal_aborts(tmp_path, sample_dir):
    """The first one waits for an evaluation that never ends; the second ends the process at once."""
    arguments = tiny(data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=20, eval_interval=4)
    process = start_training(*arguments, output=tmp_path / "said", prepare=evaluate_forever)
    wait_for_lines(tmp_path / "run", 4)
    process.terminate()
    process.join(1)
    assert process.is_alive()
    process.terminate()
    process.join(60)
    assert process.exitcode == 143


def test_too_little_memory_shrinks_the_batch_to_the_largest_that_fits(tmp_path, sample_dir, mistake, monkeypatch):
    """At the same effective batch; refused only if a single window doesn't fit."""
    monkeypatch.setattr("training.estimates.available_memory", lambda device: 0.7e9)
    config = TrainConfig(batch_size=512, gradient_accumulation_steps=2, optimizer="muon")
    shape, machine = GPTConfig.nano(n_layer=2, n_embd=256, vocab_size=512, block_size=128), Machine.choose("cpu", "float32", False)
    need, batch = estimates.fitting_batch(shape, config, machine, Processes())
    assert need <= 0.7e9 and 1 <= batch < 512 and 1024 % batch == 0
    for larger in (b for b in range(batch + 1, 513) if 1024 % b == 0):
        assert estimates.memory_estimate(GPT(shape), config, torch.float32, larger, "cpu", False) > 0.7e9
    monkeypatch.setattr("training.estimates.available_memory", lambda device: 0.1e9)
    large = tiny(data_dir=sample_dir, batch_size=512, gradient_accumulation_steps=2, n_embd=256, block_size=128, out_dir=tmp_path / "run")
    message = mistake("train.py", *large, cwd=tmp_path)
    assert "smaller model" in message and "one window at a time" in message and "GB are free" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_the_memory_estimate_grows_at_least_by_what_is_surely_held(arch, dtype):
    """A larger vocabulary costs its logits, weights, gradients and AdamW's two moments; dropout every attention probability."""

    def estimate(**changes) -> float:
        model = GPT(GPTConfig(**{"arch": arch, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 500} | changes))
        return estimates.memory_estimate(model, TrainConfig(optimizer="adamw"), dtype, 4, "cpu", False)

    tokens, small = 4 * 64, estimate()
    assert estimate(vocab_size=5000) - small >= 4500 * (tokens * 4 + 32 * 16)
    assert estimate(dropout=0.1) - small >= tokens * 2 * 2 * 64 * dtype.itemsize


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_is_one_sentence(tmp_path, sample_dir, mistake, monkeypatch, error):
    def fail(*args):
        raise error

    for place in ("training.pace.seconds_per_step", "train.training_step"):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            message = mistake("train.py", *tiny(data_dir=sample_dir, out_dir=tmp_path / place, batch_size=6), cwd=tmp_path)
            assert "the memory of cpu is full; pass --batch_size 3 --gradient_accumulation_steps 4" in message


# Between the tests and the script: a process started from a large one would count that one's memory as its own peak.
MEASURED = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
def test_the_memory_estimate_is_near_the_truth(tmp_path, sample_dir):
    """Peak of the whole process against what is announced, within a third, over families, precisions and sizes."""
    import re

    for flags in (
        "--preset nano --batch_size 2",
        "--preset nano --batch_size 32",
        "--preset nano --arch gpt2 --batch_size 32 --dtype float32",
        "--preset mini --batch_size 32 --arch qwen3",
        "--preset tiny --batch_size 4 --optimizer adamw --ema_decay 0.9",
    ):
        arguments = f"{flags} --gradient_accumulation_steps 1 --data_dir {sample_dir} --max_steps 3 --compile=False --eval_tokens 2000"
        command = [sys.executable, "-c", MEASURED, ROOT / "train.py", *arguments.split(), "--out_dir", tmp_path / "run", "--overwrite"]
        process = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        announced = float(re.search(r"memory +about ([\d.]+) GB", process.stderr)[1])
        peak = int(process.stdout.splitlines()[-1]) * 1024 / 1e9
        assert abs(announced - peak) < peak / 3, (flags, announced, peak)
