"""The comparison that an export must pass before it gets its name, and where it is written until then."""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from formats.outputs import fsync_directory, temporary_path
from formats.tokenizer import TextTokenizer
from generation.engines import Engine
from models import GPT

TOLERANCE = 1e-4  # how far logits of the same model may differ, in units of the largest one where that is above 1


@dataclass(frozen=True)
class Source:
    """What is exported: the network in evaluation mode on the CPU, its tokenizer, the file or HF folder, and all that is in there."""

    model: GPT
    tokenizer: TextTokenizer
    path: Path
    content: dict


@dataclass(frozen=True)
class Measurable:
    """A file whose quality and speed are measured by its own runtime.

    size: bytes. score: whole documents (n,) uint16 and the EOT's id -> nats of each token (n,) float64, each document from its own
    beginning. pace: tokens per second, one after the other on one thread, measured for a moment; None where nothing here runs it. bits: of
    a weight, which say how much worse it may be.
    """

    size: int
    score: Callable[[np.ndarray, int], np.ndarray]
    pace: Callable[[], float] | None
    runtime: str
    bits: int = 32


@dataclass(frozen=True)
class Loaded:
    """What was written, as its own runtime loaded it back.

    logits: token ids (B, T) int64 -> logits (B, T, V) float32. engine: for formats with a cache of keys and values. encode: text ->
    token ids, by the tokenizer that lies in the file or beside it. rounded: for formats whose numbers are rounded, the same format with all
    digits, and what was written.
    """

    logits: Callable[[Tensor], Tensor]
    engine: Engine | None = None
    encode: Callable[[str], list[int]] | None = None
    rounded: tuple[Measurable, Measurable] | None = None


Writer = Callable[[Source, Path], Loaded]  # writes a file or a folder of this name


def example_ids(model: GPT, batch: int, length: int) -> Tensor:
    """Random token ids (batch, length) int64, always the same."""
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def largest_difference(model: GPT, exported: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Largest difference of any logit between the model and what was exported, at several shapes; infinite where shapes differ.

    And the largest that is allowed: float32 rounds large logits, such as GPT-2's of 100, more coarsely.
    """
    worst, largest, block = 0.0, 1.0, model.config.block_size
    for batch, length in ((1, 1), (3, min(17, block)), (1, block)):
        ids = example_ids(model, batch, length)
        expected, got = model(ids)[0], exported(ids)
        difference = (expected - got).abs().max().item() if expected.shape == got.shape else math.inf
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
        largest = max(largest, expected.abs().max().item())
    return worst, TOLERANCE * largest


@contextlib.contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """A folder inside `output` to write in, on the same disk, deleted at the end with what was not put in place."""
    path = temporary_path(output / "export")
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def put_in_place(written: Path, target: Path) -> None:
    """Give a verified file or folder its name; what had this name before is replaced. written: in a `workplace`."""
    if os.path.lexists(target):
        os.replace(target, written.with_name("former"))  # a folder can't be renamed over another
    os.replace(written, target)
    fsync_directory(target.parent)
