"""Logits -> the next token: what makes a token more or less probable, what may be drawn at all, and the draw.

Order and results are those of the processors of `transformers`: repetition penalty, no repeated n-grams, temperature, top-k, top-p, min-p.
Where tokens tie, exactly k of them pass top-k, those with the lowest ids, and the fewest that reach p pass top-p; there, all that tie with
the k-th pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from utils import Checked, Count, NonNegative

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

GREEDY = 1e-6  # temperatures below take the most probable token
Share = Annotated[float, Ge(1e-9), Le(1)]


@dataclass(frozen=True)
class Sampling(Checked):
    """What decides which token is drawn, beside the model and the random numbers."""

    temperature: NonNegative = 0.8
    """Below 1 the probable becomes more probable; 0 always takes the most probable token."""
    top_k: Count | None = None
    """Draw from the k most probable tokens only."""
    top_p: Share | None = None
    """Draw from the fewest tokens whose probabilities add up to p."""
    min_p: Share | None = None
    """Draw from tokens with at least this share of the largest probability."""
    repetition_penalty: Annotated[float, Gt(0), Le(1e6)] = 1.0
    """Above 1, tokens that stand in the prompt or the text so far become less probable."""
    no_repeat_ngram: Count | None = None
    """Never write the same n tokens in a row twice, the prompt's included."""

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY


def penalised(logits: Tensor, texts: Sequence[list[int]], penalty: float) -> Tensor:
    """Scores of tokens that a text holds, divided by the penalty where positive, else multiplied (Keskar et al. 2019, CTRL, 4.1)."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, text in zip(seen, texts, strict=True):
        row[text] = True
    return logits.where(~seen, (logits / penalty).where(logits > 0, logits * penalty))


def without_repeated_ngrams(logits: Tensor, texts: Sequence[list[int]], n: int) -> Tensor:
    """-inf for each token that would repeat n tokens of its text. A row that nothing would be left of stays as it is."""
    logits = logits.clone()
    for row, text in zip(logits, texts, strict=True):
        last, banned = text[len(text) - n + 1 :], row.clone()
        banned[[text[i + n - 1] for i in range(len(text) - n + 1) if text[i : i + n - 1] == last]] = -torch.inf
        if banned.isfinite().any():
            row.copy_(banned)
    return logits


def filtered(scores: Tensor, sampling: Sampling) -> Tensor:
    """-inf for what the filters don't let through. Each sees the distribution that the one before it left."""
    if sampling.top_k is not None:
        largest, order = scores.topk(min(sampling.top_k, scores.size(-1)), dim=-1)
        scores = torch.full_like(scores, -torch.inf).scatter(-1, order, largest)
    if sampling.top_p is not None:  # Holtzman et al. 2019, nucleus sampling
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        scores = torch.full_like(scores, -torch.inf).scatter(-1, order, ordered.where(before < sampling.top_p, -torch.inf))
    if sampling.min_p is not None:  # Nguyen et al. 2024
        relative = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        scores = scores.where(relative >= sampling.min_p, -torch.inf)
    return scores


def process(logits: Tensor, texts: Sequence[list[int]], sampling: Sampling, never: Sequence[int] = ()) -> Tensor:
    """Logits (B, V) float32 behind texts -> scores (B, V) whose softmax is drawn from; of the greedy choice, the largest is taken.

    texts: all ids of each text so far, the prompt's included. never: ids that are not to be drawn.
    """
    if never:
        logits = logits.index_fill(-1, torch.tensor(never), -torch.inf)
    if sampling.repetition_penalty != 1:
        logits = penalised(logits, texts, sampling.repetition_penalty)
    if sampling.no_repeat_ngram is not None:
        logits = without_repeated_ngrams(logits, texts, sampling.no_repeat_ngram)
    if sampling.greedy:
        return logits
    return filtered((logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature, sampling)


def noise(seed: int, number: int, size: int) -> Tensor:
    """Independent numbers (size,) float64 from the exponential distribution: a pure function of a text's seed and its token's number."""
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=[seed, number])).standard_exponential(size))


def draw(scores: Tensor, seeds: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """One token for each row of scores (B, V), (B,) int64: the one with the largest probability / noise, which follows the softmax.

    Each token has its own random number, so two computations of the same scores that differ by a rounding error draw the same token,
    except with a probability of the size of that error (Daliri, Musco and Suresh 2025, "Coupling without Communication"). With one
    number for all, as many borders between tokens as the vocabulary has would have to hold.
    """
    exponential = torch.stack([noise(seed, number, scores.size(-1)) for seed, number in zip(seeds, numbers, strict=True)])
    return (scores.softmax(dim=-1) / exponential).argmax(dim=-1)
