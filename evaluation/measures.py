"""Measures: how well a model predicts a split. The same arithmetic serves training, evaluation and comparison.

A split is one stream of tokens with one EOT as context before it. Each of its tokens, EOTs included, is predicted exactly once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from formats.tokenizer import TextTokenizer
from models import GPT

ROWS = 512  # of logits held at once


@dataclass(frozen=True)
class Score:
    """What a model makes of a stream of tokens.

    nats: (tokens,) float64, minus the log-probability of each token. hits: (tokens,) bool, whether it was the most probable one.
    """

    nats: np.ndarray
    hits: np.ndarray

    def per_document(self, tokens: np.ndarray, eot_id: int) -> np.ndarray:
        """Nats of each document, its EOT included, (documents,) float64; what follows the last EOT is left out."""
        ends = np.flatnonzero(tokens == eot_id) + 1
        return np.add.reduceat(self.nats[: ends[-1]], np.concatenate(([0], ends[:-1]))) if len(ends) else np.empty(0)


def strided_windows(n: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows (start, end, first) over n predictions: positions start..end are read, those from `first` on are scored, each once."""
    first = 0
    while first < n:
        end = min(n, first + (block_size if first == 0 else stride))
        yield max(0, first + stride - block_size), end, first
        first = end


@torch.inference_mode()
def score_tokens(
    model: GPT,
    tokens: np.ndarray,
    eot_id: int,
    batch_size: int = 32,
    stride: int | None = None,
    dtype: torch.dtype = torch.float32,
    stop: Callable[[], bool] = lambda: False,
    bar: str | None = None,
) -> Score | None:
    """Predict each of `tokens` (n,) once, in windows of block_size, non-overlapping or `stride` apart (more context, more time).

    dtype: precision of the forward pass. stop: asked before each batch; if it says so, None is returned. bar: name of a progress bar.
    """
    block_size, device = model.config.block_size, model.device
    stream = np.concatenate(([eot_id], tokens)).astype(np.int64)
    nats, hits = np.empty(len(tokens)), np.empty(len(tokens), bool)
    spans = list(strided_windows(len(tokens), block_size, stride or block_size))
    progress = tqdm(total=len(tokens), desc=bar, unit="token", unit_scale=True, disable=None if bar else True, leave=False)
    while spans:
        if stop():
            return None
        length = spans[0][1] - spans[0][0]
        batch = [span for span in spans[:batch_size] if span[1] - span[0] == length]
        spans = spans[len(batch) :]
        x = torch.from_numpy(np.stack([stream[start:end] for start, end, _ in batch])).to(device)
        y = torch.from_numpy(np.stack([stream[start + 1 : end + 1] for start, end, _ in batch])).to(device)
        batch_nats, batch_hits = [], []
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            features = model.features(x).flatten(0, 1)  # (B T, C)
            for rows, targets in zip(features.split(ROWS), y.flatten().split(ROWS), strict=True):
                logits = F.linear(rows, model.wte.weight).float()
                batch_nats.append(F.cross_entropy(logits, targets, reduction="none"))
                batch_hits.append(logits.argmax(dim=-1) == targets)
        batch_nats, batch_hits = (torch.cat(parts).view_as(y).cpu().numpy() for parts in (batch_nats, batch_hits))
        for row, (start, end, first) in enumerate(batch):
            nats[first:end], hits[first:end] = batch_nats[row, first - start :], batch_hits[row, first - start :]
        progress.update(sum(end - first for _, end, first in batch))
    progress.close()
    return Score(nats, hits)


def check_finite(score: Score, name: str | Path) -> None:
    """Raise ValueError where a model, which `name` holds, gives no probability; weights too large for float32 can do that."""
    if not np.isfinite(score.nats).all():
        raise ValueError(f"the model of {name} computes numbers that are not finite; its weights are broken, take another one")


def summarize(score: Score, n_bytes: int | None) -> dict[str, float | None]:
    """Loss (nats per token), perplexity, token accuracy, and bits per byte of text (None without n_bytes)."""
    loss = float(score.nats.sum()) / len(score.nats)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # JSON has no infinity
        "accuracy": float(score.hits.mean()),
        "bits_per_byte": float(score.nats.sum()) / math.log(2) / n_bytes if n_bytes else None,
    }


def why_no_bits_per_byte(tokenizer: TextTokenizer, tokens: np.ndarray) -> str | None:
    """None where bits per byte are meaningful, else the reason why not."""
    if tokenizer.loss_reason is not None:
        return tokenizer.loss_reason
    unknown = int((tokens == tokenizer.unknown_id).sum()) if tokenizer.unknown_id is not None else 0
    return f"{unknown} tokens are unknown to the tokenizer" if unknown else None


def text_bytes(tokenizer: TextTokenizer, tokens: np.ndarray) -> int:
    """UTF-8 bytes of the documents that `tokens` spell, EOTs not counted."""
    return len(tokenizer.decode(tokens.tolist()).encode())
