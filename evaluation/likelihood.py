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
from torch import Tensor
from tqdm import tqdm

from evaluation.measures import ROWS, Network
from models import GPT, KVCache

TAILS = 4  # what windows don't share is read in batches smaller by this: their lengths differ more, and padding costs as much as text
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


def pick(model: Network, features: Tensor, rows: list[int], targets: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability (n,) float64 of each target, predicted at its row of features (N, C), and whether it is the most probable token.

    Logits are computed for the rows asked for only, each once.
    """
    needed, at = torch.tensor(rows, device=model.device).unique(return_inverse=True)
    wanted = torch.tensor(targets, device=model.device)
    nats, hits = torch.empty(len(rows), dtype=torch.float64), torch.empty(len(rows), dtype=torch.bool)
    for start in range(0, len(needed), ROWS):
        logits = model.head(features[needed[start : start + ROWS]]).float()
        here = (at >= start) & (at < start + ROWS)
        row, target = at[here] - start, wanted[here]
        here = here.cpu()
        nats[here] = (logits[row, target] - logits.logsumexp(dim=-1)[row]).cpu().double()
        hits[here] = (logits.argmax(dim=-1)[row] == target).cpu()
    return nats.numpy(), hits.numpy()


class WindowScorer:
    """Adds up what the windows of requests predict. nats: (N,) float64, log-probability so far. greedy: (N,) bool."""

    def __init__(self, model: Network, requests: int):
        self.model = model
        self.nats, self.greedy = np.zeros(requests), np.ones(requests, bool)

    def add(self, features: Tensor, parts: list[tuple[Window, int, int, int]]) -> None:
        """parts: window, row of features (N, C) that its position 0 has or would have, and the positions begin to end that predict."""
        spots = [(zero + i, window.ids[i + 1], window.request) for window, zero, begin, end in parts for i in range(begin, end)]
        if spots:
            rows, targets, requests = zip(*spots)
            nats, hits = pick(self.model, features, rows, targets)
            np.add.at(self.nats, [*requests], nats)
            np.logical_and.at(self.greedy, [*requests], hits)

    def cache(self, rows: int, length: int) -> KVCache:
        return KVCache(replace(self.model.config, block_size=length), rows, self.model.device, self.model.wte.weight.dtype)

    def score(self, groups: list[Group], tails: int) -> None:
        """Read what each group shares, then the rest of its windows, `tails` of them at once."""
        rest = [(g, window) for g, group in enumerate(groups) for window in group.windows if len(window.ids) - 1 > group.shared]
        prefixes = padded([group.windows[0].ids[: group.shared] for group in groups], self.model.device)
        width = prefixes.size(1)
        cache = self.cache(len(groups), width) if rest else None
        features = self.model.features(prefixes, cache).flatten(0, 1)
        members = [(g, group.shared, window) for g, group in enumerate(groups) for window in group.windows]
        self.add(features, [(w, g * width, w.first - 1, min(shared, len(w.ids) - 1)) for g, shared, w in members])
        rest.sort(key=lambda member: len(member[1].ids))  # rows of about the same length together
        for start in range(0, len(rest), tails):
            self.score_tails(groups, rest[start : start + tails], cache)

    def score_tails(self, groups: list[Group], rest: list[tuple[int, Window]], cache: KVCache) -> None:
        """Windows with their group's number go on behind what they share, whose keys and values are in the cache."""
        start = min(groups[g].shared for g, _ in rest)  # the others read the end of their prefix again, so that all rows begin together
        tails = padded([window.ids[start:-1] for _, window in rest], self.model.device)
        width, owners = tails.size(1), [g for g, _ in rest]
        own = self.cache(len(rest), start + width)
        for mine, theirs in ((own.k, cache.k), (own.v, cache.v)):
            mine[..., :start, :] = theirs[:, owners, :, :start]
        own.length = start
        features = self.model.features(tails, own).flatten(0, 1)
        self.add(features, [(w, r * width - start, max(w.first - 1, groups[g].shared), len(w.ids) - 1) for r, (g, w) in enumerate(rest)])


@torch.inference_mode()
def log_likelihoods(model: Network, requests: Sequence[Request], batch_size: int = 32, bar: str | None = None) -> Likelihoods:
    """The log-likelihood of each continuation behind its context. A context begins with the EOT, as every text did in training.

    batch_size: windows in one forward pass; changes the results by no more than the last bits of float32. bar: name of a progress bar.
    Raises ValueError for an empty context or continuation, and where the model computes numbers that are not finite.
    """
    if not all(context and continuation for context, continuation in requests):
        raise ValueError("a context and its continuation need at least one token each")
    scorer = WindowScorer(model, len(requests))
    tokens = np.array([len(continuation) for _, continuation in requests], np.int64)
    found = [window for i, request in enumerate(requests) for window in windows(i, *request, model.config.block_size)]
    with tqdm(total=len(found), desc=bar, unit="text", disable=None if bar else True, leave=False) as progress:
        # only our own network can go on behind what windows share
        groups = groups_of(found, batch_size) if isinstance(model, GPT) else [Group([window], len(window.ids) - 1) for window in found]
        for batch in batches_of(groups, batch_size):
            scorer.score(batch, max(1, batch_size // TAILS))
            progress.update(sum(len(group.windows) for group in batch))
    if not np.isfinite(scorer.nats).all():
        raise ValueError("the model computes numbers that are not finite; its weights are broken, take another one")
    return Likelihoods(scorer.nats, scorer.greedy, tokens)
