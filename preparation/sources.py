"""Where documents come from: text, JSON, CSV and Parquet files, also compressed, and datasets. Doesn't import torch."""

import abc
import bz2
import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import re
import threading
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import Checked, notice

from formats.tokenizer import EOT

CHUNK_BYTES = 2**20
HUB_SECONDS = 6  # how long the hub may take to answer
MAX_DOCUMENT = 2**26  # characters; a longer text is cut into documents at line ends, so that memory stays bounded
REPLACED, CUT = "bytes that are not UTF-8", "cut into documents for their length"  # what may have to be mended
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Format(Checked):
    """How sources are read."""

    separator: str = EOT
    """What stands between two documents in a text file."""
    text_field: str = "text"
    """Key or column that holds the text, in files and datasets that have such."""
    errors: Literal["strict", "replace"] = "strict"
    """What is not UTF-8: strict ends with file and byte, replace reads on with U+FFFD in its place and counts."""


class Source(abc.ABC):
    """Documents in a fixed order, which can be read several times.

    name: for people and meta.json. text_bytes: size of the text, None where that isn't known before reading. streamed: whether each reading
    is a download. identity: equal for two sources that read the same. mended: what reading had to replace or cut so far.
    """

    text_bytes: int | None = None
    streamed = False

    def __init__(self, name: str, form: Format):
        self.name = self.identity = name
        self.form = form
        self.mended: Counter = Counter()

    @abc.abstractmethod
    def __iter__(self) -> Iterator[str]:
        """Documents in order. Raises ValueError for what can't be read."""

    @abc.abstractmethod
    def describe(self) -> dict:
        """What meta.json tells about it."""

    def text_of(self, value, where: str) -> str:
        """The text of a row, a mapping or the text itself; None counts as an empty document."""
        if isinstance(value, dict):
            if self.form.text_field not in value:
                names = ", ".join(map(str, value)) or "no field at all"
                raise ValueError(f"{self.name} {where} has no field {self.form.text_field!r}; pass --text_field, one of: {names}")
            value = value[self.form.text_field]
        if not isinstance(value, str | None):
            what = f"no text but {type(value).__name__} in field {self.form.text_field!r}"
            raise ValueError(f"{self.name} {where} has {what}; name another --text_field")
        text = value or ""
        if not text.isascii() and SURROGATE.search(text):
            if self.form.errors == "strict":
                raise ValueError(f"{self.name} {where} has half a character (a lone surrogate); pass --errors replace to put U+FFFD there")
            text, count = SURROGATE.subn("\ufffd", text)
            self.mended[REPLACED] += count
        return text


def open_zst(path: Path, mode: str) -> io.RawIOBase:
    import pyarrow  # comes with datasets

    return pyarrow.input_stream(str(path), compression="zstd")


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zst}


# ---------------------------------------------------------------- files


class File(Source):
    """A file of UTF-8 text, read in pieces. path; size: bytes on disk."""

    def __init__(self, path: Path, form: Format):
        super().__init__(str(path), form)
        self.identity = str(path.resolve())
        self.path, self.size = path, path.stat().st_size
        self.compressed = path.suffix.lower() in COMPRESSED

    @property
    def text_bytes(self) -> int | None:
        return None if self.compressed else self.size

    def open(self):
        return COMPRESSED.get(self.path.suffix.lower(), open)(self.path, "rb")

    def chunks(self) -> Iterator[str]:
        """The file's text in pieces, without a byte order mark."""
        decoder, offset = codecs.getincrementaldecoder("utf-8")(self.form.errors), 0
        with self.open() as file:
            while True:
                try:
                    chunk = file.read(CHUNK_BYTES)
                except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                    if not self.compressed:
                        raise
                    raise ValueError(f"{self.path} is cut off or damaged after {offset} bytes of text ({error}); get it again") from None
                data = decoder.getstate()[0] + chunk  # with the beginning of a character, where the last chunk ended within it
                try:
                    text = decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    at, advice = offset + len(chunk) - len(data) + error.start, "convert it, e.g. with: iconv -t UTF-8"
                    replacing = "or pass --errors replace to read on with U+FFFD in its place"
                    raise ValueError(f"{self.path} is not UTF-8 text (byte {at}); {advice}, {replacing}") from None
                self.mended[REPLACED] += text.count("\ufffd") - data.count("\ufffd".encode())
                yield text.removeprefix("\ufeff") if offset == 0 else text
                offset += len(chunk)
                if not chunk:
                    return

    def split(self, separator: str, longest: float = math.inf) -> Iterator[tuple[str, str]]:
        """The text's parts, and what ends each: separator, end (of the file) or cut, at a line end or space of a part beyond `longest`."""
        rest = ""
        for text in self.chunks():
            new = max(0, len(rest) - len(separator))  # what was searched before needs no second look
            rest += text
            if rest.find(separator, new) >= 0:
                *parts, rest = rest.split(separator)
                yield from ((part, "separator") for part in parts)
            while len(rest) > longest:
                end = (rest.rfind("\n", 0, longest) + 1) or (rest.rfind(" ", 0, longest) + 1) or longest
                self.mended[CUT] += 1
                yield rest[:end], "cut"
                rest = rest[end:]
        yield rest, "end"

    def describe(self) -> dict:
        with open(self.path, "rb") as file:
            return {"name": self.name, "bytes": self.size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


class TextFile(File):
    """Documents with a separator between them, without the line ends next to it; without any, the file is one document."""

    def __iter__(self) -> Iterator[str]:
        separated = False
        for text, end in self.split(self.form.separator, MAX_DOCUMENT):
            separated |= end == "separator"
            text = text.strip("\r\n") if separated and end != "cut" else text
            if end != "end" or text.strip():
                yield text


class JsonLines(File):
    """One JSON value a line: objects with a text field, or texts."""

    def __iter__(self) -> Iterator[str]:
        for number, (line, _) in enumerate(self.split("\n"), 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{self.path} line {number} is no JSON ({error}); mend or delete the line") from None
                yield self.text_of(value, f"line {number}")


class Json(File):
    """A JSON list of objects or texts (or such values one after the other), read one by one."""

    SKIP = re.compile(r"[\s,]*")

    def __iter__(self) -> Iterator[str]:
        decoder, rest, number, in_list, wanted = json.JSONDecoder(), "", 0, None, 0
        for text in itertools.chain(self.chunks(), [None]):
            rest += text or ""
            if text is not None and len(rest) < wanted:
                continue
            at = self.SKIP.match(rest).end()
            if in_list is None and at < len(rest):
                in_list = rest[at] == "["
                at += in_list
            while True:
                at = self.SKIP.match(rest, at).end()
                if at == len(rest) or (in_list and rest[at] == "]"):
                    break
                try:
                    value, end = decoder.raw_decode(rest, at)
                except (ValueError, RecursionError) as error:
                    if text is None:
                        raise ValueError(f"{self.path} is no JSON in or behind its value {number + 1} ({error}); mend it") from None
                    break
                if text is not None and end == len(rest) and not in_list:
                    break  # a number could go on
                number, at = number + 1, end
                yield self.text_of(value, f"value {number}")
            if text is None and in_list and rest[at : at + 1] != "]":
                raise ValueError(f"{self.path} ends within its list, after value {number}; it is cut off, get it again")
            rest = rest[at:]
            wanted = 2 * len(rest)  # a value that is longer than what is here is tried again when there is twice as much


class Csv(File):
    """A table with a header line, fields separated by commas, or by tabs in .tsv files."""

    def __iter__(self) -> Iterator[str]:
        csv.field_size_limit(2**31 - 1)
        delimiter = "\t" if ".tsv" in self.path.suffixes else ","
        rows = csv.DictReader((line + "\n" for line, _ in self.split("\n")), delimiter=delimiter, strict=True)
        try:
            for row in rows:
                row.pop(None, None)  # fields beyond the header's
                yield self.text_of(row, f"line {rows.line_num}")
        except csv.Error as error:
            raise ValueError(f"{self.path} is no CSV behind line {rows.line_num} ({error}); mend it") from None


class Parquet(File):
    """A Parquet file's text column."""

    text_bytes = None

    def __iter__(self) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        try:
            with contextlib.ExitStack() as stack:
                source = pyarrow.BufferReader(stack.enter_context(self.open()).read()) if self.compressed else str(self.path)
                file = stack.enter_context(pyarrow.parquet.ParquetFile(source))
                if self.form.text_field not in file.schema_arrow.names:
                    self.text_of(dict.fromkeys(file.schema_arrow.names), "")
                batches = file.iter_batches(batch_size=1000, columns=[self.form.text_field])
                for number, row in enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1):
                    yield self.text_of(row, f"row {number}")
        except (pyarrow.ArrowException, EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{self.path} is no Parquet file, or damaged ({str(error).partition('. ')[0]}); get it again") from None


FILE_KINDS = {".txt": TextFile, ".text": TextFile, ".jsonl": JsonLines, ".ndjson": JsonLines, ".json": Json}
FILE_KINDS |= {".csv": Csv, ".tsv": Csv, ".parquet": Parquet}


def kind_of(path: Path) -> type[File] | None:
    """How a file is read, by its name without the ending of a compression; None for a name that says nothing."""
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix
    return FILE_KINDS.get(suffix.lower())


def walk(directory: Path) -> list[Path]:
    """All files of known kinds below a directory, sorted; links are followed, each directory is entered once."""
    seen, found, others = set(), [], []
    for root, below, names in os.walk(directory, followlinks=True):
        place = os.stat(root)
        if (place.st_dev, place.st_ino) in seen:
            below.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        for path in (Path(root, name) for name in names if not name.startswith(".")):
            (found if path.is_file() and kind_of(path) else others).append(path)
    if others:
        notice(f"{directory}: {len(others)} files of other kinds are left out, e.g. {min(others)}; name files to read them as text")
    return sorted(found)


def find_files(names: Iterable[str], form: Format) -> list[File]:
    """The files that paths, directories and globs name, each once, in order. Raises FileNotFoundError, ValueError."""
    paths: dict[Path, Path] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = walk(path)
        elif path.exists():
            found = [path]
        else:
            below = Path(path.anchor or ".")  # pathlib's ** doesn't follow links, so that loops of them end
            found = sorted(match for match in below.glob(str(path.relative_to(path.anchor))) if match.is_file())
            found = [match for match in found if path.name.startswith(".") or not match.name.startswith(".")]
        if not found:
            kinds = f"{', '.join(FILE_KINDS)} (also compressed)"
            raise FileNotFoundError(f"no text files at {name}; give an existing file, a glob, or a directory with {kinds}")
        for path in found:
            paths.setdefault(path.resolve(), path)
    odd = [str(path) for path in paths.values() if not path.is_file()]
    if odd:
        raise ValueError(f"{', '.join(odd)} can't be read several times, as a file can; write it to a file first")
    empty = [str(path) for path in paths.values() if path.stat().st_size == 0]
    if empty:
        raise ValueError(f"empty input: {', '.join(empty)}; leave it out or give a file with text")
    return [(kind_of(path) or TextFile)(path, form) for path in paths.values()]


# ---------------------------------------------------------------- datasets


class HubSplit(Source):
    """One split of a `datasets` dataset, streamed. rows: its rows, a mapping of columns each."""

    streamed = True

    def __init__(self, name: str, split: str, rows: Iterable[dict], form: Format):
        super().__init__(f"{name}:{split}", form)
        self.rows = rows
        self.read: dict = {}  # bytes and sha256 of the text, once the whole split was read

    def __iter__(self) -> Iterator[str]:
        digest, size = hashlib.sha256(), 0
        for number, row in enumerate(self.rows, 1):
            text = self.text_of(row, f"row {number}")
            digest.update(text.encode())
            size += len(text.encode())
            yield text
        self.read = {"bytes": size, "sha256": digest.hexdigest()}

    def describe(self) -> dict:
        return {"name": self.name} | self.read


def hub_answers() -> bool:
    """Whether the hub can be reached, decided within seconds: `datasets` itself would try for half a minute."""
    answered = threading.Event()
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # any answer will do
        except (OSError, ValueError):
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name may hang beyond the timeout
    thread.start()
    thread.join(HUB_SECONDS)
    return answered.is_set()


def open_dataset(name: str, config: str | None, form: Format) -> dict[str, HubSplit]:
    """The splits of a hub dataset or a local dataset folder, streamed. Raises ValueError if it can't be had."""
    if not Path(name).exists() and not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when datasets is imported; what was downloaded before can still be had
    import datasets

    try:
        splits = datasets.load_dataset(name, config, streaming=True)
    except Exception as error:  # datasets passes on the errors of many libraries
        reason = " ".join(str(error).split())[:200]
        advice = "without network use --sample, or --input with your own files"
        raise ValueError(f"the dataset {name!r} can't be had ({type(error).__name__}: {reason}); {advice}") from None
    if "train" not in splits:
        raise ValueError(f"the dataset {name!r} has no train split, only {', '.join(splits)}; download it and use --input")
    return {split: HubSplit(name, split, rows, form) for split, rows in splits.items()}
