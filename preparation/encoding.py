"""Documents -> token ids, by this process or by several others, in the order of the documents. Doesn't import torch."""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from formats.data_directory import SPLITS
from formats.tokenizer import TextTokenizer
from preparation.cleaning import Cleaning
from preparation.corpus import Group, Splitting, document_key

BATCH_CHARACTERS = 2**20


@dataclass(frozen=True)
class Encoded:
    """Some documents in order, cleaned, divided and encoded. A part is a document, or a piece of one that is split by position.

    keys: of each document (documents,) uint64. Of each part: document, its index in keys; split, its index in SPLITS; tokens, EOT included;
    bytes, UTF-8 of its text: all (parts,) int64. ids: of all parts one after the other, uint16. counts: what cleaning did.
    """

    keys: np.ndarray
    document: np.ndarray
    split: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    ids: np.ndarray
    counts: Counter

    def counting(self, more: Counter) -> "Encoded":
        """The same with further counts."""
        return dataclasses.replace(self, counts=self.counts + more)


@dataclass(frozen=True)
class Recipe:
    """All that turns a text into token ids of a split, as plain values for other processes."""

    tokenizer_json: str
    cleaning: Cleaning
    seed: int


def encode_batch(recipe: Recipe, tokenizer: TextTokenizer, divide: str | Splitting, texts: list[str]) -> Encoded:
    """Texts of one source. divide: the split they belong to, or how they are to be divided."""
    counts, keys, document, split, parts = Counter(), [], [], [], []
    clean, drop, normalize, seed = recipe.cleaning.clean, recipe.cleaning.reason_to_drop, tokenizer.normalize, recipe.seed
    for text in texts:
        text = normalize(clean(text, counts))
        reason = drop(text)
        if reason is not None:
            counts[reason] += 1
            continue
        for odd, name in (("\0", "contain NUL"), ("\r", "contain CR")):
            if odd in text:
                counts[name] += 1
        for name, part in [(divide, text)] if isinstance(divide, str) else divide.parts(text):
            document.append(len(keys))
            split.append(SPLITS.index(name))
            parts.append(part)
        keys.append(document_key(text, seed))
    sizes = [len(part) if part.isascii() else len(part.encode()) for part in parts]
    ids, tokens = tokenizer.encode_documents(parts)
    whole = (np.array(values, np.int64) for values in (document, split, tokens, sizes))
    return Encoded(np.array(keys, np.uint64), *whole, ids, +counts)


_worker: tuple[Recipe, TextTokenizer] | None = None  # a forked process finds its parent's


def _start_worker(recipe: Recipe) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()  # a killed parent can't end us
    if _worker is None or _worker[0] is not recipe:
        _worker = recipe, TextTokenizer(recipe.tokenizer_json)


def _encode_in_worker(divide: str | Splitting, texts: list[str]) -> Encoded:
    return encode_batch(*_worker, divide, texts)


class DocumentEncoder:
    """Encodes documents in `workers` processes, or in this one if it is one. A context manager."""

    def __init__(self, recipe: Recipe, tokenizer: TextTokenizer, workers: int):
        self.recipe, self.tokenizer, self.workers = recipe, tokenizer, workers
        self.pool = None
        if workers > 1:
            global _worker
            _worker = recipe, tokenizer
            tokenizer.encode("")
            self.pool = concurrent.futures.ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(recipe,))

    def __enter__(self) -> "DocumentEncoder":
        return self

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def encode(self, group: Group, most: int | None, wanted: Callable[[], float]) -> Iterator[Encoded]:
        """All documents of a group encoded, in order, in batches of `most` documents at most, which don't depend on the number of workers.

        Reads only a few batches ahead, and no further than for the number of documents that `wanted()` says can be used.
        """
        if self.pool is None:
            for batch, counts in batches(group, most):
                yield encode_batch(self.recipe, self.tokenizer, group.divide, batch).counting(counts)
            return
        pending: collections.deque[tuple[int, Counter, concurrent.futures.Future]] = collections.deque()
        try:
            for batch, counts in batches(group, most):
                pending.append((len(batch), counts, self.pool.submit(_encode_in_worker, group.divide, batch)))
                while pending and (len(pending) > 2 * self.workers or sum(documents for documents, *_ in pending) >= wanted()):
                    _, counts, future = pending.popleft()
                    yield future.result().counting(counts)
            while pending:
                _, counts, future = pending.popleft()
                yield future.result().counting(counts)
        except BrokenProcessPool:
            raise ValueError(f"one of the {self.workers} processes that encode was killed; is memory short? Try --num_workers 1") from None
        finally:
            for *_, future in pending:
                future.cancel()


def batches(group: Group, most: int | None) -> Iterator[tuple[list[str], Counter]]:
    """A group's documents in lists of about a million characters, and what reading them had to replace or cut."""

    def told() -> Counter:
        replaced, cut = (sum(getattr(source, name) for source in group.sources) for name in ("replaced", "cut"))
        return Counter({"bytes that are not UTF-8": replaced, "cut into documents for their length": cut})

    for source in group.sources:
        source.replaced = source.cut = 0  # what an earlier reading counted
    batch: list[str] = []
    size, before = 0, Counter()
    for document in group.documents():
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS or len(batch) == most:
            now = told()
            yield batch, now - before
            batch, size, before = [], 0, now
    if batch:
        yield batch, told() - before
