"""Documents -> token ids, by this process or by several others, in the order of the documents. Doesn't import torch."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from utils import interruptible

import numpy as np

from formats.data_directory import SPLITS
from formats.tokenizer import TextTokenizer
from preparation.cleaning import Cleaning, Splitting, document_key, shuffle_words
from preparation.corpus import Group

BATCH_CHARACTERS = 2**20
LOST = "contain text that the tokenizer does not give back"
SHUFFLED = "training documents with shuffled words"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    """All that turns a text into token ids of a split. A forked process has it at once, another one gets it pickled.

    shuffled: share of the training documents whose words are shuffled.
    """

    tokenizer: TextTokenizer
    cleaning: Cleaning
    seed: int
    shuffled: float = 0.0

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
                if name == "train" and self.shuffled:
                    original, part = part, shuffle_words(part, self.shuffled, self.seed)
                    counts[SHUFFLED] += part != original
                document.append(len(keys))
                split.append(SPLITS.index(name))
                parts.append(part)
            keys.append(document_key(text, self.seed))
        sizes = [len(part) if part.isascii() else len(part.encode()) for part in parts]
        ids, tokens = self.tokenizer.encode_documents(parts)
        if self.tokenizer.loss_reason is not None:
            of_each = np.split(ids, tokens.cumsum()[:-1])
            counts[LOST] += sum(self.tokenizer.decode(each[:-1].tolist()) != part for each, part in zip(of_each, parts))
        of_parts = (np.array(values, np.int64) for values in (document, split, tokens, sizes))
        return Encoded(np.array(keys, np.uint64), *of_parts, ids, +counts)


class LostWorker(ValueError):
    """One of the processes that encode is gone."""


def _work(recipe: Recipe, connection: multiprocessing.connection.Connection) -> None:
    """A process that encodes: takes the arguments of Recipe.encode, one after the other, and sends back what it or its error is."""
    parent = multiprocessing.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()  # a killed parent can't end us
    with contextlib.suppress(EOFError, OSError):  # the first process has ended
        while True:
            task = connection.recv()
            try:
                result = recipe.encode(*task)
            except Exception as error:
                error.add_note(traceback.format_exc())  # would be lost on the way
                result = error
            connection.send(result)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait until the block is left, so that a process that is forked in it can first say what it does with them."""
    if os.name == "posix":
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        if os.name == "posix":
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class DocumentEncoder(contextlib.AbstractContextManager):
    """Encodes documents in `workers` processes, or in this one if it is one. A context manager.

    Each process has a pipe of its own, whose other end nobody else holds: if it dies, even while it sends a result, its pipe ends too,
    and no other process waits for it. (In concurrent.futures' pool all share one pipe, on which a death may leave everybody waiting.)
    """

    def __init__(self, recipe: Recipe, workers: int):
        self.recipe, self.workers = recipe, workers
        self.processes: list[multiprocessing.Process] = []
        self.idle: queue.SimpleQueue[multiprocessing.connection.Connection] = queue.SimpleQueue()
        self.threads = concurrent.futures.ThreadPoolExecutor(workers)  # each waits for a process
        if workers == 1:
            return
        recipe.tokenizer.encode("")  # builds what encoding needs, so that forked processes find it
        with _signals_held():
            for _ in range(workers):
                ours, theirs = multiprocessing.Pipe()
                self.processes.append(multiprocessing.Process(target=_work, args=(recipe, theirs), daemon=True))
                self.processes[-1].start()
                theirs.close()
                self.idle.put(ours)

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()  # which holds nothing; those who wait for it are told by its pipe
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.join()

    def _ask(self, *task) -> Encoded:
        """What an idle process makes of the arguments of Recipe.encode. Raises its errors, and ValueError if it is killed."""
        connection = self.idle.get()
        try:
            connection.send(task)
            result = connection.recv()
        except (EOFError, OSError):
            raise LostWorker(f"one of the {self.workers} processes that encode was killed; is memory short? Try --num_workers 1") from None
        finally:
            self.idle.put(connection)
        if isinstance(result, Exception):
            raise result
        return result

    def encode(self, group: Group, most: float, wanted: Callable[[], float]) -> Iterator[Encoded]:
        """All documents of a group encoded, in order, in batches of `most` documents at most, which don't depend on the number of workers.

        Reads only a few batches ahead, and no further than for the number of documents that `wanted()` says can be used.
        """
        if not self.processes:
            for texts, mended in batches(group, most):
                yield interruptible(self.recipe.encode, group.splitting, texts, mended)
            return
        pending: collections.deque[tuple[int, concurrent.futures.Future]] = collections.deque()  # documents, and what becomes of them
        try:
            for texts, mended in batches(group, most):
                pending.append((len(texts), self.threads.submit(self._ask, group.splitting, texts, mended)))
                while pending and (len(pending) > 2 * self.workers or sum(documents for documents, _ in pending) >= wanted()):
                    yield pending.popleft()[1].result()
            while pending:
                yield pending.popleft()[1].result()
        except LostWorker:
            time.sleep(0.2)  # a signal to all processes reaches this one too, and ends it in its own way
            raise
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
