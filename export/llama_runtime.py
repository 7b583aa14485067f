"""A GGUF file as llama.cpp computes it, through llama-cpp-python: how well it predicts, and how fast.

In a process of its own, since llama.cpp ends the one that it runs in where its kernels don't suit the processor.
"""

import multiprocessing
import signal
import time
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

from utils import describe, notice

import numpy as np
import torch
from tqdm import tqdm

from evaluation.measures import document_ends, windows_by_length
from export.verify import Mismatch

SECONDS = 0.5  # of one measurement of speed


# ---------------------------------------------------------------- in the other process


def _nats(model, ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Minus the log-probability (T,) float64 of each target, after the ids (T,) up to its place."""
    model.reset()
    model.eval(ids.tolist())
    logits = model.scores[: len(ids)].astype(np.float64)
    largest = logits.max(axis=1)
    return largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1)) - logits[np.arange(len(ids)), targets]


def _pace(model, block_size: int) -> float:
    """Tokens per second of greedy text from the beginning of a document, one at a time, by one thread."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS:
        if count % block_size == 0:
            model.reset()
            token = model.token_bos()
        model.eval([token])
        token = int(model.scores[model.n_tokens - 1].argmax())
        count += 1
    return count / elapsed


def _serve(pipe: Connection, path: str, block_size: int, threads: int) -> None:
    """Open a file; then answer a pair of a function and its arguments with what it returns or raises, until the pipe is closed."""
    import llama_cpp

    model, options = None, {"n_ctx": block_size, "n_threads": 1, "n_threads_batch": threads, "logits_all": True, "verbose": False}
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            model = model or llama_cpp.Llama(path, **options)
            pipe.send(function(model, *arguments))
        except (ValueError, RuntimeError) as error:
            pipe.send(error)


# ---------------------------------------------------------------- here


class Crash(Exception):
    """llama.cpp ended its process."""


class LlamaFile:
    """A file, open in llama.cpp. Raises Mismatch where llama.cpp refuses it, Crash."""

    def __init__(self, path: Path, block_size: int):
        self.block_size = block_size
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, str(path), block_size, torch.get_num_threads()), daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process inherits that: Ctrl-C is for this one
        try:
            process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        theirs.close()
        zeros = np.zeros(block_size, np.int64)
        self.ask(_nats, zeros, zeros)  # what crashes does so with many tokens at once

    def ask(self, function, *arguments):
        """What a function returns, called with the model and these arguments."""
        try:
            self.pipe.send((function, arguments))
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise Crash from None
        if isinstance(answer, Exception):
            raise Mismatch(f"llama.cpp can't run it ({describe(answer)})")
        return answer

    def score(self, tokens: np.ndarray, eot_id: int) -> np.ndarray:
        """Nats (n,) float64 of each token of whole documents (n,), each document from its own beginning."""
        targets = np.asarray(tokens).astype(np.int64)
        inputs = np.concatenate(([eot_id], targets[:-1]))
        nats = np.empty(len(targets))
        spans = windows_by_length(document_ends(tokens, eot_id), self.block_size, self.block_size)
        for start, end, _ in tqdm(spans, "llama.cpp", disable=None, leave=False):
            nats[start:end] = self.ask(_nats, inputs[start:end], targets[start:end])
        return nats

    def pace(self) -> float:
        """Tokens per second, one at a time, by one thread."""
        return self.ask(_pace, self.block_size)


def open_files(paths: list[Path], block_size: int) -> list[LlamaFile] | None:
    """Files, open in llama.cpp; None, told in a line, where llama-cpp-python isn't installed or doesn't survive them. Raises Mismatch."""
    reason = "llama-cpp-python is not installed"
    if find_spec("llama_cpp"):
        try:
            return [LlamaFile(path, block_size) for path in paths]
        except Crash:
            reason = "llama.cpp, as it was built here, crashes on this processor"
    notice(f"{reason}: quality is measured by our network with the file's numbers, speed isn't")
    return None
