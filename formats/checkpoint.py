"""Checkpoints: a run directory's contract on disk.

A run directory holds best_model.pt (weights only), step_00001000.pt (complete, resumable), metrics.jsonl, config.json, loss.png.
A .pt file holds tensors and plain Python values only, and carries its tokenizer.
"""

import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from config import GPTConfig
from formats.huggingface import is_folder, load_folder
from formats.metrics import METRICS
from formats.tokenizer import TextTokenizer
from models import GPT
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
    """What `--checkpoint NAME` means: a .pt file, a run directory (its best model), an HF folder, or a bare name under ./checkpoints.

    Raises FileNotFoundError that lists what there is.
    """
    for path in (Path(name), Path("checkpoints") / name):
        if path.is_file():
            return path
        if path.is_dir():
            for candidate in (path / BEST, *step_checkpoints(path)):
                if candidate.is_file():
                    return candidate
            if is_folder(path):
                return path
    there = sorted(str(path) for path in Path("checkpoints").glob(f"**/{BEST}"))
    raise FileNotFoundError(
        f"no checkpoint at {name}; " + (f"there is {', '.join(there)}" if there else "train a model first: python train.py")
    )


def build_model(content: dict, name: str, device: str = "cpu") -> tuple[GPT, TextTokenizer]:
    """The network of a checkpoint in evaluation mode, and its tokenizer. Raises ValueError where weights and configuration disagree."""
    try:
        model = GPT(GPTConfig(**content["model_config"]))
    except TypeError as error:
        raise ValueError(f"{name}: its configuration is not this program's ({error}); train again") from None
    load_weights(model, content["model"], name)
    return model.to(device).eval(), TextTokenizer(content["tokenizer"], name)


def load_weights(model: GPT, weights: dict, name: str) -> None:
    """Put weights into a model; those saved from a compiled module too. Raises ValueError if they don't fit."""
    try:
        model.load_state_dict({key.removeprefix("_orig_mod."): value for key, value in weights.items()})
    except RuntimeError as error:
        raise ValueError(f"{name}: weights and configuration do not fit together ({' '.join(str(error).split())[:200]})") from None


def load_model(name: str, device: str = "cpu") -> tuple[GPT, TextTokenizer, Path, dict]:
    """What `--checkpoint NAME` means: network in evaluation mode, tokenizer, the file or HF folder, its content."""
    path = find_checkpoint(name)
    content = load_folder(path) if path.is_dir() else load_checkpoint(path)
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


def find_resumed(resume: str | None, run: Path) -> tuple[Path, dict] | None:
    """The step checkpoint that --resume asks for; None to start from the beginning. Raises FileNotFoundError, ValueError."""
    if resume is None:
        return None
    if resume != "auto" and Path(resume).is_file():
        content = load_checkpoint(Path(resume))
        if "resume" not in content:
            raise ValueError(f"{resume} holds weights only and can't be resumed; give a step_*.pt or the run directory")
        return Path(resume), content
    found = newest_checkpoint(run if resume == "auto" else Path(resume))
    if found is None and resume != "auto":
        raise FileNotFoundError(f"no checkpoint at {resume}; give a run directory or a step_*.pt, or start without --resume")
    return found


def is_claimed(run: Path, resume: str | None, same_run: Callable[[dict], bool], finished: Callable[[dict], bool]) -> bool:
    """Whether a new run's directory holds that very run, finished. Raises ValueError if it holds another one that must not be deleted."""
    if not is_occupied(run):
        return False
    newest = newest_checkpoint(run)
    if newest is not None and same_run(newest[1]) and finished(newest[1]):
        return True
    best = run / BEST
    if resume == "auto" and newest is None and (not best.exists() or same_run(load_checkpoint(best))):
        return False  # this run, begun, but stopped before its first complete checkpoint
    raise ValueError(f"{run} holds another run; continue it with --resume auto, delete it with --overwrite, or choose another --out_dir")


def check_branch(path: Path, run: Path) -> None:
    """Refuse to resume `path` where newer checkpoints would be mixed with those to come, or into another run's directory.

    Newer ones that are damaged are set aside. Raises ValueError.
    """
    if path.parent.resolve() != run.resolve():
        if is_occupied(run):
            raise ValueError(f"{run} holds a run already; choose another --out_dir to continue {path} in")
        return
    newer = [p for p in step_checkpoints(run) if p.name > path.name]
    for damaged in [p for p in newer if not is_whole(p)]:
        damaged.rename(damaged.with_suffix(".pt.damaged"))
        newer.remove(damaged)
    if newer:
        raise ValueError(f"{run} goes on to {newer[0].name}; delete what is newer than {path.name}, or continue in another --out_dir")


def clear_run(run: Path) -> None:
    """Delete what a run wrote into its directory, and what was exported from it; other files stay."""
    for name in (BEST, METRICS, "config.json", "loss.png", "evaluation.json", "best_model.onnx", "best_model.ts.pt", "tokenizer.json"):
        (run / name).unlink(missing_ok=True)
    for name in ("hf", "tensorboard"):
        shutil.rmtree(run / name, ignore_errors=True)
    for path in step_checkpoints(run):
        path.unlink()
    fsync_directory(run)
