"""Several processes train what one would train, resume each other's checkpoints, and don't hang when one dies."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import train
from formats.metrics import read_metrics
from formats.run_directory import newest_checkpoint
from tests.conftest import ROOT, tiny
from tests.runs import start_training
from training import estimates

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def two_processes(tmp_path, *arguments, prepare=None) -> tuple[list[int], str]:
    """train.py in two processes with what torchrun would tell them. Returns their exit codes, and what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    said = [tmp_path / f"said_{rank}" for rank in range(2)]
    processes = [
        start_training(*arguments, output=file, prepare=prepare, RANK=str(rank), LOCAL_RANK=str(rank), **told)
        for rank, file in enumerate(said)
    ]
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # if they wait for each other
    return codes, "".join(file.read_text() for file in said)


def losses(run) -> list[float]:
    return [line.get("loss", line.get("val_loss")) for line in read_metrics(run / "metrics.jsonl")]


def little_memory() -> None:
    """Rank 1 has room for one window at a time only."""
    little = os.environ["RANK"] == "1"
    estimates.available_memory = lambda device: 10e9
    estimates.memory_estimate = lambda model, config, dtype, size, *rest: 6e9 if little and size > 1 else 1e9


def test_two_processes_train_what_one_trains_and_resume_each_other(tmp_path, sample_dir, script):
    """Losses and validation losses within 1e-5 in float32, over a resume on another number of processes in both directions.

    The second time rank 1 sees less memory: both take fewer windows at a time, and train the same.
    """
    arguments = tiny(data_dir=sample_dir, eval_interval=4, checkpoint_interval=4, gradient_accumulation_steps=3, warmup_steps=2)
    arguments += ["--max_steps", "12", "--out_dir"]
    script("train.py", *arguments, tmp_path / "one")
    parts = tmp_path / "parts"
    codes, said = two_processes(tmp_path, *arguments, parts)  # 3 cannot be halved, the batch of 4 can
    assert codes == [0, 0], said
    assert "on 2 processes" in said and said.count("parameters") == 1  # rank 0 alone speaks
    whole = losses(tmp_path / "one")
    assert len(losses(parts)) == len(whole) == 15 and losses(parts) == pytest.approx(whole, abs=1e-5)

    (parts / "step_00000012.pt").unlink()
    script("train.py", *arguments, parts, "--resume", "auto")
    assert losses(parts) == pytest.approx(whole, abs=1e-5)

    (tmp_path / "one" / "step_00000012.pt").unlink()
    codes, said = two_processes(tmp_path, *arguments, tmp_path / "one", "--resume", "auto", prepare=little_memory)
    assert codes == [0, 0] and "processes 1 -> 2" in said and "1 windows at a time" in said, said
    assert losses(tmp_path / "one") == pytest.approx(whole, abs=1e-5)


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path, sample_dir):
    arguments = tiny(data_dir=sample_dir, out_dir=tmp_path / "run", batch_size=3, gradient_accumulation_steps=1)
    codes, said = two_processes(tmp_path, *arguments)
    assert codes == [2, 2] and "give --gradient_accumulation_steps 2" in said and not (tmp_path / "run").exists()


def test_a_signal_to_torchrun_saves(tmp_path, sample_dir):
    arguments = tiny(data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=100_000, eval_interval=100_000, checkpoint_interval=100_000)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py"), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(lambda: len(losses(tmp_path / "run")) > 5)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    assert "everything saved" in stderr, stderr
    assert newest_checkpoint(tmp_path / "run")[1]["step"] > 5


def dies_at_step_3() -> None:
    original = train.training_step

    def dying(learner, batches, step, stopped):
        if learner.processes.rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(learner, batches, step, stopped)

    train.training_step = dying


def test_a_dying_process_ends_the_job_with_a_message(tmp_path, sample_dir):
    """Rank 1 is killed in the midst of a step; rank 0 says so instead of waiting for it."""
    arguments = tiny(data_dir=sample_dir, out_dir=tmp_path / "run", max_steps=100_000)
    codes, said = two_processes(tmp_path, *arguments, prepare=dies_at_step_3)
    assert codes == [1, -signal.SIGKILL] and "another process of this run has ended" in said, said


def wait_for(condition) -> None:
    deadline = time.time() + 120
    while not condition():
        assert time.time() < deadline, "nothing happened"
        time.sleep(0.05)
