"""Whether a model may have trained on what it is measured on: held-out documents that stand in a training split. Doesn't import torch."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from formats.data_directory import DataDirectory
from preparation.cleaning import skeleton
from preparation.sources import Format, find_files

TOKENS_AT_ONCE = 2**20


def split_texts(directory: Path, split: str) -> Iterator[str]:
    """The documents of a split as text. Raises FileNotFoundError, ValueError."""
    data = DataDirectory(directory)
    tokens = data.tokens(split)
    ends = np.append(np.flatnonzero(tokens == data.tokenizer.eot_id), len(tokens))
    documents, size = [], 0
    for start, end in zip([0, *(ends[:-1] + 1)], ends):
        documents.append(tokens[start:end].tolist())
        size += end - start
        if size >= TOKENS_AT_ONCE or end == len(tokens):
            yield from filter(None, data.tokenizer.tokenizer.decode_batch(documents, skip_special_tokens=False))
            documents, size = [], 0


def document_hashes(texts: Iterable[str]) -> np.ndarray:
    """Hashes of what texts are but for blanks and case (`skeleton`), sorted, each once: (documents,) uint64."""
    return np.unique(np.fromiter((xxhash.xxh3_64_intdigest(skeleton(text)) for text in texts), np.uint64))


def file_texts(names: Iterable[str], form: Format) -> Iterator[str]:
    """The documents of files, as evaluate.py --text reads them. Raises OSError, ValueError."""
    return (text for file in find_files(names, form) for text in file if text.strip())


def seen_in_training(directory: Path, held_out: dict[str, Iterable[str]]) -> dict[str, int]:
    """How many documents of held-out sets, texts by the sets' names, stand in a data directory's train split, blanks and case ignored."""
    trained = document_hashes(split_texts(directory, "train"))
    return {name: int(np.isin(document_hashes(texts), trained).sum()) for name, texts in held_out.items()}
