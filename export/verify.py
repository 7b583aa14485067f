"""The comparison that an export must pass before it gets its name, and where it is written until then."""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from utils import fsync_directory

import torch
from torch import Tensor

from formats.export_record import RECORD, read_record
from models import GPT

TOLERANCE = 1e-4  # how far logits of the same model may differ, in units of the largest one where that is above 1
WORKPLACE = ".export.tmp"  # where files are written before they are verified; one left there by a killed export is deleted

LoadedModel = Callable[[Tensor], Tensor]  # token ids (B, T) int64 -> logits (B, T, V) float32


def example_ids(model: GPT, batch: int, length: int) -> Tensor:
    """Random token ids (batch, length) int64, always the same."""
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def largest_difference(model: GPT, exported: LoadedModel) -> tuple[float, float]:
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


def check_target(target: Path, checkpoint: Path) -> None:
    """Raises ValueError where an export would delete its own source, or a folder that no export of ours wrote."""
    if checkpoint.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target} is what would be exported, and writing there would delete it; choose another --output")
    if target.is_dir() and target.name not in read_record(target.parent):
        raise ValueError(f"{target} is not in {RECORD}, so it is no export to replace; move it away or choose another --output")


@contextlib.contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """A folder inside `output` to write in, on the same disk, deleted at the end with what was not put in place."""
    path = output / WORKPLACE
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)


def put_in_place(written: Path, target: Path) -> None:
    """Give a verified file or folder its name; what had this name before is replaced."""
    if target.is_symlink():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)  # a folder can't be renamed over another
    os.replace(written, target)
    fsync_directory(target.parent)
