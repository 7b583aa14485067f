"""Where scripts write: what may stand there before anything is written, and one writer at a time. Doesn't import torch.

Nothing is replaced that this program did not write, and nothing that the same call reads.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from utils import naming, temporary_paths

from filelock import FileLock, Timeout

LARGEST = 2**28  # bytes of a JSON file that could be ours
HOUR = 3600  # seconds; no write takes longer, so an older temporary file was left by a killed process


def output_path(name: str, flag: str) -> Path:
    """What a flag names as a place to write. Raises ValueError for an empty name, and for one that can't be printed and recorded."""
    if not name.strip():
        raise ValueError(f"--{flag} is empty; name a place to write, or leave it out")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"--{flag} {name!r} is not UTF-8 text; choose another name") from None
    return Path(name)


def read_json(path: Path) -> object:
    """The content of a JSON file; None for whatever can't be read as one."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() and path.stat().st_size <= LARGEST else None
    except (OSError, ValueError, RecursionError):
        return None


# ---------------------------------------------------------------- files


def _rows_with(content: object, keys: set[str]) -> bool:
    """Whether this is {name: {name: {each of the keys: ...}}}."""
    rows = [row for part in content.values() for row in (part.values() if isinstance(part, dict) else [None])]
    return bool(rows) and all(isinstance(row, dict) and keys <= row.keys() for row in rows)


# what scripts write as single files -> what tells that a JSON object is such a file
KINDS = {
    "evaluation": lambda content: _rows_with(content, {"loss", "perplexity"}),
    "comparison": lambda content: _rows_with(content, {"bits_per_byte", "above_best"}),
    "tokenizer": lambda content: {"model", "added_tokens"} <= content.keys(),
}
# in a directory with one of these, tokenizer.json belongs to them
OWNERS_OF_TOKENIZERS = ("meta.json", "metrics.jsonl", "best_model.pt", "*.safetensors*")


def is_of_kind(path: Path, kind: str) -> bool:
    """Whether a file is what a script of ours writes as a `kind`, one of KINDS."""
    content = read_json(path)
    return isinstance(content, dict) and KINDS[kind](content)


def output_file(name: str, kind: str, sources: Iterable[Path], make_parents: bool = False) -> Path:
    """The file that --output names, checked before the work begins. kind: one of KINDS. sources: what the call reads.

    Raises ValueError where writing there would fail, or replace anything but an earlier file of the same kind.
    """
    path = output_path(name, "output")
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
