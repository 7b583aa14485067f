"""Runs compared and watched, for several test files."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable

import utils

import torch

import train
from formats.data_directory import DataDirectory
from formats.metrics import read_metrics
from formats.run_directory import newest_checkpoint
from formats.tokenizer import EOT
from models import GPT
from tests.conftest import ROOT

TIMING = {"tokens_per_second"}


def lines(run) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(run / "metrics.jsonl")]


def assert_same_run(a, b):
    """Weights, optimizer state and metrics lines but for timing, without tolerance."""
    (path_a, left), (path_b, right) = newest_checkpoint(a), newest_checkpoint(b)
    assert path_a.name == path_b.name

    def same(x, y, where):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y), where
        elif isinstance(x, dict):
            assert x.keys() == y.keys(), where
            for key in x:
                if key not in ("metrics", "out_dir"):
                    same(x[key], y[key], f"{where}.{key}")
        elif isinstance(x, list):
            assert len(x) == len(y), where
            for i, pair in enumerate(zip(x, y)):
                same(*pair, f"{where}[{i}]")
        else:
            assert x == y, where

    same(left, right, "checkpoint")
    assert lines(a) == lines(b)


# Processes that train come from a server that has imported what a training needs, once: each of them would spend 5 seconds on it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.runs", "matplotlib.figure", "torch._dynamo"])


def _train(arguments: list[str], output: str, prepare: Callable[[], None] | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with open(output, "w", encoding="utf-8", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if prepare is not None:
            prepare()
        utils.run_script(lambda: train.main(arguments))


def start_training(*arguments, output, prepare: Callable[[], None] | None = None, **environment: str) -> multiprocessing.Process:
    """train.py in a process of its own, which writes what it says into the file `output`. prepare: called there first, to patch modules."""
    process = SERVER.Process(target=_train, args=([*map(str, arguments)], str(output), prepare, environment), daemon=True)
    with contextlib.chdir(ROOT):  # where the server finds its modules
        process.start()
    return process


def start(*args, program, **options) -> subprocess.Popen:
    """A program in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(program), *map(str, args)], stderr=subprocess.PIPE, text=True, env=environment, **options)


def wait_for_lines(run, count: int) -> None:
    deadline = time.time() + 120
    while time.time() < deadline:
        if len(read_metrics(run / "metrics.jsonl")) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("the training wrote no metrics")


def write_stories(path, stories: list[str], separator=f"\n{EOT}\n"):
    """A text file of documents; returns its path."""
    path.write_text(separator.join(stories) + separator, encoding="utf-8")
    return path


def documents(directory, split: str) -> list[str]:
    """The texts of a split, from its token file."""
    data = DataDirectory(directory)
    text = data.tokenizer.tokenizer.decode(data.tokens(split).tolist(), skip_special_tokens=False)
    assert text.endswith(EOT)
    return text.split(EOT)[:-1]


@torch.inference_mode()
def greedy(model: GPT, ids: list[int], count: int) -> list[int]:
    """Ids followed by the `count` most probable ones, each from all before it: nothing is cached, nothing ends the text."""
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids]))[0][0, -1].argmax())]
    return ids
