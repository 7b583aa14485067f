"""Our own network as an engine, on any device that torch knows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.fast_step import FastStep
from models import GPT, KVCache


class TorchEngine:
    """See `generation.engines.Engine`. Rows of different lengths stand left-aligned; their padding is hidden, then overwritten."""

    def __init__(self, model: GPT):
        self.model, self.config = model, model.config
        self.cache = self.new_cache(1)
        self.fast: FastStep | None = None  # made for the first single token on a CPU

    def new_cache(self, rows: int) -> KVCache:
        return KVCache(self.config, rows, self.model.device, self.model.wte.weight.dtype)

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.model.wte.weight).float().cpu()

    @torch.inference_mode()
    def prefill(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        self.cache = self.new_cache(len(ids))
        features = self.model.features(ids.to(self.model.device), self.cache)  # (B, T, C)
        if lengths is None:
            return self.logits(features[:, -1])
        self.cache.set_lengths(lengths)
        return self.logits(features[torch.arange(len(ids)), lengths - 1])

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        if ids.size(1) == 1 and self.model.wte.weight.dtype == torch.float32 and self.model.device.type == "cpu":
            self.fast = self.fast or FastStep(self.model)
            return self.fast(ids[:, 0], self.cache)[:, None]
        return self.logits(self.model.features(ids.to(self.model.device), self.cache))

    def keep(self, length: int) -> None:
        if self.cache.lengths is not None or length > self.cache.length:
            raise ValueError(f"{length} tokens can be kept only of rows that all have as many, or more")
        self.cache.length = length

    @torch.inference_mode()
    def select(self, rows: Tensor) -> None:
        cache, rows = self.cache, rows.to(self.model.device)
        cache.k, cache.v = cache.k[:, rows], cache.v[:, rows]
        if cache.lengths is not None:
            cache.set_lengths(cache.lengths[rows])
