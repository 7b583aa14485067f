"""Where documents come from: text files, directories, globs, datasets of the Hugging Face hub. Doesn't import torch."""

import codecs
import glob
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

CHUNK_BYTES = 2**20


class TextFile:
    """A UTF-8 text file as documents, read in pieces. size and sha256 are known after each full reading."""

    def __init__(self, path: Path, separator: str):
        self.path, self.separator = path, separator
        self.size = path.stat().st_size

    def __iter__(self) -> Iterator[str]:
        """Documents in order, without the line ends next to separators; empty ones are left out. Raises ValueError for bad UTF-8."""
        decoder, digest = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256()
        rest, found, offset = "", False, 0
        with open(self.path, "rb") as file:
            while True:
                chunk = file.read(CHUNK_BYTES)
                digest.update(chunk)
                try:
                    text = decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    at = offset + error.start - (len(error.object) - len(chunk))
                    raise ValueError(f"{self.path} is not UTF-8 text (byte {at}); convert it, e.g. with: iconv -t UTF-8") from None
                new = max(0, len(rest) - len(self.separator))  # what was searched before needs no second look
                rest += text.removeprefix("\ufeff") if offset == 0 else text
                offset += len(chunk)
                if rest.find(self.separator, new) >= 0:
                    found = True
                    *documents, rest = rest.split(self.separator)
                    yield from filter(None, (document.strip("\r\n") for document in documents))
                if not chunk:
                    break
        last = rest.strip("\r\n") if found else rest
        if last.strip():
            yield last
        self.size, self.sha256 = offset, digest.hexdigest()

    def describe(self) -> dict:
        return {"name": str(self.path), "bytes": self.size, "sha256": self.sha256}


class HubSplit:
    """One split of a `datasets` dataset as documents. size and sha256 are those of the text, known after each full reading."""

    def __init__(self, name: str, split: str, rows, text_field: str):
        self.name, self.rows, self.text_field = f"{name}:{split}", rows, text_field
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        digest, size = hashlib.sha256(), 0
        for number, row in enumerate(self.rows):
            if not isinstance(row.get(self.text_field), str):
                columns = ", ".join(row)
                raise ValueError(
                    f"{self.name} has no text in column {self.text_field!r} of row {number}; pass --text_field, one of: {columns}"
                )
            text = row[self.text_field]
            digest.update(text.encode())
            size += len(text.encode())
            if text.strip():
                yield text
        self.size, self.sha256 = size, digest.hexdigest()

    def describe(self) -> dict:
        return {"name": self.name, "bytes": self.size, "sha256": self.sha256}


def find_files(names: Iterable[str], separator: str) -> list[TextFile]:
    """The text files that paths, directories and globs name, each once, in order. Raises FileNotFoundError, ValueError."""
    paths: dict[Path, Path] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(path.rglob("*.txt"))
        elif path.exists():
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(name, recursive=True))
        if not found:
            raise FileNotFoundError(f"no text files at {name}; give an existing file, a directory with *.txt files, or a glob")
        paths |= {path.resolve(): path for path in found if path.resolve() not in paths}
    empty = [str(path) for path in paths.values() if path.stat().st_size == 0]
    if empty:
        raise ValueError(f"empty input: {', '.join(empty)}; leave it out or give a file with text")
    return [TextFile(path, separator) for path in paths.values()]


def open_dataset(name: str, text_field: str) -> dict[str, HubSplit]:
    """The splits of a hub dataset or a local dataset folder, streamed. Raises ValueError if it can't be had."""
    import datasets

    try:
        splits = datasets.load_dataset(name, streaming=True)
    except Exception as error:  # datasets passes on the errors of many libraries
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the dataset {name!r} can't be had ({type(error).__name__}: {reason}); "
            "without network use --sample, or --input with your own files"
        ) from None
    if "train" not in splits:
        raise ValueError(f"the dataset {name!r} has no train split, only {', '.join(splits)}; download it and use --input")
    return {split: HubSplit(name, split, rows, text_field) for split, rows in splits.items()}


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The beginning of `texts`, `limit` characters in all."""
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return
