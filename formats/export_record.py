"""export.json: what was exported into a directory. What it lists may be replaced by the next export, and deleted with the run."""

import os
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

from utils import notice, write_json

from formats.outputs import read_json

RECORD = "export.json"


def _read(directory: Path) -> dict[str, dict] | None:
    """What `read_record` returns; None for what is no record of ours."""
    content = read_json(directory / RECORD)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        return None
    # only names that stay inside the directory on every system: no separators, no drive, not `..`
    return {name: entry for name, entry in files.items() if name not in ("", "..") and PureWindowsPath(name).name == name}


def read_record(directory: Path) -> dict[str, dict]:
    """Name -> entry of what was exported into a directory, see `add_record`. Without a record, or with a damaged one, nothing is known."""
    record = _read(directory)
    if record is None and (directory / RECORD).exists():
        notice(f"warning: {directory / RECORD} is damaged; what was exported before is not known any more")
    return record or {}


def check_exports(directory: Path, names: Iterable[str], checkpoint: Path) -> None:
    """Raise ValueError where an export of a checkpoint under one of these names would replace that checkpoint, or what is no export."""
    other = "move it away or choose another --output"
    if os.path.lexists(directory / RECORD) and _read(directory) is None:
        raise ValueError(f"{directory / RECORD} is damaged or no record of exports; {other}")
    recorded = read_record(directory)
    for target in (directory / name for name in names):
        if checkpoint.resolve().is_relative_to(target.resolve()):
            raise ValueError(f"{target} is what would be exported, and writing there would delete it; choose another --output")
        if os.path.lexists(target) and (target.name not in recorded or (target.is_dir() and target.suffix)):  # only folders have none
            raise ValueError(f"{target} is not in {RECORD}, so it is no export to replace; {other}")


def add_record(directory: Path, name: str, entry: dict) -> None:
    """Add what was exported as `name`, a file or folder in the directory; earlier entries stay. Raises OSError.

    entry: format, checkpoint (a name, no path), largest_logit_difference, torch (its version).
    """
    write_json(directory / RECORD, {"files": read_record(directory) | {name: entry}})
