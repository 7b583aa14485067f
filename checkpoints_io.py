"""Checkpoints: a run directory's contract on disk.

A run directory holds best_model.pt (weights only), step_00001000.pt (complete, resumable), metrics.jsonl, config.json, loss.png.
A .pt file holds tensors and plain Python values only, and carries its tokenizer.
"""

import re
import shutil
import zipfile
from pathlib import Path

import torch

from config import GPTConfig
from models import GPT
from run_log import METRICS
from tokenizers_io import TextTokenizer
from utils import fsync_directory, notice, write_atomically

FORMAT_VERSION = 1
BEST = "best_model.pt"
REQUIRED = {"format_version", "model_config", "train_config", "tokenizer", "data", "step", "model"}


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint atomically and durably. Raises OSError; then a checkpoint of that name is what it was before."""
    try:
        write_atomically(path, lambda file: torch.save({"format_version": FORMAT_VERSION} | content, file))
    except RuntimeError as error:  # torch's own writer hides the system's reason
        raise OSError(f"{path} could not be written; is the disk full? ({' '.join(str(error).split())[:100]})") from None


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


def is_whole(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except ValueError:
        return False
    return True


def delete_old_checkpoints(run: Path, keep: int | str) -> None:
    """Keep the newest `keep` step checkpoints (a number, or "all")."""
    if keep != "all":
        for path in step_checkpoints(run)[keep:]:
            path.unlink()


def is_occupied(run: Path) -> bool:
    """Whether a directory holds a run, whole or begun."""
    return (run / METRICS).exists() or (run / BEST).exists() or bool(step_checkpoints(run))


def clear_run(run: Path) -> None:
    """Delete what a run wrote into its directory, and what was exported from it; other files stay."""
    for name in (BEST, METRICS, "config.json", "loss.png", "evaluation.json", "best_model.onnx", "best_model.ts.pt"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "hf", ignore_errors=True)
    for path in step_checkpoints(run):
        path.unlink()
    fsync_directory(run)
