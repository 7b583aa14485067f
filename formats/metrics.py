"""What a run writes for people and programs to read: metrics.jsonl, config.json, loss.png."""

import contextlib
import dataclasses
import json
import math
import os
import warnings
import zlib
from pathlib import Path

from config import GPTConfig, TrainConfig
from utils import write_atomically

METRICS = "metrics.jsonl"


def finite(value: object) -> bool:
    """False for the numbers that JSON has no form for."""
    return not isinstance(value, float) or math.isfinite(value)


class MetricsLog:
    """metrics.jsonl: one JSON object a line, never twice after a resume.

    Each complete checkpoint remembers the file's length and CRC-32 at its moment; a resume goes back to it.
    """

    def __init__(self, path: Path, resumed: tuple[Path, dict[str, int]] | None = None, tensorboard_from: int | None = None):
        """Open the log for appending. resumed: the log to go on with (this one or another run's) and its remembered state.

        tensorboard_from: write the same values for TensorBoard from this step on, into tensorboard/ beside the log.

        Raises ValueError, before anything is written, if that log's beginning is no longer what it was.
        """
        self.path, beginning = path, b""
        if resumed is not None:
            source, state = resumed
            beginning = source.read_bytes()[: state["bytes"]] if source.exists() else b""
            if len(beginning) != state["bytes"] or zlib.crc32(beginning) != state["crc32"]:
                raise ValueError(f"{source} was changed since the checkpoint was written; bring it back, or start with --overwrite")
        write_atomically(path, lambda file: file.write(beginning))
        self.file = open(path, "ab")  # noqa: SIM115
        self.crc = zlib.crc32(beginning)
        self.board = None
        if tensorboard_from is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=tensorboard_from)

    def write(self, **values) -> None:
        line = (json.dumps({key: value if finite(value) else None for key, value in values.items()}) + "\n").encode()
        self.file.write(line)
        self.file.flush()
        self.crc = zlib.crc32(line, self.crc)
        if self.board is not None:
            self._write_board(values)

    def _write_board(self, values: dict) -> None:
        step = values["step"]
        numbers = values | {f"{name}/{key}": value for name, other in values.get("also", {}).items() for key, value in other.items()}
        for name, value in numbers.items():
            if isinstance(value, (int, float)) and name != "step":
                self.board.add_scalar(name.replace("val_", "validation/"), value, step)
        if values.get("sample"):
            self.board.add_text("sample", values["sample"], step)

    def state(self) -> dict[str, int]:
        """Length and checksum of all lines so far, which are durable from here on."""
        os.fsync(self.file.fileno())
        return {"bytes": self.file.tell(), "crc32": self.crc}

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; an unfinished last line is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def write_config(run: Path, model: GPTConfig, train: TrainConfig, extra: dict) -> None:
    """config.json: for people, never read back."""
    content = {"model": dataclasses.asdict(model), "train": dataclasses.asdict(train)} | extra
    write_atomically(run / "config.json", lambda file: file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()))


def plot_losses(run: Path, floor: float | None = None) -> None:
    """loss.png: training and validation loss in nats per token, the learning rate, and a perfect model's loss where it is known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(run / METRICS)
    train = [(line["step"], line["loss"], line["lr_factor"]) for line in lines if line.get("loss") is not None]
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure, axes = plt.subplots(figsize=(9, 5), dpi=110)
    if train:
        steps, losses, rates = zip(*train)
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training (one batch)")
        rate_axes = axes.twinx()
        rate_axes.plot(steps, rates, color="gray", linewidth=1, linestyle=":")
        rate_axes.set_ylabel("learning rate / peak (dotted)", color="gray")
        rate_axes.set_ylim(0, 1.05)
    if val:
        axes.plot(*zip(*val), color="tab:orange", marker="o", markersize=4, label="validation")
    for name in dict.fromkeys(name for line in lines for name in line.get("also", {})):
        also = [(line["step"], line["also"][name]["loss"]) for line in lines if name in line.get("also", {})]
        axes.plot(*zip(*also), marker="o", markersize=3, linestyle="--", label=f"validation, {name}")
        val = val + also
    if floor is not None:
        axes.axhline(floor, color="tab:green", linestyle="--", linewidth=1, label=f"a perfect model ({floor:.3f})")
    values = sorted([loss for _, loss, _ in train] + [loss for _, loss in val])
    if values:  # the first steps from ln(vocab) down would flatten the rest
        low, high = min(values[0], floor or values[0]), values[int(0.97 * (len(values) - 1))]
        axes.set_ylim(low - 0.05 * (high - low + 0.1), high + 0.1 * (high - low + 0.1))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(run.resolve().name)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.tight_layout()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks in the title
        write_atomically(run / "loss.png", lambda file: figure.savefig(file, format="png"))
    plt.close(figure)
