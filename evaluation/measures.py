"""Measures: how well a model predicts a split. The same arithmetic serves training, evaluation and comparison.

A split is one stream of tokens with one EOT as context before it. Each of its tokens, EOTs included, is predicted exactly once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from formats.data_directory import DataDirectory
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
    block_size: int,
    device: str = "cpu",
    batch_size: int = 32,
    stride: int | None = None,
    autocast: torch.dtype | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], object] = lambda n: None,
) -> Score | None:
    """Predict each of `tokens` (n,) once, in windows of block_size, non-overlapping or `stride` apart (more context, more time).

    autocast: precision of the forward pass, None for that of the weights. stop: asked before each batch; if it says so, None is returned.
    progress: called with the number of tokens of each batch.
    """
    stream = np.concatenate(([eot_id], tokens)).astype(np.int64)
    nats, hits = np.empty(len(tokens)), np.empty(len(tokens), bool)
    spans = list(strided_windows(len(tokens), block_size, stride or block_size))
    kind = torch.device(device).type
    while spans:
        if stop():
            return None
        length = spans[0][1] - spans[0][0]
        batch = [span for span in spans[:batch_size] if span[1] - span[0] == length]
        spans = spans[len(batch) :]
        x = torch.from_numpy(np.stack([stream[start:end] for start, end, _ in batch])).to(device)
        y = torch.from_numpy(np.stack([stream[start + 1 : end + 1] for start, end, _ in batch])).to(device)
        batch_nats, batch_hits = [], []
        with torch.autocast(kind, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            features = model.features(x).flatten(0, 1)  # (B T, C)
            for rows, targets in zip(features.split(ROWS), y.flatten().split(ROWS), strict=True):
                logits = F.linear(rows, model.wte.weight).float()
                batch_nats.append(F.cross_entropy(logits, targets, reduction="none"))
                batch_hits.append(logits.argmax(dim=-1) == targets)
        batch_nats, batch_hits = (torch.cat(parts).view_as(y).cpu().numpy() for parts in (batch_nats, batch_hits))
        for row, (start, end, first) in enumerate(batch):
            nats[first:end], hits[first:end] = batch_nats[row, first - start :], batch_hits[row, first - start :]
        progress(sum(end - first for _, end, first in batch))
    return Score(nats, hits)


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


@dataclass(frozen=True)
class Prefix:
    """The fixed beginning of a split on which training validates. tokens: (n,) uint16; n_bytes: their text, None if it can't be counted;
    floor_bits: what a perfect model of the sample corpus needs for the same documents, None for other data."""

    tokens: np.ndarray
    n_bytes: int | None
    floor_bits: float | None


def split_prefix(data: DataDirectory, split: str, limit: int) -> Prefix:
    """The whole split if it has at most `limit` tokens, else its beginning, up to the last document that ends before the limit.

    A first document longer than the limit is cut, between characters.
    """
    tokens = data.tokens(split)
    whole = len(tokens) <= limit
    if not whole:
        ends = np.flatnonzero(tokens[:limit] == data.tokenizer.eot_id)
        cut = int(ends[-1]) + 1 if len(ends) else limit
        while not len(ends) and cut > 1 and data.tokenizer.decode(tokens[:cut].tolist()).endswith("\ufffd"):
            cut -= 1
        tokens = tokens[:cut]
    tokens = np.asarray(tokens)
    n_bytes = None
    if why_no_bits_per_byte(data.tokenizer, tokens) is None:
        n_bytes = data.meta["splits"][split]["bytes"] if whole and data.meta else text_bytes(data.tokenizer, tokens)
    floor = data.floor(split)
    documents = int((tokens == data.tokenizer.eot_id).sum())
    whole_documents = len(tokens) > 0 and tokens[-1] == data.tokenizer.eot_id
    return Prefix(tokens, n_bytes, sum(floor[:documents]) if floor is not None and whole_documents else None)
