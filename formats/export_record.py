"""export.json: what was exported into a directory. What it lists may be replaced by the next export, and deleted with the run."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

from utils import notice

from formats.outputs import write_json
from formats.schemas import ExportRecord, read_json

RECORD = "export.json"


def _read(directory: Path, advice: str) -> dict[str, dict]:
    """What `read_record` returns. Raises ValueError, with the advice, for what is no record of ours."""
    try:
        files = read_json(directory / RECORD, ExportRecord, advice)["files"]
    except FileNotFoundError:
        return {}
    # only names that stay inside the directory on every system: no separators, no drive, not `..`
    return {name: entry for name, entry in files.items() if name not in ("", "..") and PureWindowsPath(name).name == name}


def read_record(directory: Path) -> dict[str, dict]:
    """Name -> entry of what was exported into a directory, see `add_record`. Without a record, or with a damaged one, nothing is known."""
    try:
        return _read(directory, "what was exported before is not known any more")
    except ValueError as error:
        notice(f"warning: {error}")
        return {}


def check_exports(directory: Path, names: Iterable[str], checkpoint: Path, overwrite: bool) -> None:
    """Raise ValueError where an export of a checkpoint under one of these names would replace that checkpoint, or what is no export.

    overwrite: whether it may replace an earlier export.
    """
    other = "move it away or choose another --output"
    recorded = _read(directory, other)
    for target in (directory / name for name in names):
        if checkpoint.resolve().is_relative_to(target.resolve()):
            raise ValueError(f"{target} is what would be exported, and writing there would delete it; choose another --output")
        if os.path.lexists(target) and (target.name not in recorded or (target.is_dir() and target.suffix)):  # only folders have none
            raise ValueError(f"{target} is not in {RECORD}, so it is no export to replace; {other}")
        if os.path.lexists(target) and not overwrite:
            raise ValueError(f"{target} was exported before; replace it with --overwrite, or choose another --output")


def add_record(directory: Path, name: str, entry: dict) -> None:
    """Add what was exported as `name`, a file or folder in the directory; earlier entries stay. Raises OSError.

    entry: format, checkpoint (a name, no path), checkpoint_sha256 (unless the model was changed on the way), sha256 (of a file), torch
    (its version), and the figures of its verification.
    """
    write_json(directory / RECORD, {"files": read_record(directory) | {name: entry}})


def model_sha256(path: Path) -> str:
    """SHA-256 of a model's file; for an HF folder, of the names and hashes of the files that make up the model. Raises OSError."""
    if path.is_dir():
        files = sorted({path / "config.json", path / "tokenizer.json", *path.glob("*.safetensors*")})
        lines = (f"{file.name} {model_sha256(file)}\n" for file in files if file.is_file())
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def find_export(directory: Path, format: str, checkpoint: Path) -> Path | None:
    """The file of this format in a directory that was made from this very checkpoint and is whole. One that only seems to be is told.

    Raises OSError.
    """
    for name, entry in read_record(directory).items():
        path = directory / name
        if entry.get("format") != format or not path.is_file():
            continue
        if entry.get("checkpoint_sha256") == model_sha256(checkpoint) and entry.get("sha256") == model_sha256(path):
            return path
        if entry.get("checkpoint") == checkpoint.name:
            notice(f"{path} is not used: it is damaged, or {checkpoint} is no longer what it was made from; export it again")
    return None
