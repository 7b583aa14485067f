"""Which windows an optimizer step reads in which process, and how they get to the device: pure functions of the step's number."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from formats.data_directory import TrainingData


def step_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Seed of dropout: a pure function, so that nothing else that draws random numbers changes a training."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{micro_step}/{rank}".encode(), digest_size=8).digest(), "big") >> 1


def samples_of_step(step: int, windows: int, rank: int = 0, processes: int = 1) -> np.ndarray:
    """The sample numbers (windows / processes,) of an optimizer step in one process: every so many, so that all together read in order."""
    return step * windows + np.arange(rank, windows, processes)


class Batches:
    """Windows of the training data as tensors on the device.

    resident: keep all tokens on the device and gather there (on a GPU with room for them), so that a step sends it a few numbers only.
    """

    def __init__(self, data: TrainingData, device: str, resident: bool | None = None):
        self.data, self.device = data, device
        if resident is None:
            resident = device.startswith("cuda") and sum(source.nbytes for source in data.sources) < torch.cuda.mem_get_info()[0] // 4
        self.tokens: Tensor | None = None
        if resident:  # as int16, since torch can't index uint16 everywhere
            self.tokens = torch.cat([torch.from_numpy(np.array(source).view(np.int16)).to(device) for source in data.sources])
            self.first = np.cumsum([0] + [len(source) for source in data.sources])  # where each source begins
            self.span = torch.arange(data.block_size + 1, device=device)

    def __call__(self, index: np.ndarray) -> Tensor:
        """Samples by their numbers (B,) -> (B, block_size + 1) int64."""
        if self.tokens is None:
            return self._send(torch.from_numpy(self.data.batch(index).astype(np.int64)))
        source, start = self.data.locate(index)
        start = self._send(torch.from_numpy(self.first[source] + start))
        return self.tokens[start[:, None] + self.span].long() & 0xFFFF

    def _send(self, values: Tensor) -> Tensor:
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.startswith("cuda") else values.to(self.device)
