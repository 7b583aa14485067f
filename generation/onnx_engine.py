"""ONNX files as engines, run by onnxruntime: with the cache of keys and values that a file has, or without one.

`generation.shared_cache` has the engine for files of our own, which copies no cache.
"""

import functools
import hashlib

import numpy as np
import torch
from torch import Tensor

from formats.onnx_file import PAST, PRESENT, OnnxFile

LOGITS = 2**28  # that fit into memory at once


def cache_names(file: OnnxFile, which: str) -> list[str]:
    """The names of a file's caches, its inputs (PAST) or outputs (PRESENT)."""
    return [f"{which}.{layer}.{part}" for layer in range(file.config.n_layer) for part in ("key", "value")]


def empty_cache(file: OnnxFile, rows: int) -> dict[str, np.ndarray]:
    """Keys and values of no tokens, by the names of their inputs."""
    empty = np.zeros((rows, file.config.kv_heads, 0, file.config.head_dim), np.float32)
    return dict.fromkeys(cache_names(file, PAST), empty)


class OnnxNetwork:
    """A file as a network for evaluation: its features are logits already, and the output layer has nothing left to do."""

    def __init__(self, file: OnnxFile):
        self.file, self.config, self.device = file, file.config, torch.device("cpu")
        self.windows = max(1, LOGITS // (self.config.block_size * self.config.vocab_size))  # of block_size tokens, at once
        self.session = file.session()

    def features(self, idx: Tensor, kv_cache: None = None) -> Tensor:
        """idx (B, T) int64, every row the beginning of a text -> logits (B, T, V) float32."""
        feeds = {"input_ids": idx.numpy()}
        if self.file.cached:
            positions = np.broadcast_to(np.arange(idx.size(1)), idx.shape)
            feeds |= {"attention_mask": np.ones(idx.shape, np.int64), "position_ids": np.ascontiguousarray(positions)}
            feeds |= empty_cache(self.file, len(idx))
        return torch.from_numpy(self.session.run(["logits"], feeds)[0])

    def head(self, features: Tensor) -> Tensor:
        return features

    @functools.cached_property
    def sha256(self) -> str:
        with open(self.file.path, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()


class OnnxEngine:
    """What the engines of ONNX files share, see `generation.engines.Engine`: how many tokens each row has.

    Each adds how a text begins, `begin`, and goes on, `read`, what `cut` keeps, and which rows `choose` takes. threads: as OnnxFile.session
    has them.
    """

    def __init__(self, file: OnnxFile, threads: int | None = None):
        self.file, self.config, self.session = file, file.config, file.session(self.graph(file), threads)
        self.lengths = torch.zeros(0, dtype=torch.int64)  # (B,)

    @staticmethod
    def graph(file: OnnxFile) -> bytes | None:
        """What is run instead of the file itself."""
        return None

    def prefill(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        self.lengths = torch.full((len(ids),), ids.size(1)) if lengths is None else lengths.cpu()
        ids = ids.cpu()[:, : int(self.lengths.max())]
        self.check_room(ids.size(1))
        return self.begin(ids)

    def step(self, ids: Tensor) -> Tensor:
        self.check_room(int(self.lengths.max()) + ids.size(1))
        logits = self.read(ids.cpu())
        self.lengths = self.lengths + ids.size(1)
        return logits

    def keep(self, length: int) -> None:
        if not (self.lengths == self.lengths[0]).all() or length > self.lengths[0]:
            raise ValueError(f"{length} tokens can be kept only of rows that all have as many, or more")
        self.cut(length)
        self.lengths = torch.full_like(self.lengths, length)

    def select(self, rows: Tensor) -> None:
        rows = rows.cpu()
        self.choose(rows)
        self.lengths = self.lengths[rows]

    def check_room(self, length: int) -> None:
        if length > self.config.block_size:
            raise ValueError(f"{length} tokens do not fit into block_size={self.config.block_size}; read the last part again")

    def positions(self, count: int) -> Tensor:
        """The positions of `count` further tokens of each row, (B, count)."""
        return self.lengths[:, None] + torch.arange(count)


class RecomputingEngine(OnnxEngine):
    """For files without a cache: each step reads everything again. Rows stand left-aligned; no token looks at the padding behind them."""

    def __init__(self, file: OnnxFile, threads: int | None = None):
        super().__init__(file, threads)
        self.ids = torch.zeros(0, 0, dtype=torch.int64)  # (B, T)

    def logits(self, at: Tensor) -> Tensor:
        """Logits (B, T, V) at the positions (B, T)."""
        logits = torch.from_numpy(self.session.run(["logits"], {"input_ids": self.ids.numpy()})[0])
        return logits[torch.arange(len(at))[:, None], at]

    def begin(self, ids: Tensor) -> Tensor:
        self.ids = ids
        return self.logits(self.lengths[:, None] - 1)[:, 0]

    def read(self, ids: Tensor) -> Tensor:
        at = self.positions(ids.size(1))
        width = int(at.max()) + 1
        padding = self.ids.new_zeros(len(ids), max(0, width - self.ids.size(1)))
        self.ids = torch.cat((self.ids, padding), dim=1)[:, :width].scatter(1, at, ids)
        return self.logits(at)

    def cut(self, length: int) -> None:
        self.ids = self.ids[:, :length]

    def choose(self, rows: Tensor) -> None:
        self.ids = self.ids[rows]


class CachedEngine(OnnxEngine):
    """For files with a cache, as Optimum's users run them: rows of different lengths are padded on their left, and hidden by a mask.

    Each step makes a new cache, one token longer, from the one before.
    """

    def __init__(self, file: OnnxFile, threads: int | None = None):
        super().__init__(file, threads)
        self.cache = {}  # name of an input -> keys or values, (B, K, S, D)
        self.mask = torch.zeros(0, 0, dtype=torch.int64)  # (B, S), 0 for padding

    def run(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, T, V) of ids (B, T) at their positions, behind the cache; then they are in the cache."""
        binding = self.session.io_binding()
        feeds = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions}
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value.contiguous().numpy())
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in ("logits", *cache_names(self.file, PRESENT)):
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        self.cache = dict(zip(cache_names(self.file, PAST), present, strict=True))
        return torch.from_numpy(logits.numpy())

    def begin(self, ids: Tensor) -> Tensor:
        padding = (ids.size(1) - self.lengths)[:, None]
        positions = torch.arange(ids.size(1)) - padding  # negative in the padding
        self.mask = (positions >= 0).long()
        self.hold(empty_cache(self.file, len(ids)))
        positions = positions.clamp(min=0)
        return self.run(ids.gather(1, positions), positions)[:, -1]

    def read(self, ids: Tensor) -> Tensor:
        self.mask = torch.cat((self.mask, torch.ones_like(ids)), dim=1)
        return self.run(ids, self.positions(ids.size(1)))

    def hold(self, cache: dict[str, np.ndarray]) -> None:
        from onnxruntime import OrtValue

        self.cache = {name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for name, value in cache.items()}

    def cut(self, length: int) -> None:
        start = self.mask.size(1) - int(self.lengths[0])  # padding that rows of the same length may have in common
        self.hold({name: value.numpy()[:, :, start : start + length] for name, value in self.cache.items()})
        self.mask = self.mask[:, start : start + length]

    def choose(self, rows: Tensor) -> None:
        self.hold({name: value.numpy()[rows.numpy()] for name, value in self.cache.items()})
        self.mask = self.mask[rows]
