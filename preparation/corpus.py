"""The documents that are to be prepared: sources, their splits and shares, samples of them. Doesn't import torch."""

import hashlib
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from utils import notice, parse_weighted

import numpy as np
import xxhash

from preparation import sample_corpus
from preparation.cleaning import Cleaning, KeySet, skeleton
from preparation.sources import Format, HubSplit, TextFile, find_files, open_dataset

POSITION_BELOW = 100  # fewer documents than this are split by position
BYTES_PER_TOKEN = 4  # of an ordinary tokenizer, where only a limit in tokens is known


# ---------------------------------------------------------------- splits


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
    cuts = [0]
    for share in (1 - val_fraction - test_fraction, 1 - test_fraction):
        wanted = round(len(text) * share)
        space = max(text.find("\n", wanted), text.find(" ", wanted) if text.find("\n", wanted) < 0 else -1)
        cuts.append(max(cuts[-1], space + 1 if space >= 0 else wanted))
    for split, start, end in zip(("train", "val", "test"), cuts, [*cuts[1:], len(text)]):
        if text[start:end].strip():
            yield split, text[start:end]


@dataclass(frozen=True)
class Splitting:
    """How documents without a given split are divided. rule: hash or position; the fraction of a split that is given is 0."""

    rule: str
    seed: int
    val_fraction: float
    test_fraction: float

    def parts(self, text: str) -> Iterator[tuple[str, str]]:
        """(split, text) of a whole document, or of its parts."""
        if self.rule == "position":
            yield from split_by_position(text, self.val_fraction, self.test_fraction)
        else:
            yield split_by_hash(text, self.seed, self.val_fraction, self.test_fraction), text


# ---------------------------------------------------------------- sources


@dataclass(frozen=True)
class Limits:
    """What each split may get at most."""

    documents: int | None = None
    bytes: int | None = None
    tokens: int | None = None

    def share(self, weights: list[Fraction], i: int) -> "Limits":
        """The part of source i of several that are mixed by weight; the parts add up to the whole."""
        before, upto = (sum(weights[:n], Fraction(0)) / sum(weights) for n in (i, i + 1))
        parts = (
            None if value is None else round(value * upto) - round(value * before) for value in (self.documents, self.bytes, self.tokens)
        )
        return Limits(*parts)

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.documents, self.bytes, self.tokens))


@dataclass(frozen=True)
class Group:
    """Sources that are read as one. divide: the split of all their documents, or how they are divided; weight: their share of a mixture."""

    divide: str | Splitting
    sources: list[TextFile]
    weight: Fraction | None = None

    def documents(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.sources)

    @property
    def split(self) -> str | None:
        """The split of all documents, None where they are divided."""
        return self.divide if isinstance(self.divide, str) else None

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources[:3]) + ("..." if len(self.sources) > 3 else "")


class Corpus:
    """All sources with their splits, in a fixed order; can be read several times.

    inputs, datasets: what is divided, each PATH or PATH:WEIGHT; given: files of whole splits; splitting: how the rest is to be divided.
    groups: given splits first, so that what they hold can be kept out of train; then one group, or one for each weight.
    Raises ValueError, FileNotFoundError for sources that can't be had or stand in two splits.
    """

    def __init__(
        self,
        inputs: tuple[str, ...],
        datasets: tuple[str, ...],
        given: dict[str, tuple[str, ...]],
        form: Format,
        splitting: Splitting,
        cleaning: Cleaning,
        limits: Limits,
        dataset_config: str | None = None,
    ):
        self.cleaning, self.limits, self.seed = cleaning, limits, splitting.seed
        whole: dict[str, list[TextFile]] = {split: list(find_files(names, form)) for split, names in given.items()}
        divided: list[tuple[list[TextFile], Fraction | None]] = []
        for text in datasets:
            name, weight = parse_weighted(text)
            splits = open_dataset(name, dataset_config, form)
            divided.append(([splits["train"]], weight))
            for split, theirs in (("val", "validation"), ("test", "test")):
                if theirs in splits and not given[split]:
                    whole[split].append(splits[theirs])
        for text in inputs:
            name, weight = parse_weighted(text)
            divided.append((find_files([name], form), weight))
        self.weights = [weight for _, weight in divided if weight is not None]
        if self.weights and len(self.weights) < len(divided):
            raise ValueError("give a weight to every --input and --dataset or to none, e.g. --input a.txt:0.7 b.txt:0.3")
        if not self.weights:
            once = {source.path.resolve() if source.path else source.name: source for sources, _ in divided for source in sources}
            divided = [(list(once.values()), None)]
        files = [
            source.path.resolve()
            for sources in (*whole.values(), *(sources for sources, _ in divided))
            for source in sources
            if source.path
        ]
        twice = sorted(str(path) for path, count in Counter(files).items() if count > 1)
        if twice:
            raise ValueError(f"{', '.join(twice)} would be in two splits or shares; leave it out of one")
        fractions = [0.0 if whole["val"] else splitting.val_fraction, 0.0 if whole["test"] else splitting.test_fraction]
        self.groups = [Group(split, sources) for split, sources in whole.items() if sources]
        for sources, weight in divided:
            rule = self._rule(splitting.rule, sources, any(fractions))
            self.groups.append(Group(Splitting(rule, splitting.seed, *fractions), sources, weight))

    def _rule(self, asked: str, sources: list[TextFile], needed: bool) -> str:
        enough = POSITION_BELOW if self.limits.documents is None else min(POSITION_BELOW, self.limits.documents)
        few = enough < POSITION_BELOW or sum(1 for _ in itertools.islice(itertools.chain.from_iterable(sources), enough)) < enough
        if asked == "auto" and few and needed:
            which = f"{sources[0].name}: " if self.weights else ""
            notice(
                f"{which}fewer than {POSITION_BELOW} documents: each is split by position, its end for val and test; "
                "--split hash keeps them whole"
            )
        return asked if asked != "auto" else "position" if few else "hash"

    def limits_of(self, group: Group) -> Limits:
        """What each split may get from a group."""
        if not self.weights or group.split is not None:
            return self.limits
        mixed = [other for other in self.groups if other.split is None]
        return self.limits.share(self.weights, mixed.index(group))

    def _read(self, source: Iterable[str], normalize: Callable[[str], str]) -> Iterator[str]:
        """Documents as they are kept."""
        for text in source:
            text = normalize(self.cleaning.clean(text, Counter()))
            if self.cleaning.reason_to_drop(text) is None:
                yield text

    def training_texts(self, normalize: Callable[[str], str], train_bytes: int) -> Iterator[str]:
        """Training documents for a tokenizer to learn from, about train_bytes: a sample by content of all files, of datasets the beginning.

        normalize: what the tokenizer will do to texts. Doesn't depend on the order of the files.
        """
        held_out = KeySet()
        for group in self.groups:
            if group.split is None:
                yield from self._sample(group, normalize, train_bytes, held_out).texts()
            else:
                documents = itertools.islice(self._read(group.documents(), normalize), self.limits.documents)
                held_out.add(np.array([document_key(text, self.seed) for text in documents], np.uint64))

    def _sample(self, group: Group, normalize: Callable[[str], str], train_bytes: int, held_out: KeySet) -> "DocumentSample":
        if self.weights:
            train_bytes = int(train_bytes * group.weight / sum(self.weights))
        sample, limits = DocumentSample(train_bytes), self.limits_of(group)
        most_documents = limits.documents or math.inf
        most_bytes = min(limits.bytes or math.inf, BYTES_PER_TOKEN * (limits.tokens or math.inf))
        documents = size = 0
        for source in group.sources:
            before = size
            for text in self._read(source, normalize):
                key = document_key(text, self.seed)
                if len(held_out) and held_out.contains(np.array([key], np.uint64))[0]:
                    continue
                for part in (part for split, part in group.divide.parts(text) if split == "train"):
                    data = part.encode()
                    sample.add(key, data)
                    documents, size = documents + 1, size + len(data)
                if documents >= most_documents or size >= most_bytes:
                    return sample
                if isinstance(source, HubSplit) and size - before >= train_bytes:
                    break  # reading on would download all of it twice
        return sample

    def held_out_texts(self, normalize: Callable[[str], str], limit: int) -> Iterator[str]:
        """Documents (or parts) that go to val, until they have `limit` characters."""
        for group in self.groups:
            for text in self._read(group.documents(), normalize):
                parts = [(group.split, text)] if group.split is not None else group.divide.parts(text)
                for part in (part for split, part in parts if split == "val"):
                    yield part[:limit]
                    limit -= len(part)
                    if limit <= 0:
                        return

    def describe(self) -> dict:
        sources = []
        for group in self.groups:
            extra = {"split": group.split} if group.split else {}
            if self.weights and group.split is None:
                extra = {"rule": group.divide.rule, "weight": str(group.weight)}
            sources += [source.describe() | extra for source in group.sources]
        divide = self.groups[-1].divide
        rules = sorted({group.divide.rule for group in self.groups if group.split is None})
        split = {"rule": " and ".join(rules), "val_fraction": divide.val_fraction, "test_fraction": divide.test_fraction}
        return {"sources": sources, "split": split}

    @property
    def total_bytes(self) -> int | None:
        """Bytes of text, None where that isn't known before reading."""
        sources = [source for group in self.groups for source in group.sources]
        known = not any(source.path is None or source.compressed or source.path.suffix == ".parquet" for source in sources)
        return sum(source.size for source in sources) if known else None


class SampleStories:
    """One split of the sample corpus as documents. bits: of each story under the grammar, known after reading."""

    replaced = cut = 0

    def __init__(self, grammar, seed: int, split: str, count: int):
        self.grammar, self.seed, self.split, self.count = grammar, seed, split, count
        self.name = f"sample:{split}"

    def __iter__(self) -> Iterator[str]:
        self.bits: list[float] = []
        for text, log2p in sample_corpus.stories(self.grammar, self.seed, self.split, self.count):
            self.bits.append(-log2p)
            yield text


class SampleCorpus:
    """The sample corpus: three independent seeded streams of stories, neither cleaned nor filtered, so that their entropy stays known."""

    cleaning, limits, weights = Cleaning(deduplicate=False), Limits(), ()

    def __init__(self, seed: int, sample_stories: int):
        grammar = sample_corpus.load_grammar()
        self.stories = {"train": sample_stories, "val": sample_stories // 20, "test": sample_stories // 20}
        self.groups = [Group(split, [SampleStories(grammar, seed, split, count)]) for split, count in self.stories.items()]
        self.seed = seed
        self.total_bytes = 770 * sum(self.stories.values())  # for the progress bar: the mean length of a story

    def limits_of(self, group: Group) -> Limits:
        return self.limits

    def training_texts(self, normalize: Callable[[str], str], train_bytes: int) -> Iterator[str]:
        """The first training stories, train_bytes characters in all: each story is drawn independently."""
        for text in self.groups[0].documents():
            yield text[:train_bytes]
            train_bytes -= len(text)
            if train_bytes <= 0:
                return

    def bits(self) -> dict[str, list[float]]:
        """Bits of each story of a split under the grammar that wrote it."""
        return {group.split: group.sources[0].bits for group in self.groups}

    def describe(self) -> dict:
        digest = hashlib.sha256(sample_corpus.GRAMMAR_PATH.read_bytes()).hexdigest()
        return {
            "sources": [{"name": "data/sample_grammar.json", "bytes": sample_corpus.GRAMMAR_PATH.stat().st_size, "sha256": digest}],
            "split": {"rule": "sample"} | self.stories,
            "sample": {"grammar_sha256": digest},
        }


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
