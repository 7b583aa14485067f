"""Log-likelihoods of continuations given their contexts, in float32, summed in float64: what tasks are scored by.

Requests often begin alike: the choices of a question, the two sentences of a minimal pair. What they share is computed once, and its keys
and values serve them all.
"""

import os.path
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evaluation.measures import ROWS
from models import GPT, KVCache

Request = tuple[Sequence[int], Sequence[int]]  # ids of the context, at least one; ids of the continuation


class Likelihoods(NamedTuple):
    """Of N requests: nats (N,) float64, log-probability of the whole continuation; greedy (N,) bool, whether each of its tokens was the
    most probable one, so that greedy decoding writes it; tokens (N,) int64, its length."""

    nats: np.ndarray
    greedy: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Window:
    """What the model reads at once: ids[first:] are predicted, each from all ids before it. request: the number it belongs to."""

    ids: tuple[int, ...]
    first: int
    request: int


@dataclass
class Group:
    """Windows whose first `shared` ids are the same."""

    windows: list[Window]
    shared: int


def windows(request: int, context: Sequence[int], continuation: Sequence[int], block_size: int) -> Iterator[Window]:
    """The windows of a request. What is too long for one loses the beginning of its context.

    A continuation longer than block_size takes several, each of whose predictions ends a window as full as can be: as
    lm-evaluation-harness has it for rolling log-likelihoods (`get_rolling_token_windows` with a context of one token).
    """
    ids, length = (*context, *continuation), len(context)
    for first in range(length, len(ids), block_size):
        end = min(len(ids), first + block_size)
        begin = max(0, end - block_size - 1)
        yield Window(ids[begin:end], first - begin, request)


def groups_of(found: list[Window], largest: int) -> list[Group]:
    """Windows that have at least half of what they read in common, as groups of at most `largest`."""
    groups: list[Group] = []
    for window in sorted(found, key=lambda window: window.ids):
        read = window.ids[:-1]
        if groups and len(groups[-1].windows) < largest:
            group = groups[-1]
            shared = len(os.path.commonprefix((group.windows[0].ids[: group.shared], read)))
            if 2 * shared >= max(len(read), *(len(other.ids) - 1 for other in group.windows)):
                group.windows.append(window)
                group.shared = shared
                continue
        groups.append(Group([window], len(read)))
    return groups


def batches_of(groups: list[Group], batch_size: int) -> Iterator[list[Group]]:
    """Groups of about the same length together, the longest first, with at most batch_size windows in all."""
    batch: list[Group] = []
    for group in sorted(groups, key=lambda group: (group.shared, max(len(window.ids) for window in group.windows)), reverse=True):
        if batch and sum(len(other.windows) for other in batch) + len(group.windows) > batch_size:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def padded(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """Rows of ids as (rows, longest) int64, filled up behind their end, which changes nothing before it."""
    longest = max(map(len, rows))
    return torch.tensor([row + (0,) * (longest - len(row)) for row in rows], device=device)


def pick(model: GPT, features: Tensor, rows: list[int], targets: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability (n,) float64 of each target, predicted at its row of features (N, C), and whether it is the most probable token.

    Logits are computed for the rows asked for only, each once.
    """
    needed, at = torch.tensor(rows, device=model.device).unique(return_inverse=True)
    wanted = torch.tensor(targets, device=model.device)
    nats, hits = torch.empty(len(rows), dtype=torch.float64), torch.empty(len(rows), dtype=torch.bool)
    for start in range(0, len(needed), ROWS):
        logits = F.linear(features[needed[start : start + ROWS]], model.wte.weight).float()
        here = (at >= start) & (at < start + ROWS)
        row, target = at[here] - start, wanted[here]
        here = here.cpu()
        nats[here] = (logits[row, target] - logits.logsumexp(dim=-1)[row]).cpu().double()
        hits[here] = (logits.argmax(dim=-1)[row] == target).cpu()
    return nats.numpy(), hits.numpy()


def score_groups(model: GPT, groups: list[Group], nats: np.ndarray, greedy: np.ndarray) -> None:
    """Add to nats (N,) the log-probability of what the windows predict, and turn greedy (N,) off where a token isn't the most probable."""

    def add(features: Tensor, parts: list[tuple[Window, int, int, int]]) -> None:
        """parts: a window; what it reads from position `begin` to `end` stands in `features` from the row of position 0, `zero`, on."""
        spots = [(zero + i, window.ids[i + 1], window.request) for window, zero, begin, end in parts for i in range(begin, end)]
        if spots:
            rows, targets, requests = zip(*spots)
            values, hits = pick(model, features, rows, targets)
            np.add.at(nats, [*requests], values)
            np.logical_and.at(greedy, [*requests], hits)

    prefixes = padded([group.windows[0].ids[: group.shared] for group in groups], model.device)
    rest = [(g, window) for g, group in enumerate(groups) for window in group.windows if len(window.ids) - 1 > group.shared]
    cache = None
    if rest:
        cache = KVCache(replace(model.config, block_size=prefixes.size(1)), len(groups), model.device, model.wte.weight.dtype)
    features = model.features(prefixes, cache).flatten(0, 1)
    width = prefixes.size(1)
    add(features, [(w, g * width, w.first - 1, min(group.shared, len(w.ids) - 1)) for g, group in enumerate(groups) for w in group.windows])
    if not rest:
        return
    start = min(groups[g].shared for g, _ in rest)  # the others read the end of their prefix again, so that all rows go on at once
    tails = padded([window.ids[start:-1] for _, window in rest], model.device)
    owners = [g for g, _ in rest]
    own = KVCache(replace(model.config, block_size=start + tails.size(1)), len(rest), model.device, model.wte.weight.dtype)
    for mine, theirs in ((own.k, cache.k), (own.v, cache.v)):
        mine[..., :start, :] = theirs[:, owners, :, :start]
    own.length = start
    features, width = model.features(tails, own).flatten(0, 1), tails.size(1)
    add(features, [(w, r * width - start, max(w.first - 1, groups[g].shared), len(w.ids) - 1) for r, (g, w) in enumerate(rest)])


@torch.inference_mode()
def log_likelihoods(model: GPT, requests: Sequence[Request], batch_size: int = 32, bar: str | None = None) -> Likelihoods:
    """The log-likelihood of each continuation behind its context. A context begins with the EOT, as every text did in training.

    batch_size: windows in one forward pass; changes the results by no more than the last bits of float32. bar: name of a progress bar.
    Raises ValueError for an empty context or continuation, and where the model computes numbers that are not finite.
    """
    if not all(context and continuation for context, continuation in requests):
        raise ValueError("a context and its continuation need at least one token each")
    nats, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    tokens = np.array([len(continuation) for _, continuation in requests], np.int64)
    found = [window for i, request in enumerate(requests) for window in windows(i, *request, model.config.block_size)]
    with tqdm(total=len(found), desc=bar, unit="text", disable=None if bar else True, leave=False) as progress:
        for batch in batches_of(groups_of(found, batch_size), batch_size):
            score_groups(model, batch, nats, greedy)
            progress.update(sum(len(group.windows) for group in batch))
    if not np.isfinite(nats).all():
        raise ValueError("the model computes numbers that are not finite; its weights are broken, take another one")
    return Likelihoods(nats, greedy, tokens)
