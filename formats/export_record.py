"""export.json: what was exported into a directory. What it lists may be replaced by the next export, and deleted with the run."""

from pathlib import Path, PureWindowsPath

from utils import notice, write_json

from formats.schemas import ExportRecord, read_json

RECORD = "export.json"


def read_record(directory: Path) -> dict[str, dict]:
    """Name -> entry of what was exported into a directory, see `add_record`. Without a record, or with a damaged one, nothing is known."""
    path = directory / RECORD
    try:
        files = read_json(path, ExportRecord, "what was exported before is not known any more")["files"].items()
        # only names that stay inside the directory on every system: no separators, no drive, not `..`
        return {name: entry for name, entry in files if name not in ("", "..") and PureWindowsPath(name).name == name}
    except FileNotFoundError:
        return {}
    except ValueError as error:
        notice(f"warning: {error}")
        return {}


def add_record(directory: Path, name: str, entry: dict) -> None:
    """Add what was exported as `name`, a file or folder in the directory; earlier entries stay. Raises OSError.

    entry: format, checkpoint (a name, no path), largest_logit_difference, torch (its version).
    """
    write_json(directory / RECORD, {"files": read_record(directory) | {name: entry}})
