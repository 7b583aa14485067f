"""Exact resume: whatever kills a training, what it becomes after a resume equals what it would have become."""

import functools
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import train
from formats.data_directory import DataDirectory
from formats.run_directory import newest_checkpoint, step_checkpoints
from tests.conftest import ROOT, tiny
from tests.runs import assert_same_run, lines, start_training, wait_for_lines
from training.data_order import Batches, TrainingData, samples_of_step

FACTORS = {
    "optimizer": ["muon", "adamw"],
    "dtype": ["bfloat16", "float32"],
    "arch": ["qwen3", "gpt2"],
    "dropout": [0.2, 0.0],
    "gradient_accumulation_steps": [2, 1],
    "ema_decay": [0.0, 0.9],
    "length": [{"max_steps": 24}, {"epochs": 1.1, "block_size": 256, "batch_size": 8}],  # 1.1: across the end of an epoch
    "killed_at": [[13], [2], [10], [6, 17]],  # midway, during warmup, right after an evaluation, twice
    "compile": ["False", "True"],
}


def pairwise(factors: dict[str, list]) -> list[dict]:
    """Few combinations in which each pair of values of two factors occurs at least once (greedily, always the same)."""
    names, combinations = list(factors), []
    every = [dict(zip(names, positions)) for positions in itertools.product(*(range(len(values)) for values in factors.values()))]
    missing = {pair for combination in every for pair in itertools.combinations(combination.items(), 2)}
    while missing:
        best = max(every, key=lambda c: len(missing.intersection(itertools.combinations(c.items(), 2))))
        missing -= set(itertools.combinations(best.items(), 2))
        combinations.append({name: factors[name][position] for name, position in best.items()})
    return combinations


COMBINATIONS = pairwise(FACTORS)
EAGER = [c for c in COMBINATIONS if c["compile"] == "False"]
FAST = [*EAGER[:3], next(c for c in EAGER if "epochs" in c["length"])]


def kill_before(last: int) -> None:
    """Let this process kill itself before that step."""
    original = train.training_step

    def killed(learner, batches, step, stopped):
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(learner, batches, step, stopped)

    train.training_step = killed


def check_resume(tmp_path, sample_dir, combination: dict) -> None:
    flags = {**combination, **combination["length"]}
    killed_at = flags.pop("killed_at")
    flags.pop("length")
    arguments = tiny(data_dir=sample_dir, eval_interval=5, checkpoint_interval=4, warmup_steps=5, **flags)
    if flags["compile"] == "True":  # compilation in the test's own process would meet other tests' caches
        subprocess.run(
            [sys.executable, ROOT / "train.py", *arguments, "--out_dir", tmp_path / "whole"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
    else:
        assert train.main([*arguments, "--out_dir", str(tmp_path / "whole")]) == 0
    last = newest_checkpoint(tmp_path / "whole")[1]["step"]
    assert last > max(killed_at)
    parts = [*arguments, "--out_dir", str(tmp_path / "parts"), "--resume", "auto"]
    for step in killed_at:
        process = start_training(*parts, output=tmp_path / "said", prepare=functools.partial(kill_before, step))
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "said").read_text()
    if flags["compile"] == "True":
        subprocess.run([sys.executable, ROOT / "train.py", *parts], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    else:
        assert train.main(parts) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def name(combination: dict) -> str:
    return " ".join(str(value) if key != "length" else "/".join(value) for key, value in combination.items())


@pytest.mark.parametrize("combination", FAST, ids=name)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, sample_dir, combination):
    """SIGKILL, resume, finish: weights, optimizer state and metrics are equal without tolerance; only timing differs."""
    check_resume(tmp_path, sample_dir, combination)


@pytest.mark.slow
@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if c not in FAST], ids=name)
def test_every_pair_of_circumstances(tmp_path, sample_dir, combination):
    check_resume(tmp_path, sample_dir, combination)


def kill_at_random(tmp_path, sample_dir, kills: int, seed: int) -> None:
    arguments = tiny(data_dir=sample_dir, eval_interval=3, checkpoint_interval=1, max_steps=40 + 20 * kills, batch_size=2)
    assert train.main([*arguments, "--out_dir", str(tmp_path / "whole")]) == 0
    rng, run = random.Random(seed), tmp_path / "parts"
    for _ in range(kills):
        before = len(lines(run)) if run.exists() else 0
        process = start_training(*arguments, "--out_dir", run, "--resume", "auto", output=tmp_path / "said")
        wait_for_lines(run, before // 2 + 3)
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.join()
        if step_checkpoints(run):
            newest_checkpoint(run)  # whole
    assert train.main([*arguments, "--out_dir", str(run), "--resume", "auto"]) == 0
    assert_same_run(tmp_path / "whole", run)


def test_kills_at_random_moments(tmp_path, sample_dir):
    """A run that saves after every step, killed again and again wherever it happens to be."""
    kill_at_random(tmp_path, sample_dir, 3, seed=0)


@pytest.mark.slow
def test_fifty_kills_at_random_moments(tmp_path, sample_dir):
    kill_at_random(tmp_path, sample_dir, 50, seed=1)


def test_ranks_read_what_one_process_reads():
    """Over the steps of a run, the union of the ranks is each sample once, in the order in which a single process reads them."""
    alone = np.concatenate([samples_of_step(step, 8) for step in range(30)])
    assert alone.tolist() == list(range(240))
    for processes in (2, 4):
        for step in range(30):
            shares = [samples_of_step(step, 8, rank, processes) for rank in range(processes)]
            assert sorted(np.concatenate(shares).tolist()) == samples_of_step(step, 8).tolist()
            assert np.stack(shares, axis=1).flatten().tolist() == samples_of_step(step, 8).tolist()


def test_tokens_on_the_device_give_the_same_batches(tmp_path, sample_dir):
    """The way of a GPU, with the token files in its memory, against the way of a CPU; ids above 32,767 included."""
    shutil.copytree(sample_dir, tmp_path / "other")
    data = TrainingData([DataDirectory(sample_dir), DataDirectory(tmp_path / "other")], [None, None], 32, seed=3)
    data.sources = [np.random.RandomState(i).randint(0, 65536, len(s)).astype("<u2") for i, s in enumerate(data.sources)]
    index = np.array([0, 5, 3 * data.samples_per_epoch - 1, data.samples_per_epoch, 77])
    expected = Batches(data, "cpu", resident=False)(index)
    got = Batches(data, "cpu", resident=True)(index)
    assert got.dtype == expected.dtype == torch.int64 and torch.equal(got, expected) and expected.max() > 40_000
