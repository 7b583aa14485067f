"""Where documents come from: text, JSON, CSV and Parquet files, also compressed. Doesn't import torch."""

import abc
import bz2
import codecs
import contextlib
import csv
import difflib
import errno
import gzip
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import Checked, notice

from formats.tokenizer import EOT

CHUNK_BYTES = 2**20
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

# how files begin that are not UTF-8 text, though parts of them may look like it
BINARY = {b"PK\x03\x04": "a ZIP archive", b"7z\xbc\xaf": "a 7z archive", b"Rar!\x1a": "a RAR archive", b"!<arch>\n": "an ar archive"}
BINARY |= {b"\x1f\x8b": "gzip data", b"\xfd7zXZ\0": "xz data", b"\x28\xb5\x2f\xfd": "zstd data", b"PAR1": "Parquet data"}
BINARY |= {b"%PDF-": "a PDF document", b"SQLite format 3\0": "a database", b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture"}
BINARY |= {b"\x7fELF": "a program", b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text"}
HEAD = 4096  # bytes that are looked at
MOST_NULS = 256  # of them; more have only archives, token files, UTF-16 and other binary data


def kind_of_binary(data: bytes) -> str | None:
    """What a file is, by its first bytes, if it is no text in UTF-8."""
    if data[257:262] == b"ustar":
        return "a tar archive"
    nuls = data[:HEAD].count(0) > MOST_NULS
    return next((kind for begin, kind in BINARY.items() if data.startswith(begin)), "binary data or UTF-16 text" if nuls else None)


# ---------------------------------------------------------------- files


class File(Source):
    """A file of UTF-8 text, read in pieces. path; size: bytes on disk."""

    def __init__(self, path: Path, form: Format):
        super().__init__(str(path).encode(errors="backslashreplace").decode(), form)  # a name need not be UTF-8, meta.json has to be
        self.identity = str(path.resolve())
        self.path = path
        self.version = self._version()
        self.size = self.version[0]
        self.compressed = path.suffix.lower() in COMPRESSED

    def _version(self) -> tuple[int, ...]:
        """What tells a changed file from the one that was found: size, time of change, and the place on disk, which a new file changes."""
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino

    def check_unchanged(self) -> None:
        """A file is read several times, and its SHA-256 recorded at the end: raises ValueError unless it was the same all the time."""
        if self._version() != self.version:
            raise ValueError(f"{self.name} changed while it was read; start again once it is complete, or with a copy of it")

    @property
    def text_bytes(self) -> int | None:
        return None if self.compressed else self.size

    def open(self):
        self.check_unchanged()
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
                if offset == 0 and (kind := kind_of_binary(chunk)):
                    raise ValueError(f"{self.path} holds {kind}; unpack it, or convert it to UTF-8 text")
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
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.check_unchanged()
        return {"name": self.name, "bytes": self.size, "sha256": sha256}


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
            if in_list and rest[at : at + 1] == "]":
                if rest[at + 1 :].strip():
                    raise ValueError(f"{self.path} goes on behind the list of its first {number} values; make it one list")
            elif in_list and text is None:
                raise ValueError(f"{self.path} ends within its list, after value {number}; it is cut off, get it again")
            rest = rest[at:]
            wanted = 2 * len(rest)  # a value that is longer than what is here is tried again when there is twice as much


class Csv(File):
    """A table with a header line, fields separated by commas. Each row has as many fields as the header."""

    delimiter = ","

    def __iter__(self) -> Iterator[str]:
        csv.field_size_limit(2**31 - 1)
        reader = csv.reader((line + "\n" for line, _ in self.split("\n")), delimiter=self.delimiter, strict=True)
        rows, line = filter(None, reader), 0  # an empty line is no row
        try:
            header = next(rows, [])
            line = reader.line_num
            for row in rows:
                line = reader.line_num
                if len(row) != len(header):
                    advice = "a text that holds the separator has to stand in quotes"
                    raise ValueError(f"{self.path} line {line} has {len(row)} fields, the header has {len(header)}; {advice}")
                yield self.text_of(dict(zip(header, row)), f"line {line}")
        except csv.Error as error:
            raise ValueError(f"{self.path} is no CSV behind line {line} ({error}); mend it") from None


class Tsv(Csv):
    """As CSV, with tabs in place of commas."""

    delimiter = "\t"


class Parquet(File):
    """A Parquet file's text column."""

    text_bytes = None

    def __iter__(self) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        try:
            with contextlib.ExitStack() as stack:
                opened = stack.enter_context(self.open())
                source = pyarrow.BufferReader(opened.read()) if self.compressed else opened
                file = stack.enter_context(pyarrow.parquet.ParquetFile(source, page_checksum_verification=True))
                if self.form.text_field not in file.schema_arrow.names:
                    self.text_of(dict.fromkeys(file.schema_arrow.names), "")
                batches = file.iter_batches(batch_size=1000, columns=[self.form.text_field])
                for number, row in enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1):
                    yield self.text_of(row, f"row {number}")
        except (pyarrow.ArrowException, EOFError, OSError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{self.path} is no Parquet file, or damaged ({str(error).partition('. ')[0]}); get it again") from None


FILE_KINDS = {".txt": TextFile, ".text": TextFile, ".jsonl": JsonLines, ".ndjson": JsonLines, ".json": Json}
FILE_KINDS |= {".csv": Csv, ".tsv": Tsv, ".parquet": Parquet}


def kind_of(path: Path) -> type[File] | None:
    """How a file is read, by its name without the ending of a compression; None for a name that says nothing."""
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix
    return FILE_KINDS.get(suffix.lower())


def _refuse(error: OSError) -> None:
    raise error


def walk(directory: Path) -> list[Path]:
    """All files of known kinds below a directory, sorted; links are followed, each directory is entered once. Raises OSError."""
    seen, found, others = set(), [], []
    for root, below, names in os.walk(directory, followlinks=True, onerror=_refuse):
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


def matches(pattern: Path) -> list[Path]:
    """The files that a glob names, sorted. Raises PermissionError for a directory on the way that can't be read, which pathlib skips."""
    below = Path(pattern.anchor or ".")  # pathlib's ** doesn't follow links, so that loops of them end
    parts = pattern.relative_to(pattern.anchor).parts
    for end in range(1, len(parts)):
        for directory in below.glob(str(Path(*parts[:end]))):
            if directory.is_dir() and not os.access(directory, os.R_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))
    found = sorted(match for match in below.glob(str(Path(*parts))) if match.is_file())
    return [match for match in found if pattern.name.startswith(".") or not match.name.startswith(".")]


def likely_meant(path: Path) -> str:
    """For a path that isn't there: a question whether something of a similar name beside it was meant; empty if there is nothing."""
    missing = next((part for part in (path, *path.parents) if part.parent.is_dir()), path)
    similar = difflib.get_close_matches(missing.name, os.listdir(missing.parent), 1) if missing.parent.is_dir() else []
    meant = [missing.parent / name / path.relative_to(missing) for name in similar]
    return "".join(f"; did you mean {whole if whole.exists() else missing.parent / name}?" for whole, name in zip(meant, similar))


def find_files(names: Iterable[str], form: Format) -> list[File]:
    """The files that paths, directories and globs name, each once, in order. Raises OSError, ValueError."""
    paths: dict[Path, Path] = {}
    for name in names:
        path = Path(name)
        found = walk(path) if path.is_dir() else [path] if path.exists() else matches(path)
        if not found:
            kinds = f"{', '.join(FILE_KINDS)} (also compressed)"
            advice = likely_meant(path) or f"; give an existing file, a glob, or a directory with {kinds}"
            raise FileNotFoundError(f"no text files at {name}{advice}")
        for path in found:
            paths.setdefault(path.resolve(), path)
    odd = [str(path) for path in paths.values() if not path.is_file()]
    if odd:
        raise ValueError(f"{', '.join(odd)} can't be read several times, as a file can; write it to a file first")
    empty = [str(path) for path in paths.values() if path.stat().st_size == 0]
    if empty:
        raise ValueError(f"empty input: {', '.join(empty)}; leave it out or give a file with text")
    return [(kind_of(path) or TextFile)(path, form) for path in paths.values()]
