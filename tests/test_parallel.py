"""torchrun: several processes train what one would train, resume each other's checkpoints, and don't hang when one dies."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from formats.metrics import read_metrics
from formats.run_directory import newest_checkpoint
from tests.conftest import ROOT, tiny

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def torchrun(processes: int, script, *args) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(script), *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def losses(run) -> list[float]:
    return [line.get("loss", line.get("val_loss")) for line in read_metrics(run / "metrics.jsonl")]


def test_two_processes_train_what_one_trains_and_resume_each_other(tmp_path, sample_dir, script):
    """Losses and validation losses within 1e-5 in float32, over a resume on another number of processes in both directions."""
    arguments = tiny(data_dir=sample_dir, eval_interval=4, checkpoint_interval=4, gradient_accumulation_steps=3, warmup_steps=2)
    script("train.py", *arguments, "--max_steps", 12, "--out_dir", tmp_path / "one")
    parts = tmp_path / "parts"
    process = torchrun(2, ROOT / "train.py", *arguments, "--max_steps", 12, "--out_dir", parts)  # 3 cannot be halved, the batch of 4 can
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "on 2 processes" in stderr and stderr.count("parameters") == 1  # rank 0 alone speaks
    whole = losses(tmp_path / "one")
    assert len(losses(parts)) == len(whole) == 15 and losses(parts) == pytest.approx(whole, abs=1e-5)

    (parts / "step_00000012.pt").unlink()
    script("train.py", *arguments, "--max_steps", 12, "--out_dir", parts, "--resume", "auto")
    assert losses(parts) == pytest.approx(whole, abs=1e-5)

    (tmp_path / "one" / "step_00000012.pt").unlink()
    process = torchrun(2, ROOT / "train.py", *arguments, "--max_steps", 12, "--out_dir", tmp_path / "one", "--resume", "auto")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "processes 1 -> 2" in stderr, stderr
    assert losses(tmp_path / "one") == pytest.approx(whole, abs=1e-5)


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path, sample_dir):
    process = torchrun(
        2, ROOT / "train.py", *tiny(data_dir=sample_dir, out_dir=tmp_path / "run", batch_size=3, gradient_accumulation_steps=1)
    )
    _, stderr = process.communicate(timeout=300)
    assert process.returncode != 0 and "give --gradient_accumulation_steps 2" in stderr and not (tmp_path / "run").exists()


def test_a_signal_to_torchrun_saves(tmp_path, sample_dir, script):
    arguments = tiny(data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=100_000, eval_interval=100_000, checkpoint_interval=100_000)
    process = torchrun(2, ROOT / "train.py", *arguments)
    wait_for(lambda: len(losses(tmp_path / "run")) > 5)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    assert "everything saved" in stderr, stderr
    assert newest_checkpoint(tmp_path / "run")[1]["step"] > 5


def test_a_dying_process_ends_the_job_with_a_message(tmp_path, sample_dir):
    """Rank 1 is killed in the midst of a step; rank 0 says so instead of waiting for it."""
    (tmp_path / "dying.py").write_text(
        f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train, utils
original = train.training_step
def dying(learner, batches, step, stopped):
    if learner.processes.rank == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(learner, batches, step, stopped)
train.training_step = dying
utils.run_script(train.main)
"""
    )
    process = torchrun(2, tmp_path / "dying.py", *tiny(data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=100_000))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode != 0 and "another process of this run has ended" in stderr, stderr


def test_processes_that_see_different_memory_agree_on_the_batch(tmp_path, sample_dir):
    """Rank 1 has room for 2 windows at a time only: both take 2, and the run comes to its end."""
    (tmp_path / "short.py").write_text(
        f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train, utils
from training import estimates
estimates.available_memory = lambda device: 10e9
estimates.memory_estimate = lambda model, config, dtype, size, *rest: 6e9 if os.environ["RANK"] == "1" and size > 2 else 1e9
utils.run_script(train.main)
"""
    )
    process = torchrun(2, tmp_path / "short.py", *tiny(data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=3))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "2 windows at a time" in stderr, stderr


def wait_for(condition) -> None:
    deadline = time.time() + 120
    while not condition():
        assert time.time() < deadline, "nothing happened"
        time.sleep(0.05)
