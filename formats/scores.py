"""evaluation.npz: what a model scored item by item (documents of held-out text, items of a task), beside evaluation.json. No torch.

Runs are compared item by item, so the scores are kept. They are found again by content: what has the same key isn't computed again.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

from utils import notice

import numpy as np
from pydantic import JsonValue

from formats.outputs import write_atomically
from formats.schemas import Declared, Sha256, check, read_file

SCORES = "evaluation.npz"
INDEX = "index"  # the array with the JSON that describes all others
ADVICE = "delete it; evaluate.py writes it again"


@dataclass(frozen=True, eq=False)
class ItemScores:
    """The scores of one model on one set of items.

    key: hash of model, items and method; equal keys mean equal scores. items: hash of the items alone, whatever the tokenizer: models
    that have the same can be compared item by item. kind: text (items are documents) or task. summary: the measures of the whole set, as
    evaluation.json has them. columns: (items,) each; for text nats (float64, the document's end included), bytes (int64, of its text),
    tokens (int64); for a task correct and whatever else its metrics are (float64), none where they aren't item by item. model: hash of
    the model alone.
    """

    key: str
    items: str
    kind: str
    summary: dict
    columns: dict[str, np.ndarray]
    model: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


class _Entry(Declared):
    key: Sha256
    items: Sha256
    kind: str
    summary: dict[str, JsonValue]
    columns: list[str]
    model: Sha256


def set_name(name: str, split: str, stride: int | None = None, stream: bool = False) -> str:
    """What the scores of a split (`text` for files) are called. Other ways to score it than the usual one have names of their own."""
    return " ".join([name, split, *([f"stride {stride}"] if stride else []), *(["stream"] if stream else [])])


def content_hash(*parts: object) -> str:
    """SHA-256 of bytes and plain values, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def write_scores(path: Path, sets: dict[str, ItemScores]) -> None:
    """Write sets of scores by their names, atomically. Raises OSError."""
    names = ("key", "items", "kind", "summary", "model")
    index = {name: {key: getattr(s, key) for key in names} | {"columns": [*s.columns]} for name, s in sets.items()}
    arrays = {INDEX: np.frombuffer(json.dumps(index, allow_nan=False).encode(), np.uint8)}  # first: it marks the file as ours
    arrays |= {f"{i}/{column}": values for i, s in enumerate(sets.values()) for column, values in s.columns.items()}
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


class Damaged(ValueError):
    """A table of scores can't be read; what stood in it can be computed again."""


def read_scores(path: Path) -> dict[str, ItemScores]:
    """The sets of an evaluation.npz; none if it isn't there. Raises Damaged, and ValueError for a whole file that isn't ours."""
    if not path.exists():
        return {}
    content = read_file(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            arrays = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # numpy and zipfile raise a dozen kinds
        raise Damaged(f"{path} is damaged; {ADVICE}") from error
    try:
        index = check(arrays.get(INDEX, np.empty(0, np.uint8)).tobytes(), dict[str, _Entry], path, "")
    except ValueError:  # each array's checksum was right
        raise ValueError(f"{path} is no table of scores of ours; move it away") from None
    sets = {}
    for i, (name, entry) in enumerate(index.items()):
        columns = {column: arrays.get(f"{i}/{column}", np.empty(())) for column in entry["columns"]}
        whole = all(values.ndim == 1 and values.dtype.kind in "biuf" and np.isfinite(values).all() for values in columns.values())
        if not whole or len({len(values) for values in columns.values()}) > 1:
            raise Damaged(f"{path} is damaged: the scores of {name} don't fit together; {ADVICE}")
        sets[name] = ItemScores(entry["key"], entry["items"], entry["kind"], entry["summary"], columns, entry["model"])
    return sets


def read_known(path: Path) -> dict[str, ItemScores]:
    """As `read_scores`, for what can be computed again: nothing where the file is damaged, which is told. Raises ValueError."""
    try:
        return read_scores(path)
    except Damaged as error:
        notice(f"warning: {error.args[0].removesuffix(ADVICE)}everything is computed again")
        return {}
