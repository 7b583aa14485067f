"""Which split a document, or a part of it, belongs to: a function of its content and the seed. Doesn't import torch."""

from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from preparation.cleaning import skeleton


def document_key(text: str, seed: int) -> int:
    """64 bits that stand for a document's exact content, in a way that depends on the seed."""
    return xxhash.xxh3_64_intdigest(text.encode(), seed % 2**64)


def split_by_hash(text: str, seed: int, val_fraction: float, test_fraction: float) -> str:
    """The split of a document, from its content and the seed alone: the same wherever, and in whatever order, it is found.

    The content is its `skeleton`, so that variants of a dataset that differ in cleaning have the same documents in each split.
    """
    share = xxhash.xxh3_64_intdigest(skeleton(text), ~seed % 2**64) / 2**64  # not document_key's seed: a text may be its own skeleton
    return "val" if share < val_fraction else "test" if share < val_fraction + test_fraction else "train"


def split_by_position(text: str, val_fraction: float, test_fraction: float) -> Iterator[tuple[str, str]]:
    """A document's beginning for train, its end for val and test, cut at line ends where it has lines, else between words."""
    start = 0
    for split, share in (("train", 1 - val_fraction - test_fraction), ("val", 1 - test_fraction), ("test", 1)):
        wanted = round(len(text) * share)
        end = max(start, (text.find("\n", wanted) + 1) or (text.find(" ", wanted) + 1) or wanted)
        if text[start:end].strip():
            yield split, text[start:end]
        start = end


@dataclass(frozen=True)
class Splitting:
    """How documents are divided. rule: hash, position, auto (hash or position, by their number), or the split that all of them belong to.

    The fraction of a split that is given elsewhere is 0.
    """

    rule: str
    seed: int = 0
    val_fraction: float = 0.0
    test_fraction: float = 0.0

    def parts(self, text: str) -> Iterator[tuple[str, str]]:
        """(split, text) of a whole document, or of its parts."""
        if self.rule == "position":
            yield from split_by_position(text, self.val_fraction, self.test_fraction)
        elif self.rule == "hash":
            yield split_by_hash(text, self.seed, self.val_fraction, self.test_fraction), text
        else:
            yield self.rule, text
