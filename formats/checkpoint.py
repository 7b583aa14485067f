"""Checkpoints: .pt files of tensors and plain Python values only, which carry their tokenizer. Integrity is checked before each load."""

import zipfile
from pathlib import Path

from utils import describe, write_atomically

import torch

from config import GPTConfig, TrainConfig
from models import GPT

FORMAT_VERSION = 1
REQUIRED = {"format_version", "model_config", "train_config", "tokenizer", "data", "step", "model"}


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint atomically and durably. Raises OSError; then a checkpoint of that name is what it was before."""
    try:
        write_atomically(path, lambda file: torch.save({"format_version": FORMAT_VERSION} | content, file))
    except RuntimeError as error:  # torch's own writer hides the system's reason
        raise OSError(f"{path} could not be written; is the disk full? ({describe(error)[:100]})") from None


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
        raise ValueError(f"{path} is damaged or no checkpoint ({describe(error)[:120]}); take another one, or train again") from None
    if not isinstance(content, dict) or not content.keys() >= REQUIRED:
        raise ValueError(f"{path} is no checkpoint of this project; give a .pt file that train.py wrote")
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {content['format_version']}, this program reads {FORMAT_VERSION}")
    try:
        GPTConfig(**content["model_config"])
        TrainConfig(**content["train_config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its configuration is not this program's ({error}); train again") from None
    return content


def load_weights(model: GPT, weights: dict, name: str) -> None:
    """Put weights into a model; those saved from a compiled module too. Raises ValueError if they don't fit."""
    try:
        model.load_state_dict({key.removeprefix("_orig_mod."): value for key, value in weights.items()})
    except RuntimeError as error:
        raise ValueError(f"{name}: weights and configuration do not fit together ({describe(error)[:200]})") from None
