"""metrics.jsonl: what a run measures, one JSON object a line."""

import json
import math
import os
import zlib
from pathlib import Path

from utils import notice

from formats.outputs import naming, write_atomically
from formats.schemas import MetricsLine, check, read_file

METRICS = "metrics.jsonl"


class MetricsLog:
    """The file, no line twice after a resume: each complete checkpoint remembers its length and CRC-32, and a resume goes back there."""

    def __init__(self, path: Path, resumed: tuple[Path, dict[str, int]] | None = None, tensorboard_from: int | None = None):
        """Open the log for appending. resumed: the log to go on with (this one or another run's) and its remembered state.

        tensorboard_from: write the same values for TensorBoard from this step on, into tensorboard/ beside the log.
        Raises ValueError, before anything is written, if that log's beginning is no longer what it was.
        """
        beginning = b""
        if resumed is not None:
            source, state = resumed
            beginning = read_file(source)[: state["bytes"]] if source.exists() else b""
            if len(beginning) != state["bytes"] or zlib.crc32(beginning) != state["crc32"]:
                raise ValueError(f"{source} was changed since the checkpoint was written; bring it back, or start with --overwrite")
        write_atomically(path, lambda file: file.write(beginning))
        self.path, self.file = path, open(path, "ab")  # noqa: SIM115
        self.crc = zlib.crc32(beginning)
        self.board = None
        if tensorboard_from is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=tensorboard_from)

    def write(self, **values) -> None:
        known = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        line = (json.dumps(known) + "\n").encode()  # JSON has no NaN and no infinity
        with naming(self.path):
            self.file.write(line)
            self.file.flush()
        self.crc = zlib.crc32(line, self.crc)
        if self.board is None:
            return
        step = values["step"]
        numbers = values | {f"{name}/{key}": value for name, other in values.get("also", {}).items() for key, value in other.items()}
        for name, value in numbers.items():
            if isinstance(value, (int, float)) and name != "step":
                self.board.add_scalar(name.replace("val_", "validation/"), value, step)
        if values.get("sample"):
            self.board.add_text("sample", values["sample"], step)

    def state(self) -> dict[str, int]:
        """Length and checksum of all lines so far, which are durable from here on."""
        with naming(self.path):
            os.fsync(self.file.fileno())
        return {"bytes": self.file.tell(), "crc32": self.crc}

    def close(self) -> None:
        with naming(self.path):
            self.file.close()
        if self.board is not None:
            self.board.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl. An unfinished last line is left out, as are damaged ones, with a warning. ValueError for a pipe."""
    complete, lines = (read_file(path) if path.exists() else b"").split(b"\n")[:-1], []
    for number, line in enumerate(complete, 1):
        try:
            lines.append(check(line, MetricsLine, f"{path}, line {number},", "it is left out"))
        except ValueError as error:
            notice(f"warning: {error}")
    return lines
