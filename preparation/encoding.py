"""Documents -> token ids, by this process or by several others, in the order of the documents. Doesn't import torch."""

import collections
import concurrent.futures
import contextlib
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
from preparation.cleaning import Cleaning, Splitting, document_key
from preparation.corpus import Group

BATCH_CHARACTERS = 2**20


@dataclass(frozen=True)
class Encoded:
    """Some documents in order, cleaned, divided and encoded. A part is a document, or a piece of one that is split by position.

    keys: of each document (documents,) uint64. Of each part: document, its index in keys; split, its index in SPLITS; tokens, EOT included;
    bytes, UTF-8 of its text: all (parts,) int64. ids: of all parts one after the other, uint16. counts: what reading and cleaning did.
    """

    keys: np.ndarray
    document: np.ndarray
    split: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    ids: np.ndarray
    counts: Counter


@dataclass(frozen=True)
class Recipe:
    """All that turns a text into token ids of a split. A forked process has it at once, another one gets it pickled."""

    tokenizer: TextTokenizer
    cleaning: Cleaning
    seed: int

    def encode(self, splitting: Splitting, texts: list[str], mended: Counter) -> Encoded:
        """Texts of one group. mended: what reading them had to replace or cut."""
        counts, keys, document, split, parts = Counter(mended), [], [], [], []
        clean, drop, normalize = self.cleaning.clean, self.cleaning.reason_to_drop, self.tokenizer.normalize
        for text in texts:
            text = normalize(clean(text, counts))
            reason = drop(text)
            if reason is not None:
                counts[reason] += 1
                continue
            counts["contain NUL"] += "\0" in text
            counts["contain CR"] += "\r" in text
            for name, part in splitting.parts(text):
                document.append(len(keys))
                split.append(SPLITS.index(name))
                parts.append(part)
            keys.append(document_key(text, self.seed))
        sizes = [len(part) if part.isascii() else len(part.encode()) for part in parts]
        ids, tokens = self.tokenizer.encode_documents(parts)
        of_parts = (np.array(values, np.int64) for values in (document, split, tokens, sizes))
        return Encoded(np.array(keys, np.uint64), *of_parts, ids, +counts)


def _start_worker(recipe: Recipe) -> None:
    multiprocessing.current_process().recipe = recipe  # where _encode_in_worker finds it: tasks would pickle it again and again
    parent = multiprocessing.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()  # a killed parent can't end us


def _encode_in_worker(splitting: Splitting, texts: list[str], mended: Counter) -> Encoded:
    return multiprocessing.current_process().recipe.encode(splitting, texts, mended)


class DocumentEncoder(contextlib.AbstractContextManager):
    """Encodes documents in `workers` processes, or in this one if it is one. A context manager."""

    def __init__(self, recipe: Recipe, workers: int):
        self.recipe, self.workers, self.pool = recipe, workers, None
        if workers > 1:
            recipe.tokenizer.encode("")  # builds what encoding needs, so that forked processes find it
            self.pool = concurrent.futures.ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(recipe,))

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def encode(self, group: Group, most: float, wanted: Callable[[], float]) -> Iterator[Encoded]:
        """All documents of a group encoded, in order, in batches of `most` documents at most, which don't depend on the number of workers.

        Reads only a few batches ahead, and no further than for the number of documents that `wanted()` says can be used.
        """
        if self.pool is None:
            for texts, mended in batches(group, most):
                yield self.recipe.encode(group.splitting, texts, mended)
            return
        pending: collections.deque[tuple[int, concurrent.futures.Future]] = collections.deque()  # documents, and what becomes of them
        try:
            for texts, mended in batches(group, most):
                pending.append((len(texts), self.pool.submit(_encode_in_worker, group.splitting, texts, mended)))
                while pending and (len(pending) > 2 * self.workers or sum(documents for documents, _ in pending) >= wanted()):
                    yield pending.popleft()[1].result()
            while pending:
                yield pending.popleft()[1].result()
        except BrokenProcessPool:
            raise ValueError(f"one of the {self.workers} processes that encode was killed; is memory short? Try --num_workers 1") from None
        finally:
            for _, future in pending:
                future.cancel()


def batches(group: Group, most: float) -> Iterator[tuple[list[str], Counter]]:
    """A group's documents in lists of about a million characters, and what reading each list had to replace or cut."""
    texts: list[str] = []
    size, before = 0, Counter()
    for text in group.documents():
        texts.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS or len(texts) == most:
            now = group.mended()
            yield texts, now - before
            texts, size, before = [], 0, now
    if texts:
        yield texts, group.mended() - before
