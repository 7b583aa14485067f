"""Where scripts write: what may stand there before anything is written, and one writer at a time. Doesn't import torch.

Nothing is replaced that this program did not write, and nothing that the same call reads.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

LARGEST = 2**28  # bytes of a JSON file that could be ours
HOUR = 3600  # seconds; no write takes longer, so an older temporary file was left by a killed process


def peek_json(path: Path) -> object:
    """The content of a JSON file; None for whatever can't be read as one."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() and path.stat().st_size <= LARGEST else None
    except (OSError, ValueError, RecursionError):
        return None


def peek(path: Path) -> bytes:
    """The first bytes of a file; none where it can't be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(1000)
    return b""


# ---------------------------------------------------------------- whole files


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system, which often name no file or a temporary one, name this path."""
    try:
        yield
    except OSError as error:
        if error.strerror:
            error.filename, error.filename2 = str(path), None
        raise


def fsync_directory(path: Path) -> None:
    """Make renames in a directory durable, where the system can (Windows cannot open directories)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path` that nobody else uses. A killed process leaves it behind, see `temporary_paths`."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")


def temporary_paths(directory: Path, names: str) -> list[Path]:
    """What stands in a directory under a temporary name for a file whose name matches the regular expression `names`."""
    return [path for path in directory.iterdir() if re.fullmatch(rf"\.({names})\.[0-9a-f]{{16}}\.tmp", path.name)]


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, make it durable, rename it: a reader sees the old file or the whole new one.

    Raises OSError that names `path`; then the temporary file is gone and the old file untouched.
    """
    temporary = temporary_path(path)
    with naming(path):
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises OSError."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: object) -> None:
    """Write a JSON file for people and programs, atomically. Raises OSError."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


# ---------------------------------------------------------------- files that --output names


def _rows_with(content: object, *kinds: set[str]) -> bool:
    """Whether this is {name: {name: {...}}} with all the keys of one kind in each of the innermost."""
    rows = [row for part in content.values() for row in (part.values() if isinstance(part, dict) else [None])]
    return bool(rows) and all(isinstance(row, dict) and any(keys <= row.keys() for keys in kinds) for row in rows)


# what scripts write as single files -> what tells that a JSON object is such a file
KINDS = {
    "evaluation": lambda content: _rows_with(content, {"loss", "perplexity"}, {"texts", "ended"}, {"items", "measures"}),
    "comparison": lambda content: {"metrics", "findings", "notes"} <= content.keys(),
    "tokenizer": lambda content: {"model", "added_tokens"} <= content.keys(),
}
# the same for files that aren't JSON -> what stands near their beginning
MARKS = {"evaluation picture": b"evaluate.py", "table of scores": b"index.npy", "list of samples": b"evaluate.py"}
MARKS["list of texts"] = b""  # generate.py looks at each of its lines
# in a directory with one of these, tokenizer.json belongs to them
OWNERS_OF_TOKENIZERS = ("meta.json", "metrics.jsonl", "best_model.pt", "*.safetensors*")


def is_of_kind(path: Path, kind: str) -> bool:
    """Whether a file is what a script of ours writes as a `kind`, one of KINDS or MARKS."""
    if kind in MARKS:
        return path.is_file() and MARKS[kind] in peek(path)
    content = peek_json(path)
    return isinstance(content, dict) and KINDS[kind](content)


def output_file(name: str, kind: str, sources: Iterable[Path], make_parents: bool = False) -> Path:
    """The file that --output names, checked before the work begins. kind: one of KINDS or MARKS. sources: what the call reads.

    Raises ValueError where writing there would fail, or replace anything but an earlier file of the same kind.
    """
    path = Path(name)
    parent = path.parent
    while make_parents and not parent.exists():
        parent = parent.parent
    problems = {
        "it is a symbolic link": path.is_symlink(),
        "it is a directory": path.is_dir() or name.endswith(os.sep),
        "it is no ordinary file": path.exists() and not path.is_file(),
        f"there is no directory {parent}": not parent.is_dir(),
        f"{parent} is not writable": not os.access(parent, os.W_OK | os.X_OK),
        "it is read-only": path.exists() and not os.access(path, os.W_OK),
        "this command reads it": path.exists() and any(source.exists() and path.samefile(source) for source in sources),
        f"it is there already and no {kind} of ours": path.is_file() and path.stat().st_size and not is_of_kind(path, kind),
        f"it belongs to what is in {parent}": kind == "tokenizer"
        and path.exists()
        and any(next(parent.glob(owner), None) for owner in OWNERS_OF_TOKENIZERS),
    }
    for problem, there in problems.items():
        if there:
            raise ValueError(f"{path} can't be written: {problem}; choose another --output")
    for left in temporary_paths(parent, re.escape(path.name[:100])):
        if left.is_file() and time.time() - left.stat().st_mtime > HOUR:
            left.unlink()
    return path


# ---------------------------------------------------------------- directories


@contextlib.contextmanager
def sole_writer(directory: Path, kind: str, flag: str, temporary: str) -> Iterator[bool]:
    """Make a directory if it is missing, and be its only writer of a kind (train, data, export) until the context ends.

    temporary: a regular expression of the names under whose temporary names only this kind writes; what a killed writer left there is
    removed. Yields whether a writer of this kind was killed here. Readers need no lock; the system takes it from a process that ends.
    Raises ValueError where another process writes, or no directory can be; OSError. A directory that stays empty is removed at the end.
    """
    if os.path.lexists(directory) and not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; move it away, or choose another --{flag}")
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    path = directory / f".{kind}.lock"
    lock, whole = FileLock(path, timeout=0.2), False
    try:
        try:
            with naming(directory):
                directory.mkdir(parents=True, exist_ok=True)
                killed = path.exists()
                lock.acquire()
        except Timeout:
            raise ValueError(f"another process is writing to {directory}; wait for its end, or choose another --{flag}") from None
        try:
            for left in temporary_paths(directory, temporary):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield killed
            whole = True
        finally:
            try:
                if whole or not killed:  # else the next writer has to know too
                    with contextlib.suppress(OSError):  # Windows deletes no open file, and filelock does it there
                        path.unlink()
            finally:
                lock.release()
    finally:
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()


def check_names(directory: Path, names: Iterable[str], ours: Collection[str], flag: str, folders: Collection[str] = ()) -> None:
    """Raise ValueError if a name that is going to be written or deleted in a directory is taken by something that isn't ours.

    ours: the names that we wrote there; folders: those of them that are directories.
    """
    for path in (directory / name for name in names):
        if os.path.lexists(path):
            misplaced = path.is_dir() and not path.is_symlink() and path.name not in folders
            if path.name not in ours or misplaced:
                raise ValueError(f"{path} is in the way and was not written by this program; move it away, or choose another --{flag}")


def check_sources(doomed: Iterable[Path], sources: Iterable[Path], flag: str) -> None:
    """Raise ValueError if one of the files or folders that are going to be deleted or replaced is, or holds, what this call reads."""
    doomed = [path.resolve() for path in doomed]
    for source in sources:
        if any(source.resolve().is_relative_to(path) for path in doomed):
            raise ValueError(f"this command reads {source}, and would delete it there; choose another --{flag}")
