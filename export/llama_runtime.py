"""A GGUF file as llama.cpp computes it, through llama-cpp-python: how well it predicts, and how fast.

In a process of its own, since llama.cpp ends the one that it runs in where its kernels don't suit the processor.
"""

import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from utils import describe, notice

import numpy as np
import torch
from tqdm import tqdm

from evaluation.measures import document_ends, windows_by_length
from export.verify import Mismatch

SECONDS = 0.5  # of one measurement of speed


@cache
def _load(path: str, block_size: int, threads: int):
    """The model, in the other process. Raises ValueError where llama.cpp refuses it."""
    import llama_cpp

    options = {"n_ctx": block_size, "n_threads": 1, "n_threads_batch": threads, "logits_all": True, "verbose": False}
    return llama_cpp.Llama(path, **options)


def _nats(options: tuple[str, int, int], ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Minus the log-probability (T,) float64 of each target, after the ids (T,) up to its place."""
    model = _load(*options)
    model.reset()
    model.eval(ids.tolist())
    logits = model.scores[: len(ids)].astype(np.float64)
    largest = logits.max(axis=1)
    return largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1)) - logits[np.arange(len(ids)), targets]


def _pace(options: tuple[str, int, int]) -> float:
    """Tokens per second of greedy text from the beginning of a document, one at a time, by one thread."""
    model, block_size = _load(*options), options[1]
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS:
        if count % block_size == 0:
            model.reset()
            token = model.token_bos()
        model.eval([token])
        token = int(model.scores[model.n_tokens - 1].argmax())
        count += 1
    return count / elapsed


class LlamaFile:
    """A file, open in llama.cpp. Raises Mismatch where llama.cpp refuses it."""

    def __init__(self, path: Path, block_size: int):
        self.options = (str(path), block_size, torch.get_num_threads())
        self.block_size = block_size
        quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # Ctrl-C is for this process
        self.process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), **quiet)
        zeros = np.zeros(block_size, np.int64)
        try:  # a window as long as they get: what crashes does so with many tokens at once
            self.process.submit(_nats, self.options, zeros, zeros).result()
        except (ValueError, RuntimeError) as error:
            if isinstance(error, BrokenProcessPool):
                raise
            raise Mismatch(f"llama.cpp can't run it ({describe(error)})") from None

    def score(self, tokens: np.ndarray, eot_id: int) -> np.ndarray:
        """Nats (n,) float64 of each token of whole documents (n,), each document from its own beginning."""
        targets = np.asarray(tokens).astype(np.int64)
        inputs = np.concatenate(([eot_id], targets[:-1]))
        spans = windows_by_length(document_ends(tokens, eot_id), self.block_size, self.block_size)
        parts = [[row[start:end] for start, end, _ in spans] for row in (inputs, targets)]
        nats = np.empty(len(targets))
        found = tqdm(self.process.map(partial(_nats, self.options), *parts), "llama.cpp", len(spans), disable=None, leave=False)
        for (start, end, _), values in zip(spans, found, strict=True):
            nats[start:end] = values
        return nats

    def pace(self) -> float:
        return self.process.submit(_pace, self.options).result()


def open_files(paths: list[Path], block_size: int) -> list[LlamaFile] | None:
    """Files, open in llama.cpp; None, told in a line, where llama-cpp-python isn't installed or doesn't survive them. Raises Mismatch."""
    reason = "llama-cpp-python is not installed"
    if find_spec("llama_cpp"):
        try:
            return [LlamaFile(path, block_size) for path in paths]
        except BrokenProcessPool:
            reason = "llama.cpp, as it was built here, crashes on this processor"
    notice(f"{reason}: quality is measured by our network with the file's numbers, speed isn't")
    return None
