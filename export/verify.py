"""What all formats share: how one is described, and the comparison that a file must pass before it gets its name."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from utils import fsync_directory

import numpy as np
import torch
from torch import Tensor, nn

from formats.export_record import RECORD, read_record
from formats.tokenizer import TextTokenizer
from models import GPT

TOLERANCE = 1e-4  # largest difference of a logit that still counts as the same model
WORKPLACE = ".export.tmp"  # where files are written before they are verified; one left there by a killed export is deleted

LoadedModel = Callable[[np.ndarray], np.ndarray]  # token ids (B, T) int64 -> logits (B, T, V) float32


@dataclass(frozen=True)
class Format:
    """A kind of export. write: writes a file or folder of that kind, loads it again and returns the loaded function."""

    name: str
    file_name: str  # {checkpoint} stands for the checkpoint's name without its ending
    write: Callable[[GPT, TextTokenizer, Path], LoadedModel]

    def target(self, checkpoint: Path, output: Path) -> Path:
        """Where the export of a checkpoint goes."""
        return output / self.file_name.format(checkpoint=checkpoint.stem)


class LogitsOnly(nn.Module):
    """The network as a function of token ids alone: (B, T) int64 -> (B, T, V)."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)[0]


def example_ids(model: GPT, batch: int, length: int) -> Tensor:
    """Random token ids (batch, length) int64, always the same."""
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def largest_difference(model: GPT, exported: LoadedModel) -> float:
    """Largest difference of any logit between the model and what was exported, at several shapes; infinite where shapes differ."""
    worst, block = 0.0, model.config.block_size
    for batch, length in ((1, 1), (3, min(17, block)), (1, block)):
        ids = example_ids(model, batch, length)
        expected, got = model(ids)[0].numpy(), exported(ids.numpy())
        difference = np.abs(expected - got).max() if expected.shape == got.shape else np.inf
        worst = max(worst, float(difference) if np.isfinite(difference) else np.inf)
    return worst


def remove(path: Path) -> None:
    """Delete a file, folder or link if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    remove(path)
    path.mkdir()
    try:
        yield path
    finally:
        remove(path)


def put_in_place(written: Path, target: Path) -> None:
    """Give a verified file or folder its name; what had this name before is replaced."""
    if target.is_dir():
        remove(target)  # a folder can't be renamed over another
    os.replace(written, target)
    fsync_directory(target.parent)
