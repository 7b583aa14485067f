"""ONNX files as engines, run by onnxruntime: with the cache of keys and values that a file has, or without one.

`generation.shared_cache` has the engine for files of our own, which copies no cache.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from formats.export_record import model_sha256
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

    @functools.cached_property
    def session(self):
        return self.file.session()

    def features(self, idx: Tensor, kv_cache: None = None) -> Tensor:
        """idx (B, T) int64, every row the beginning of a text -> logits (B, T, V) float32."""
        feeds = {"input_ids": idx.numpy()}
        if self.file.cached:
            positions = np.broadcast_to(np.arange(idx.size(1)), idx.shape)
            feeds |= {"attention_mask": np.ones(idx.shape, np.int64), "position_ids": np.ascontiguousarray(positions)}
            feeds |= empty_cache(self.file, len(idx))
        with self.file.running():
            return torch.from_numpy(self.session.run(["logits"], feeds)[0])

    def head(self, features: Tensor) -> Tensor:
        return features

    @functools.cached_property
    def sha256(self) -> str:
        return model_sha256(self.file.path)


class OnnxEngine:
    """What the engines of ONNX files share, see `generation.engines.Engine`: how many tokens each row has. They compute in numpy, whose
    small operations cost less than torch's.

    Each adds how a text begins, `begin`, and goes on, `read`, what `cut` keeps, and which rows `choose` takes. threads: as OnnxFile.session
    has them.
    """

    def __init__(self, file: OnnxFile, threads: int | None = None):
        self.file, self.config, self.session = file, file.config, file.session(self.graph(file), threads)
        self.lengths, self.longest = np.zeros(0, np.int64), 0  # (B,), and the largest of them

    @staticmethod
    def graph(file: OnnxFile) -> bytes | None:
        """What is run instead of the file itself."""
        return None

    def prefill(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        self.lengths = np.full(len(ids), ids.size(1)) if lengths is None else lengths.numpy().astype(np.int64)
        self.longest = int(self.lengths.max())
        self.check_room(self.longest)
        return torch.from_numpy(self.begin(ids.numpy()[:, : self.longest]))

    def step(self, ids: Tensor) -> Tensor:
        count = ids.size(1)
        self.check_room(self.longest + count)
        logits = torch.from_numpy(self.read(ids.numpy()))
        self.lengths, self.longest = self.lengths + count, self.longest + count
        return logits

    def keep(self, length: int) -> None:
        if length > self.lengths.min() or self.longest > self.lengths.min():
            raise ValueError(f"{length} tokens can be kept only of rows that all have as many, or more")
        self.cut(length)
        self.lengths, self.longest = np.full_like(self.lengths, length), length

    def select(self, rows: Tensor) -> None:
        self.choose(rows.numpy())
        self.lengths = self.lengths[rows.numpy()]
        self.longest = int(self.lengths.max())

    def check_room(self, length: int) -> None:
        if length > self.config.block_size:
            raise ValueError(f"{length} tokens do not fit into block_size={self.config.block_size}; read the last part again")

    def positions(self, count: int) -> np.ndarray:
        """The positions of `count` further tokens of each row, (B, count)."""
        return self.lengths[:, None] + np.arange(count)


class RecomputingEngine(OnnxEngine):
    """For files without a cache: each step reads everything again. Rows stand left-aligned; no token looks at the padding behind them."""

    def __init__(self, file: OnnxFile, threads: int | None = None):
        super().__init__(file, threads)
        self.ids = np.zeros((0, 0), np.int64)  # (B, T)

    def logits(self, at: np.ndarray) -> np.ndarray:
        """Logits (B, T, V) at the positions (B, T)."""
        with self.file.running():
            logits = self.session.run(["logits"], {"input_ids": self.ids})[0]
        return logits[np.arange(len(at))[:, None], at]

    def begin(self, ids: np.ndarray) -> np.ndarray:
        self.ids = ids
        return self.logits(self.lengths[:, None] - 1)[:, 0]

    def read(self, ids: np.ndarray) -> np.ndarray:
        at = self.positions(ids.shape[1])
        width = self.longest + ids.shape[1]
        self.ids = np.pad(self.ids, ((0, 0), (0, max(0, width - self.ids.shape[1]))))[:, :width]
        np.put_along_axis(self.ids, at, ids, axis=1)
        return self.logits(at)

    def cut(self, length: int) -> None:
        self.ids = self.ids[:, :length]

    def choose(self, rows: np.ndarray) -> None:
        self.ids = self.ids[rows]


class CachedEngine(OnnxEngine):
    """For files with a cache, as Optimum's users run them: rows of different lengths are padded on their left, and hidden by a mask.

    Each step makes a new cache, one token longer, from the one before.
    """

    def __init__(self, file: OnnxFile, threads: int | None = None):
        super().__init__(file, threads)
        self.cache = {}  # name of an input -> keys or values, (B, K, S, D)
        self.mask = np.zeros((0, 0), np.int64)  # (B, S), 0 for padding

    def run(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits (B, T, V) of ids (B, T) at their positions, behind the cache; then they are in the cache."""
        binding = self.session.io_binding()
        for name, value in (("input_ids", ids), ("attention_mask", self.mask), ("position_ids", positions)):
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in ("logits", *cache_names(self.file, PRESENT)):
            binding.bind_output(name)
        with self.file.running():
            self.session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        self.cache = dict(zip(cache_names(self.file, PAST), present, strict=True))
        return logits.numpy()

    def begin(self, ids: np.ndarray) -> np.ndarray:
        positions = np.arange(self.longest) - (self.longest - self.lengths)[:, None]  # negative in the padding
        self.mask = (positions >= 0).astype(np.int64)
        self.hold(empty_cache(self.file, len(ids)))
        positions = np.maximum(positions, 0)
        return self.run(np.take_along_axis(ids, positions, axis=1), positions)[:, -1]

    def read(self, ids: np.ndarray) -> np.ndarray:
        self.mask = np.concatenate((self.mask, np.ones_like(ids)), axis=1)
        return self.run(ids, self.positions(ids.shape[1]))

    def hold(self, cache: dict[str, np.ndarray]) -> None:
        from onnxruntime import OrtValue

        self.cache = {name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for name, value in cache.items()}

    def cut(self, length: int) -> None:
        start = self.mask.shape[1] - self.longest  # padding that rows of the same length may have in common
        self.hold({name: value.numpy()[:, :, start : start + length] for name, value in self.cache.items()})
        self.mask = self.mask[:, start : start + length]

    def choose(self, rows: np.ndarray) -> None:
        self.hold({name: value.numpy()[rows] for name, value in self.cache.items()})
        self.mask = self.mask[rows]
