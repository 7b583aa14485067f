"""The documents that are to be prepared: sources with their splits and shares, samples of them. Doesn't import torch."""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from utils import notice, parse_weighted

from tokenizers.normalizers import Normalizer

from formats.data_directory import SPLITS
from preparation.cleaning import Cleaning, Splitting, document_key
from preparation.hub import open_dataset
from preparation.sample_corpus import SampleStories, load_grammar
from preparation.sources import File, Format, Source, find_files

POSITION_BELOW = 100  # fewer documents than this are split by position
BYTES_PER_TOKEN = 4  # of an ordinary tokenizer, where only a limit in tokens is known
SAMPLE_CLEANING = Cleaning(deduplicate=False)


class Limits(NamedTuple):
    """What each split may get at most; infinite where there is no limit."""

    documents: float = math.inf
    bytes: float = math.inf
    tokens: float = math.inf


@dataclass(frozen=True)
class Group:
    """Sources that are read as one. weight: their share of a mixture."""

    sources: list[Source]
    splitting: Splitting
    weight: Fraction | None = None

    def documents(self) -> Iterator[str]:
        for source in self.sources:
            source.mended.clear()  # what an earlier reading counted
        yield from itertools.chain.from_iterable(self.sources)

    def mended(self) -> Counter:
        """What reading had to replace or cut so far."""
        return sum((source.mended for source in self.sources), Counter())

    @property
    def split(self) -> str | None:
        """The split of all documents, None where they are divided."""
        return self.splitting.rule if self.splitting.rule in SPLITS else None

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources[:3]) + ("..." if len(self.sources) > 3 else "")


def _first(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first texts, `limit` characters in all."""
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


@dataclass(frozen=True)
class Corpus:
    """All sources with their splits, in a fixed order; can be read several times. `open_corpus` makes one.

    groups: given splits first, so that what they hold can be kept out of train; then one group, or one for each weight.
    """

    groups: list[Group]
    cleaning: Cleaning
    limits: Limits
    seed: int

    @property
    def weights(self) -> list[Fraction]:
        """The shares of a mixture; empty where sources are simply read one after the other."""
        return [group.weight for group in self.groups if group.weight is not None]

    def limits_of(self, group: Group) -> Limits:
        """What each split may get from a group; the shares of a mixture add up to the whole."""
        if group.weight is None:
            return self.limits
        weights = self.weights
        at = len(weights) - len(self.groups) + self.groups.index(group)  # groups with a weight come last
        before, upto = (sum(weights[:n], Fraction(0)) / sum(weights) for n in (at, at + 1))
        return Limits(*(limit if limit == math.inf else round(limit * upto) - round(limit * before) for limit in self.limits))

    def _kept(self, source: Iterable[str], normalizer: Normalizer | None) -> Iterator[str]:
        for text in source:
            text = self.cleaning.clean(text, Counter())
            text = text if normalizer is None else normalizer.normalize_str(text)
            if self.cleaning.reason_to_drop(text) is None:
                yield text

    def training_texts(self, normalizer: Normalizer | None, train_bytes: int) -> Iterator[str]:
        """Training documents for a tokenizer to learn from, about train_bytes: a sample by content of all files, of datasets the beginning.

        normalizer: what the tokenizer will do to texts. Doesn't depend on the order of the files.
        """
        held_out: set[int] = set()
        for group in self.groups:
            if group.split is None:
                yield from self._sample(group, normalizer, train_bytes, held_out).texts()
            else:
                for number, text in enumerate(self._kept(group.documents(), normalizer), 1):
                    held_out.add(document_key(text, self.seed))
                    if number >= self.limits.documents:
                        break

    def _sample(self, group: Group, normalizer: Normalizer | None, train_bytes: int, held_out: set[int]) -> "DocumentSample":
        """A sample of what a group gives to train, without documents whose keys are held out."""
        if group.weight is not None:
            train_bytes = int(train_bytes * group.weight / sum(self.weights))
        sample, limits = DocumentSample(train_bytes), self.limits_of(group)
        most_bytes = min(limits.bytes, BYTES_PER_TOKEN * limits.tokens)
        documents = size = 0
        for source in group.sources:
            before = size
            for text in self._kept(source, normalizer):
                key = document_key(text, self.seed)
                if key in held_out:
                    continue
                for part in (part for split, part in group.splitting.parts(text) if split == "train"):
                    data = part.encode()
                    sample.add(key, data)
                    documents, size = documents + 1, size + len(data)
                if documents >= limits.documents or size >= most_bytes:
                    return sample
                if source.streamed and size - before >= train_bytes:
                    break  # reading on would download all of it twice
        return sample

    def held_out_texts(self, normalizer: Normalizer | None, limit: int) -> Iterator[str]:
        """Documents (or parts) that go to val, `limit` characters in all."""
        kept = ((group, text) for group in self.groups for text in self._kept(group.documents(), normalizer))
        yield from _first((part for group, text in kept for split, part in group.splitting.parts(text) if split == "val"), limit)

    def describe(self) -> dict:
        """What meta.json tells about sources and splits."""
        sources, splitting = [], self.groups[-1].splitting
        for group in self.groups:
            extra = {"split": group.split} if group.split else {}
            if group.weight is not None:
                extra = {"rule": group.splitting.rule, "weight": str(group.weight)}
            sources += [source.describe() | extra for source in group.sources]
        rules = sorted({group.splitting.rule for group in self.groups if group.split is None})
        split = {"rule": " and ".join(rules), "val_fraction": splitting.val_fraction, "test_fraction": splitting.test_fraction}
        return {"sources": sources, "split": split}

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return [source.path for group in self.groups for source in group.sources if isinstance(source, File)]

    @property
    def total_bytes(self) -> int | None:
        """Bytes of text, None where that isn't known before reading."""
        sizes = [source.text_bytes for group in self.groups for source in group.sources]
        return None if None in sizes else sum(sizes)


class SampleCorpus(Corpus):
    """The sample corpus: three independent seeded streams of stories, neither cleaned nor filtered, so that their entropy stays known."""

    def training_texts(self, normalizer: Normalizer | None, train_bytes: int) -> Iterator[str]:
        """The first training stories: each story is drawn independently."""
        yield from _first(self.groups[0].documents(), train_bytes)

    def describe(self) -> dict:
        stories = [group.sources[0] for group in self.groups]
        grammar = stories[0].describe()
        split = {"rule": "sample"} | {source.split: source.count for source in stories}
        return {"sources": [grammar], "split": split, "sample": {"grammar_sha256": grammar["sha256"]}}


def open_sample_corpus(seed: int, train_stories: int) -> SampleCorpus:
    """A twentieth of the training stories for val and for test."""
    grammar = load_grammar()
    counts = {"train": train_stories, "val": train_stories // 20, "test": train_stories // 20}
    groups = [Group([SampleStories(grammar, seed, split, count)], Splitting(split)) for split, count in counts.items()]
    return SampleCorpus(groups, SAMPLE_CLEANING, Limits(), seed)


def open_corpus(
    named: dict[str, tuple[str, ...]], form: Format, splitting: Splitting, cleaning: Cleaning, limits: Limits, config: str | None = None
) -> Corpus:
    """Find all sources. Raises ValueError, FileNotFoundError for those that can't be had, have no clear share or stand in two splits.

    named: "input" and "dataset", what is divided, each PATH or PATH:WEIGHT; "val" and "test", files of whole splits, taken instead of
    the datasets' own. splitting: how the rest is to be divided; config: of a dataset that has several.
    """
    whole: dict[str, list[Source]] = {split: find_files(named.get(split, ()), form) for split in ("val", "test")}
    divided, theirs = [], {"val": [], "test": []}
    for name, weight in map(parse_weighted, named.get("dataset", ())):
        splits = open_dataset(name, config, form)
        divided.append(Group([splits["train"]], splitting, weight))
        for split, its_name in (("val", "validation"), ("test", "test")):
            theirs[split] += [splits[its_name]] if its_name in splits else []
    divided += [Group(find_files([name], form), splitting, weight) for name, weight in map(parse_weighted, named["input"])]
    weighted = [group.weight is not None for group in divided]
    if any(weighted) and not all(weighted):
        raise ValueError("give a weight to every --input and --dataset or to none, e.g. --input a.txt:0.7 b.txt:0.3")
    if not any(weighted):
        divided = [Group(list({source.identity: source for group in divided for source in group.sources}.values()), splitting)]
    groups = [Group(sources or theirs[split], Splitting(split)) for split, sources in whole.items() if sources or theirs[split]]
    files = Counter(source.identity for group in groups + divided for source in group.sources if isinstance(source, File))
    twice = sorted(name for name, count in files.items() if count > 1)
    if twice:
        raise ValueError(f"{', '.join(twice)} would be in two splits or shares; leave it out of one")
    splitting = replace(splitting, **{f"{group.split}_fraction": 0.0 for group in groups})
    for group in divided:
        rule = choose_rule(group, splitting, limits.documents) if splitting.rule == "auto" else splitting.rule
        groups.append(replace(group, splitting=replace(splitting, rule=rule)))
    return Corpus(groups, cleaning, limits, splitting.seed)


def choose_rule(group: Group, splitting: Splitting, most_documents: float) -> str:
    """hash, or position for few documents, with a notice if anything is to be divided at all."""
    enough = min(POSITION_BELOW, most_documents)
    found = sum(1 for _ in itertools.islice(group.documents(), enough))
    if found == POSITION_BELOW:
        return "hash"
    if splitting.val_fraction or splitting.test_fraction:
        which = "" if group.weight is None else f"{group.sources[0].name}: "
        advice = "each is split by position, its end for val and test; prepare_data.py --split hash keeps them whole"
        notice(f"{which}fewer than {POSITION_BELOW} documents: {advice}")
    return "position"


class DocumentSample:
    """Documents chosen by their content, at most `limit` bytes of them: the same whatever the order in which they come."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.heap: list[tuple[int, bytes]] = []  # the document with the highest key on top
        self.keys: set[int] = set()
        self.end = 2**64  # keys from here on don't fit

    def add(self, key: int, data: bytes) -> None:
        """Offer a document of this key (document_key) and UTF-8 text; an equal one is taken once. A first one too long is cut."""
        if key in self.keys or key >= self.end:
            return
        self.keys.add(key)
        heapq.heappush(self.heap, (-key, data))
        self.size += len(data)
        while self.size > self.limit and len(self.heap) > 1:
            dropped, text = heapq.heappop(self.heap)
            self.end = -dropped
            self.keys.discard(self.end)
            self.size -= len(text)

    def texts(self) -> Iterator[str]:
        """The chosen documents by key."""
        for _, data in sorted(self.heap, reverse=True):
            yield data[: self.limit].decode(errors="ignore")
