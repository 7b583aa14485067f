"""What our files on disk hold, declared: nothing read from a file is used before it fits its schema. Doesn't import torch.

A schema is a TypedDict, so that what was read stays plain dictionaries and lists. Types are strict: True is no number, 1.0 is no int.
"""

import functools
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from utils import Natural, NonNegative, Seed

from annotated_types import Ge, Le
from pydantic import ConfigDict, JsonValue, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict

FORMAT_VERSION = 1  # of data directories and of checkpoints
MAX_VOCAB_SIZE = 65_536  # token files hold uint16
PROBLEMS = 3  # told of one file, at most

Version = Annotated[int, Ge(FORMAT_VERSION), Le(FORMAT_VERSION)]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Declared(TypedDict):
    """Base of schemas: exactly the declared keys, each of its type."""

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", arbitrary_types_allowed=True)


class Extensible(TypedDict, total=False):
    """Base of schemas whose files may say more than we read back: what is declared must be of its type."""

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


# ---------------------------------------------------------------- what the files hold


class Split(Declared):
    """What meta.json says of a split. bytes: UTF-8 bytes of its documents' text."""

    tokens: Natural
    documents: Natural
    bytes: Natural
    sha256: Sha256


class Splits(Declared):
    train: Split
    val: Split
    test: Split


class Meta(Declared):
    """meta.json of a data directory: what readers need, then where the data comes from."""

    format_version: Version
    dtype: Literal["uint16"]
    vocab_size: Annotated[int, Ge(1), Le(MAX_VOCAB_SIZE)]
    eot_id: Natural
    tokenizer_sha256: Sha256
    splits: Splits
    sources: NotRequired[list[dict[str, JsonValue]]]
    split: NotRequired[dict[str, JsonValue]]
    sample: NotRequired[dict[str, JsonValue]]
    made_with: NotRequired[dict[str, JsonValue]]
    cleaning: NotRequired[dict[str, JsonValue]]
    seed: NotRequired[Seed]
    counts: NotRequired[dict[str, Natural]]
    unknown_tokens: NotRequired[dict[str, Natural]]
    files: NotRequired[list[str]]


class Entropy(Declared):
    """entropy.json: bits of each document of a split."""

    train: NotRequired[list[NonNegative]]
    val: NotRequired[list[NonNegative]]
    test: NotRequired[list[NonNegative]]


class Commit(Declared):
    """commit.json: names of files to rename and to delete."""

    new: list[str]
    remove: list[str]


class Exported(Extensible, total=False):
    """What export.json says of one file or folder."""

    format: str
    checkpoint: str
    checkpoint_sha256: Sha256
    sha256: Sha256
    largest_logit_difference: NonNegative
    torch: str


class ExportRecord(Declared):
    files: dict[str, Exported]


class Measures(Extensible, total=False):
    """Measures of a validation split in metrics.jsonl; null where a number was not finite or not known."""

    loss: float | None
    perplexity: float | None
    accuracy: float | None
    bits_per_byte: float | None


class MetricsLine(Measures, total=False):
    """One line of metrics.jsonl: of training steps, or of an evaluation."""

    step: Natural
    tokens: Natural
    lr_factor: float
    gradient_norm: float | None
    skipped_steps: Natural
    tokens_per_second: Natural
    mfu: float
    val_loss: float | None
    val_perplexity: float | None
    val_accuracy: float | None
    val_bits_per_byte: float | None
    also: dict[str, Measures]
    sample: str


class Index(Declared):
    """model.safetensors.index.json of transformers: which file holds which weight."""

    metadata: NotRequired[dict[str, JsonValue]]
    weight_map: dict[str, str]


HFConfig = dict[str, JsonValue]  # config.json of transformers; formats/huggingface.py says which options it may have


class Part(TypedDict):
    """Base of schemas that declare a part of a file only; `tokenizers` itself checks the rest."""

    __pydantic_config__ = ConfigDict(strict=True)


class AddedToken(Part):
    id: Natural
    content: str


class TokenizerModel(Part):
    vocab: dict[str, Natural] | list[Any]


class TokenizerFile(Part):
    """What decides how much memory a tokenizer.json takes."""

    model: TokenizerModel
    added_tokens: NotRequired[list[AddedToken]]


# ---------------------------------------------------------------- reading


_adapter = functools.cache(TypeAdapter)


def _sentence(problem: dict) -> str:
    """One of pydantic's problems in a few words, e.g. `splits.val.bytes=-5 must be at least 0`."""
    kind, where, last = problem["type"], ".".join(map(str, problem["loc"])), problem["loc"][-1:]
    if kind == "json_invalid":
        return problem["msg"].replace("Invalid JSON: ", "no JSON, ")
    if kind == "missing":
        return f"{'.'.join(map(str, problem['loc'][:-1])) or 'it'} has no {last[0]!r}"
    if kind == "extra_forbidden":
        return f"{where} is unknown here"
    phrase = problem["msg"].removeprefix("Input should be ").replace("greater than or equal to", "at least")
    return f"{where or 'it'}={reprlib.repr(problem['input'])} must be {phrase.replace('less than or equal to', 'at most')}"


def check(content: object, schema: object, name: str | Path, advice: str, wrong: str = "is damaged"):
    """`content`, the bytes of a JSON file or plain values, if it is what `schema` declares.

    Raises one ValueError that names the file, what is wrong with it, and the advice.
    """
    adapter = _adapter(schema)
    try:
        return adapter.validate_json(content) if isinstance(content, bytes) else adapter.validate_python(content)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    for problem in problems:
        if problem["loc"] == ("format_version",) and problem["type"] != "missing":
            known = f"format version {problem['input']!r}, this program reads {FORMAT_VERSION}"
            raise ValueError(f"{name} has {known}; {advice}")
    raise ValueError(f"{name} {wrong}: {'; '.join(map(_sentence, problems[:PROBLEMS]))}; {advice}")


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises FileNotFoundError, and ValueError for a directory, and for a pipe, which might never end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file; move it away")
    return path.read_bytes()


def read_json(path: Path, schema: object, advice: str):
    """A JSON file that is what `schema` declares. Raises FileNotFoundError, ValueError, OSError."""
    return check(read_file(path), schema, path, advice)
