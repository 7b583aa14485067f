"""Which of the documents read are kept: none twice, none in train that is held out, no more than the limits allow. Doesn't import torch."""

import math
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from utils import notice

import numpy as np
from tqdm import tqdm

from formats.data_directory import SPLITS
from formats.tokenizer import TextTokenizer
from preparation.corpus import Corpus, Group, Limits
from preparation.encoding import DocumentEncoder, Encoded


class Kept(NamedTuple):
    """Documents for a split. ids: with an EOT behind each (tokens,) uint16; bytes: UTF-8 of their texts."""

    split: str
    ids: np.ndarray
    documents: int
    bytes: int


def _amounts(encoded: Encoded, mine: np.ndarray) -> np.ndarray:
    """Documents (1 each), bytes and tokens of the parts `mine` (parts,) bool: (n, 3) int64."""
    return np.stack([mine, encoded.bytes, encoded.tokens], 1)[mine]


class Selection:
    """Decides, in the order of reading, what is kept of each group.

    counts: what was dropped or changed, by reason. unknown: unknown tokens of each split. sizes: tokens of each document, in pieces.
    full: whether the group can give no more; taken: what it gave to train, in tokens.
    """

    def __init__(self, tokenizer: TextTokenizer, deduplicate: bool):
        self.tokenizer, self.deduplicate = tokenizer, deduplicate
        self.seen, self.held_out = KeySet(), KeySet()
        self.counts: Counter = Counter()
        self.unknown = dict.fromkeys(SPLITS, 0)
        self.sizes: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}

    def start(self, group: Group, limits: Limits) -> None:
        """What follows belongs to this group."""
        self.group, self.limits = group, limits
        self.room = dict.fromkeys(SPLITS, np.array(limits, float))  # what each split may still get: documents, bytes, tokens
        self.taken, self.full = 0, False

    def wanted(self) -> float:
        """How many more documents can be used at most."""
        return 0 if self.full else self.room[self.group.split or "train"][0]

    def keep(self, encoded: Encoded) -> list[Kept]:
        """What is kept of some documents. Only those are looked at that come before the split that ends the group is full."""
        keys, split = encoded.keys, self.group.split or "train"
        fresh = self.seen.fresh(keys) if self.deduplicate else np.ones(len(keys), bool)
        leaked = self.held_out.contains(keys) if self.group.split is None else np.zeros(len(keys), bool)
        ok = (fresh & ~leaked)[encoded.document]
        mine = ok & (encoded.split == SPLITS.index(split))
        filled = (_amounts(encoded, mine).cumsum(0) >= self.room[split]).any(1)
        self.full = bool(filled.any())
        used = int(encoded.document[mine][filled.argmax()]) + 1 if self.full else len(keys)
        keys, fresh, leaked = keys[:used], fresh[:used], leaked[:used]
        self.counts += encoded.counts
        self.counts["in val or test already"] += int(leaked.sum())
        self.counts["duplicates"] += int((~fresh & ~leaked).sum())
        if self.deduplicate:
            self.seen.add(keys[fresh])
        if self.group.split in ("val", "test"):
            self.held_out.add(keys[~self.held_out.contains(keys)])
        ok &= encoded.document < used
        of_splits = ((name, ok & (encoded.split == i)) for i, name in enumerate(SPLITS))
        return [self._fit(name, encoded, of_split) for name, of_split in of_splits if of_split.any()]

    def _fit(self, split: str, encoded: Encoded, mine: np.ndarray) -> Kept:
        """As much of the parts `mine` (parts,) bool as the split has room for."""
        amounts, room = _amounts(encoded, mine), self.room[split]
        ids = encoded.ids if mine.all() else encoded.ids[np.repeat(mine, encoded.tokens)]
        whole = int((amounts.cumsum(0) <= room).all(1).sum())
        documents, size, end = amounts[:whole].sum(0).tolist()
        kept = Kept(split, ids[:end], documents, size)
        room = room - (documents, size, end)
        if whole < len(amounts):
            if room.all():
                kept = self._with_beginning(kept, ids[end : end + int(amounts[whole, 2]) - 1], room)
            room = np.zeros(3)
        self.room[split] = room
        self.taken += len(kept.ids) * (split == "train")
        self.sizes[split].append(np.diff(np.flatnonzero(kept.ids == self.tokenizer.eot_id), prepend=-1).astype(np.int32))
        if self.tokenizer.unknown_id is not None:
            self.unknown[split] += int((kept.ids == self.tokenizer.unknown_id).sum())
        return kept

    def _with_beginning(self, kept: Kept, ids: np.ndarray, room: np.ndarray) -> Kept:
        """What is kept, and as much of a further document (ids, without EOT) as there is room for, cut between characters."""
        decode, (_, most_bytes, most_tokens) = self.tokenizer.decode, room
        ids = ids[: int(min(len(ids), most_tokens - 1))]
        if most_bytes < math.inf:
            ids = np.array(self.tokenizer.encode(decode(ids).encode()[: int(most_bytes)].decode(errors="ignore")), np.uint16)
            ids = ids[: int(min(len(ids), most_tokens - 1))]
        for _ in range(3):  # a character has four bytes at most, and U+FFFD may stand in the text itself
            if len(ids) and decode(ids[-4:]).endswith("\ufffd"):
                ids = ids[:-1]
        n_bytes = len(decode(ids).encode())
        if not n_bytes:
            return kept
        self.counts["cut off at the limit"] += 1
        ids = np.append(ids, np.uint16(self.tokenizer.eot_id))
        return Kept(kept.split, np.concatenate([kept.ids, ids]), kept.documents + 1, kept.bytes + n_bytes)

    def check_share(self) -> None:
        """A group that ended before its limit: an error where it should give a share of a mixture, else a notice."""
        limited = {f"--max_{name}": limit for name, limit in self.limits._asdict().items() if limit < math.inf}
        if self.full or self.group.split is not None or not limited:
            return
        if self.group.weight is not None:
            flag, limit = next(iter(limited.items()))
            advice = "lower it, or leave it out: then the mixture gets as large as the sources allow"
            raise ValueError(f"{self.group.name} ended before its share of {flag}, {limit:,}; {advice}")
        notice(f"the sources end before {' and '.join(limited)}: train has {self.taken:,} tokens")

    def document_sizes(self) -> dict[str, np.ndarray]:
        """Tokens of each document of each split, (documents,) int32."""
        return {split: np.concatenate(parts) for split, parts in self.sizes.items()}


def largest_mixture(corpus: Corpus, encoder: DocumentEncoder) -> Limits:
    """The most tokens that the sources give in the shares of their weights. Reads and encodes everything once."""
    selection, tokens = Selection(encoder.recipe.tokenizer, corpus.cleaning.deduplicate), []
    for group in tqdm(corpus.groups, desc="counting", unit="source", disable=None):
        selection.start(group, Limits())
        for encoded in encoder.encode(group, math.inf, selection.wanted):
            selection.keep(encoded)
        if group.split is None:
            tokens.append(selection.taken)
    shares = [weight / sum(corpus.weights) for weight in corpus.weights]
    return Limits(tokens=int(min(Fraction(count) / share for count, share in zip(tokens, shares))))


class KeySet:
    """A set of 64-bit keys in little memory: sorted runs, each at least twice as long as the next."""

    def __init__(self):
        self.runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which of the keys (n,) uint64 are in the set: (n,) bool."""
        found = np.zeros(len(keys), bool)
        for run in self.runs:
            at = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            found |= run[at] == keys
        return found

    def add(self, keys: np.ndarray) -> None:
        """Add keys (n,) uint64 that are not in the set yet; equal ones among them count once."""
        run = np.unique(keys)
        while self.runs and len(self.runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate([self.runs.pop(), run]), kind="stable")
        if len(run):
            self.runs.append(run)

    def fresh(self, keys: np.ndarray) -> np.ndarray:
        """Which keys (n,) uint64 are not in the set, the first of equal ones only: (n,) bool."""
        first = np.zeros(len(keys), bool)
        first[np.unique(keys, return_index=True)[1]] = True
        return first & ~self.contains(keys)
