"""Measures: how well a model predicts held-out text. The same arithmetic serves training, evaluation and comparison.

A split is a row of documents, each with an EOT at its end. Each document is scored from its own beginning, with one EOT as context, so that
no score depends on a neighbour; each token, EOTs included, is predicted exactly once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import GPTConfig
from formats.tokenizer import TextTokenizer

ROWS = 512  # of logits held at once
TOP = 5
BINS = 20  # of confidence, equally wide
FEWEST_DOCUMENTS = 10  # for an interval; the bootstrap of fewer says little
RESAMPLES = 2000


class Network(Protocol):
    """What can be measured: our own network, or a file that another runtime runs."""

    config: GPTConfig
    device: torch.device

    def features(self, idx: Tensor, kv_cache: None = None) -> Tensor:
        """What the output layer reads, (B, T, C), at every position of idx (B, T) int64, each row the beginning of a text."""

    def head(self, features: Tensor) -> Tensor:
        """Features (N, C) -> logits (N, V)."""


@dataclass(frozen=True)
class Score:
    """What a model makes of a row of tokens.

    nats: (tokens,) float64, minus the log-probability of each token. hits: (tokens,) bool, whether it was the most probable one.
    top: (tokens,) bool, whether it was among the five most probable ones. positions: (block_size, 2) float64, number and summed nats of the
    tokens with so many tokens between the window's first and them. calibration: (BINS, 3) float64, by the probability of the most probable
    token: number of predictions, sum of these probabilities, number of hits.
    """

    nats: np.ndarray
    hits: np.ndarray
    top: np.ndarray
    positions: np.ndarray
    calibration: np.ndarray

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the most probable token (Guo et al. 2017, "On Calibration of Modern Neural Networks")."""
        count, confidence, hits = self.calibration.T
        return float(np.abs(confidence - hits).sum() / count.sum())


def document_ends(tokens: np.ndarray, eot_id: int) -> np.ndarray:
    """Where each document ends, behind its EOT, (documents,) int64. What follows the last EOT is a document too."""
    ends = np.flatnonzero(tokens == eot_id) + 1
    return ends if len(ends) and ends[-1] == len(tokens) else np.append(ends, len(tokens))


def per_document(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sums of values (tokens,) over the documents that end at `ends` (documents,), none of them empty; (documents,)."""
    return np.add.reduceat(values, np.concatenate(([0], ends[:-1])))


def strided_windows(n: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows (start, end, first) over n predictions: positions start..end are read, those from `first` on are scored, each once."""
    first = 0
    while first < n:
        end = min(n, first + (block_size if first == 0 else stride))
        yield max(0, first + stride - block_size), end, first
        first = end


def windows_by_length(ends: np.ndarray, block_size: int, stride: int) -> np.ndarray:
    """Windows (n, 3) int64 as in `strided_windows` over documents that end at `ends`, none across a boundary, the longest first."""
    starts = np.concatenate(([0], ends[:-1]))
    short = ends - starts <= block_size
    spans = [np.stack((starts, ends, starts), axis=1)[short]]
    for start, end in zip(starts[~short].tolist(), ends[~short].tolist()):
        spans.append(np.array([*strided_windows(end - start, block_size, stride)]) + start)
    spans = np.concatenate(spans)
    return spans[np.argsort(spans[:, 0] - spans[:, 1], kind="stable")]


def batches_of_windows(spans: np.ndarray, room: int) -> Iterator[np.ndarray]:
    """Consecutive windows (n, 3), sorted by length, in batches that take at most `room` tokens with padding, at least one window each."""
    while len(spans):
        rows = max(1, room // int(spans[0, 1] - spans[0, 0]))
        yield spans[:rows]
        spans = spans[rows:]


def predictions(model: Network, features: Tensor, targets: Tensor) -> np.ndarray:
    """Features (n, C) and the tokens that follow (n,) -> (4, n) float64: nats, hit, among the top five, the highest probability."""
    parts = []
    for rows, target in zip(features.split(ROWS), targets.split(ROWS), strict=True):
        logits = model.head(rows).float()
        chosen = logits.gather(1, target[:, None])
        total = logits.logsumexp(dim=-1, keepdim=True)
        highest, best = logits.max(dim=-1, keepdim=True)
        among_top = (logits >= chosen).sum(dim=-1) <= TOP  # a token that ties with many isn't among them
        parts.append(torch.stack([(total - chosen)[:, 0], best[:, 0] == target, among_top, (highest - total).exp()[:, 0]]))
    return torch.cat(parts, dim=1).cpu().double().numpy()  # not every device has float64


@torch.inference_mode()
def score_tokens(
    model: Network,
    tokens: np.ndarray,
    eot_id: int,
    batch_size: int = 32,
    stride: int | None = None,
    dtype: torch.dtype = torch.float32,
    stop: Callable[[], bool] = lambda: False,
    bar: str | None = None,
    stream: bool = False,
) -> Score | None:
    """Predict each of `tokens` (n,) once, in windows of at most block_size, non-overlapping or `stride` apart (more context, more time).

    Windows of about the same length are read together, as many tokens as batch_size windows of block_size. stream: windows run across
    documents as if all were one. dtype: precision of the forward pass. stop: asked before each batch; if it says so, None is returned.
    bar: name of a progress bar.
    """
    block_size, device, n = model.config.block_size, model.device, len(tokens)
    ends = np.array([n]) if stream else document_ends(tokens, eot_id)
    spans = windows_by_length(ends, block_size, stride or block_size)
    targets = np.asarray(tokens).astype(np.int64)
    inputs = np.concatenate(([eot_id], targets[:-1]))  # a document's first token follows the EOT of the one before
    nats, hits, top = np.empty(n), np.empty(n, bool), np.empty(n, bool)
    positions, calibration = np.zeros((block_size, 2)), np.zeros((BINS, 3))
    with tqdm(total=n, desc=bar, unit="token", unit_scale=True, disable=None if bar else True, leave=False) as progress:
        for batch in batches_of_windows(spans, batch_size * block_size):
            if stop():
                return None
            start, end, first = batch.T
            at = start[:, None] + np.arange(end[0] - start[0])  # (B, T), the first window is the longest
            scored = (at >= first[:, None]) & (at < end[:, None])
            x = torch.from_numpy(inputs[np.minimum(at, n - 1)]).to(device)  # behind a window's end anything may stand: nothing looks there
            rows = torch.from_numpy(scored).to(device)
            y = torch.from_numpy(targets[at[scored]]).to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                found = predictions(model, model.features(x)[rows], y)
            index, position = at[scored], (at - start[:, None])[scored]
            nats[index], hits[index], top[index] = found[0], found[1] > 0, found[2] > 0
            positions += np.stack([np.bincount(position, weights, block_size) for weights in (None, found[0])], axis=1)
            which = np.minimum(np.nan_to_num(found[3]) * BINS, BINS - 1).astype(np.int64)
            calibration += np.stack([np.bincount(which, weights, BINS) for weights in (None, found[3], found[1])], axis=1)
            progress.update(len(index))
    return Score(nats, hits, top, positions, calibration)


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


def ratio_interval(values: np.ndarray, weights: np.ndarray) -> tuple[float, float] | None:
    """95% interval of sum(values) / sum(weights) over documents, both (documents,); None for fewer than ten with a weight above 0.

    The percentile bootstrap over documents (Efron and Tibshirani 1993): how the ratio would vary with other documents of the same kind.
    """
    from scipy.stats import bootstrap  # takes half a second to import

    if np.count_nonzero(weights) < FEWEST_DOCUMENTS:
        return None

    def ratio(values: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
        return values.sum(axis=axis) / np.maximum(weights.sum(axis=axis), 1)  # 0 where only empty documents were drawn

    batch = max(1, 2**22 // len(values))
    options = {"paired": True, "vectorized": True, "method": "percentile", "n_resamples": RESAMPLES, "batch": batch}
    low, high = bootstrap((values, weights), ratio, rng=np.random.default_rng(0), **options).confidence_interval
    return float(low), float(high)


def why_no_bits_per_byte(tokenizer: TextTokenizer, tokens: np.ndarray) -> str | None:
    """None where bits per byte are meaningful, else the reason why not."""
    if tokenizer.loss_reason is not None:
        return tokenizer.loss_reason
    unknown = int((tokens == tokenizer.unknown_id).sum()) if tokenizer.unknown_id is not None else 0
    return f"{unknown} tokens are unknown to the tokenizer" if unknown else None


def text_bytes(tokenizer: TextTokenizer, tokens: np.ndarray) -> int:
    """UTF-8 bytes of the documents that `tokens` spell, EOTs not counted."""
    return len(tokenizer.decode(tokens.tolist()).encode())
