"""The order in which training reads the data, a pure function of (seed, step), and how its windows get to the device."""

import math
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from formats.data_directory import DTYPE, DataDirectory


def samples_of_step(step: int, windows: int, rank: int = 0, processes: int = 1) -> np.ndarray:
    """The sample numbers (windows / processes,) of an optimizer step in one process: every so many, so that all together read in order."""
    return step * windows + np.arange(rank, windows, processes)


def epoch_starts(seed: int, source: int, epoch: int, n_tokens: int, block_size: int) -> np.ndarray:
    """Where each window of an epoch starts, (windows,) int64, in the order in which they are read.

    Windows lie block_size apart from an offset drawn per epoch, so that every token is a target at most once per epoch.
    RandomState's stream is frozen (NEP 19): the order stays the same with every numpy.
    """
    rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, source, epoch))))
    n = windows(n_tokens, block_size)
    offset = rng.randint(min(block_size, n_tokens - n * block_size))
    return offset + rng.permutation(n) * block_size


def windows(n_tokens: int, block_size: int) -> int:
    """Number of windows in an epoch, the same for every offset."""
    return max(1, n_tokens // block_size - 1)


def assign(index: np.ndarray, weights: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers -> (source, sample number within the source), so that each source gets its share to within a sample or two."""
    rest, total = index.copy(), sum(weights)
    source, within = np.full(len(index), len(weights) - 1), np.empty_like(index)
    undecided = np.ones(len(index), bool)
    for s, weight in enumerate(weights[:-1]):
        before = rest * weight // total
        mine = undecided & ((rest + 1) * weight // total > before)
        source[mine], within[mine] = s, before[mine]
        undecided &= ~mine
        rest, total = rest - before, total - weight
    within[undecided] = rest[undecided]
    return source, within


def whole_shares(weights: list[Fraction]) -> list[int]:
    """Weights as whole numbers in the same proportion, exact unless they would be too large for 64-bit arithmetic on sample numbers."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    shares = [int(weight * scale) for weight in weights]
    if sum(shares) > 10**6:
        shares = [max(1, round(weight / sum(weights) * 10**6)) for weight in weights]
    return [share // math.gcd(*shares) for share in shares]


class TrainingData:
    """Windows of the training splits of several directories, in an order that is a pure function of (seed, sample number).

    Without weights one epoch is every window of every directory once; with weights the directories are mixed in those shares.
    fingerprint: what identifies data and mixture, in plain values. Raises ValueError for different tokenizers, a directory named twice or
    without any whole window, or weights for some directories only.
    """

    def __init__(self, directories: list[DataDirectory], weights: list[Fraction | None], block_size: int, seed: int):
        first = directories[0]
        if len({directory.path.resolve() for directory in directories}) < len(directories):
            raise ValueError("a data directory is named twice; name each once, with a weight if one should count for more")
        for other in directories[1:]:
            other.check_tokenizer(first.tokenizer, first.name, first.name)
        self.mixed = weights[0] is not None
        if any((weight is not None) != self.mixed for weight in weights):
            raise ValueError("give a weight to every data directory or to none, e.g. --data_dir a:0.7 b:0.3")
        self.sources = [directory.tokens("train") for directory in directories]
        for directory, source in zip(directories, self.sources):
            if len(source) < block_size + 1:
                few = f"{len(source)} tokens, fewer than block_size + 1 = {block_size + 1}"
                raise ValueError(f"the train split of {directory.name} has {few}; give more text or a smaller --block_size")
        self.windows = [windows(len(source), block_size) for source in self.sources]
        self.weights = whole_shares(weights) if self.mixed else self.windows
        self.block_size = block_size
        self.orders = [  # kept for two epochs: a batch may run across an epoch's end
            lru_cache(2)(partial(epoch_starts, seed, s, n_tokens=len(source), block_size=block_size))
            for s, source in enumerate(self.sources)
        ]
        shares = map(str, self.weights) if self.mixed else [""] * len(directories)
        self.fingerprint = [{"share": share, **directory.fingerprint()} for directory, share in zip(directories, shares)]
        self.samples_per_epoch = sum(self.windows)

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers (n,) int64 -> the source of each sample and where its window starts there, both (n,) int64."""
        source, within = assign(index, self.weights)
        start = np.empty_like(index)
        epoch, at = np.divmod(within, np.asarray(self.windows)[source])
        for s, e in set(zip(source.tolist(), epoch.tolist())):
            mine = (source == s) & (epoch == e)
            start[mine] = self.orders[s](e)[at[mine]]
        return source, start

    def batch(self, index: np.ndarray) -> np.ndarray:
        """Samples by their numbers (n,) int64, as windows of block_size tokens and the one behind them: (n, block_size + 1) uint16."""
        source, start = self.locate(index)
        rows = np.empty((len(index), self.block_size + 1), DTYPE)
        for s in set(source.tolist()):
            mine = source == s
            rows[mine] = self.sources[s][start[mine, None] + np.arange(self.block_size + 1)]
        return rows


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
