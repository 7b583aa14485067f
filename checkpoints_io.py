"""Checkpoints: a run directory's contract on disk.

A run directory holds best_model.pt (weights only), step_00001000.pt (complete, resumable), metrics.jsonl, config.json, loss.png.
A .pt file holds tensors and plain Python values only, and carries its tokenizer.
"""

import contextlib
import dataclasses
import json
import os
import re
import warnings
import zipfile
import zlib
from pathlib import Path

import torch

from config import GPTConfig, TrainConfig
from models import GPT
from tokenizers_io import TextTokenizer
from utils import fsync_directory, notice, write_atomically

FORMAT_VERSION = 1
BEST = "best_model.pt"
METRICS = "metrics.jsonl"
REQUIRED = {"format_version", "model_config", "train_config", "tokenizer", "data", "step", "model"}


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint atomically and durably. Raises OSError; then a checkpoint of that name is what it was before."""
    write_atomically(path, lambda file: torch.save({"format_version": FORMAT_VERSION} | content, file))


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint, verified; tensors on the CPU. Raises FileNotFoundError, and ValueError that names a damaged file."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train one with train.py")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load doesn't check the archive's CRCs: most flipped bits would load silently
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib, unpickler and torch raise a dozen kinds
        raise ValueError(
            f"{path} is damaged or no checkpoint ({' '.join(str(error).split())[:120]}); take another one, or train again"
        ) from None
    if not isinstance(content, dict) or not content.keys() >= REQUIRED:
        raise ValueError(f"{path} is no checkpoint of this project; give a .pt file that train.py wrote")
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {content['format_version']}, this program reads {FORMAT_VERSION}")
    return content


def find_checkpoint(name: str) -> Path:
    """The file that `--checkpoint NAME` means: a .pt file, a run directory (its best model), or a bare name under ./checkpoints.

    Raises FileNotFoundError that lists what there is.
    """
    for path in (Path(name), Path("checkpoints") / name):
        if path.is_file():
            return path
        if path.is_dir():
            for candidate in (path / BEST, *step_checkpoints(path)):
                if candidate.is_file():
                    return candidate
    there = sorted(str(path) for path in Path("checkpoints").glob(f"**/{BEST}"))
    raise FileNotFoundError(
        f"no checkpoint at {name}; " + (f"there is {', '.join(there)}" if there else "train a model first: python train.py")
    )


def build_model(content: dict, name: str, device: str = "cpu") -> tuple[GPT, TextTokenizer]:
    """The network of a checkpoint in evaluation mode, and its tokenizer. Raises ValueError where weights and configuration disagree."""
    try:
        model = GPT(GPTConfig(**content["model_config"]))
        weights = {key.removeprefix("_orig_mod."): value for key, value in content["model"].items()}
        model.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{name}: weights and configuration do not fit together ({' '.join(str(error).split())[:200]})") from None
    return model.to(device).eval(), TextTokenizer(content["tokenizer"], name)


def load_model(name: str, device: str = "cpu") -> tuple[GPT, TextTokenizer, Path, dict]:
    """What `--checkpoint NAME` means: network in evaluation mode, tokenizer, the file, its content."""
    path = find_checkpoint(name)
    content = load_checkpoint(path)
    model, tokenizer = build_model(content, str(path), device)
    return model, tokenizer, path, content


# ---------------------------------------------------------------- a run directory


def step_path(run: Path, step: int) -> Path:
    return run / f"step_{step:08d}.pt"


def step_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first."""
    return sorted((path for path in run.glob("step_*.pt") if re.fullmatch(r"step_\d{8,}\.pt", path.name)), reverse=True)


def newest_checkpoint(run: Path) -> tuple[Path, dict] | None:
    """The newest complete checkpoint that is whole; damaged newer ones are named. None if the run has none at all.

    Raises ValueError if all are damaged.
    """
    paths = step_checkpoints(run)
    for path in paths:
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            notice(f"warning: {error}")
    if paths:
        raise ValueError(f"no checkpoint in {run} can be read; start again with --overwrite")
    return None


def delete_old_checkpoints(run: Path, keep: str) -> None:
    """Keep the newest `keep` step checkpoints (a number, or "all")."""
    if keep != "all":
        for path in step_checkpoints(run)[int(keep) :]:
            path.unlink()


def is_occupied(run: Path) -> bool:
    """Whether a directory holds a run, whole or begun."""
    return (run / METRICS).exists() or (run / BEST).exists() or bool(step_checkpoints(run))


def clear_run(run: Path) -> None:
    """Delete what a run wrote into its directory, and what was exported from it; other files stay."""
    for name in (BEST, METRICS, "config.json", "loss.png", "evaluation.json", "best_model.onnx", "best_model.ts.pt"):
        (run / name).unlink(missing_ok=True)
    for path in step_checkpoints(run):
        path.unlink()
    fsync_directory(run)


class MetricsLog:
    """metrics.jsonl: one JSON object a line, never twice after a resume.

    Each complete checkpoint remembers the file's length and CRC-32 at its moment; `truncate` goes back to it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file = open(path, "ab")  # noqa: SIM115
        self.crc = zlib.crc32(path.read_bytes())

    def write(self, **values) -> None:
        line = (json.dumps(values) + "\n").encode()
        self.file.write(line)
        self.file.flush()
        self.crc = zlib.crc32(line, self.crc)

    def state(self) -> dict[str, int]:
        """Length and checksum of all lines so far, which are durable from here on."""
        os.fsync(self.file.fileno())
        return {"bytes": self.file.tell(), "crc32": self.crc}

    def truncate(self, state: dict[str, int]) -> None:
        """Go back to a remembered state. Raises ValueError if the file's beginning is no longer what it was."""
        beginning = self.path.read_bytes()[: state["bytes"]]
        if len(beginning) != state["bytes"] or zlib.crc32(beginning) != state["crc32"]:
            raise ValueError(f"{self.path} was changed since the checkpoint was written; move it away and resume with --overwrite")
        self.file.truncate(state["bytes"])
        self.file.seek(0, 2)
        self.crc = state["crc32"]

    def close(self) -> None:
        self.file.close()


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
    train = [(line["step"], line["loss"], line["lr_factor"]) for line in lines if "loss" in line]
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
