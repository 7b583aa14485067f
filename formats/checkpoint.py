"""Checkpoints: .pt files of tensors and plain Python values only, which carry their tokenizer. Integrity is checked before each load."""

import dataclasses
import zipfile
from pathlib import Path
from typing import Annotated, NotRequired

from utils import Natural, describe

import torch
from annotated_types import Ge
from pydantic import AllowInfNan
from torch import Tensor
from torch.overrides import TorchFunctionMode

from config import GPTConfig, TrainConfig
from formats.outputs import write_atomically
from formats.schemas import FORMAT_VERSION, Declared, Version, check
from models import GPT

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
AGAIN = "take another one, or train again"


class Progress(Declared):
    step: Natural
    best_val_loss: Annotated[float, AllowInfNan(True), Ge(0)]  # infinite before the first evaluation
    evaluations_since_best: Natural
    evaluation_due: bool
    skipped_steps: Natural


class LogState(Declared):
    bytes: Natural
    crc32: Natural


class Resume(Declared):
    """What a complete checkpoint holds beyond weights. The optimizers' own states are checked by torch when they are loaded."""

    optimizers: list[dict[str, object]]
    scaler: dict[str, object]
    ema: dict[str, Tensor] | None
    progress: Progress
    samples_seen: Natural
    environment: dict[str, str]
    metrics: LogState


class Checkpoint(Declared):
    format_version: Version
    model_config: dict[str, object]
    train_config: dict[str, object]
    tokenizer: str
    data: list[dict[str, str]]
    step: Natural
    model: dict[str, Tensor]
    init_from: NotRequired[dict[str, str] | None]
    val: NotRequired[dict[str, float | None]]
    resume: NotRequired[Resume]


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint atomically and durably. Raises OSError; then a checkpoint of that name is what it was before."""
    try:
        write_atomically(path, lambda file: torch.save({"format_version": FORMAT_VERSION} | content, file))
    except RuntimeError as error:  # torch's own writer hides the system's reason
        raise OSError(f"{path} could not be written; is the disk full? ({describe(error)[:100]})") from None


def load_checkpoint(path: Path, complete: bool = False) -> dict:
    """Read a checkpoint, verified; tensors on the CPU. complete: one that can be resumed.

    Raises FileNotFoundError, and ValueError that names a file which is damaged or whose parts don't belong together.
    """
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
        raise ValueError(f"{path} is damaged or no checkpoint ({describe(error)[:120]}); {AGAIN}") from None
    content = check(content, Checkpoint, path, AGAIN, "is no checkpoint of this project")
    if complete and "resume" not in content:
        raise ValueError(f"{path} holds weights only and can't be resumed; give a step_*.pt or the run directory")
    content["model"] = {name.removeprefix("_orig_mod."): weight for name, weight in content["model"].items()}
    try:
        config = _configuration(GPTConfig, content["model_config"], all_fields=True)
        _configuration(TrainConfig, content["train_config"], all_fields="resume" in content)
        for weights in (content["model"], content.get("resume", {}).get("ema")):
            if weights is not None:
                check_weights(weights, empty_weights(config, len(weights)))
    except ValueError as error:
        raise ValueError(f"{path} can't be used: {error}; {AGAIN}") from None
    return content


def _configuration(kind: type, values: dict, all_fields: bool):
    """The configuration that a checkpoint holds. A field that it lacks must not silently take this program's default."""
    known = {field.name for field in dataclasses.fields(kind)}
    if unlike := sorted(values.keys() - known) + sorted(known - values.keys() if all_fields else ()):
        raise ValueError(f"its {kind.__name__} and this program's differ in {', '.join(unlike[:3])}")
    return kind(**values)


class Uninitialised(TorchFunctionMode):
    """Context in which torch's layers leave their weights as they are."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if getattr(function, "__module__", None) == "torch.nn.init" else function(*args, **(kwargs or {}))


class Shapes(GPT):
    """A network for the names and shapes of its weights. To compute values on the meta device, torch would load its compiler,
    which takes a second or more."""

    def init_weights(self) -> None:
        pass


def empty_weights(config: GPTConfig, count: int) -> dict[str, Tensor]:
    """Name -> weight of a network of this shape, without memory for its values. count: how many weights a file has.

    Raises ValueError for a network that no file of so many weights holds.
    """
    if config.n_layer > count:
        raise ValueError(f"n_layer={config.n_layer}, but it holds only {count} weights")
    try:
        with torch.device("meta"), Uninitialised():
            return Shapes(config).state_dict()
    except (RuntimeError, TypeError, OverflowError):  # torch's, for sizes beyond 64 bits
        raise ValueError(f"no memory holds a network of n_embd={config.n_embd}, n_hidden={config.mlp_width}") from None


def check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError unless the weights have the expected names and shapes, and are ordinary, finite floating-point numbers."""
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"it has no weight {missing[0]!r}, which its configuration asks for")
    if left := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"it has weights that its configuration has no place for: {', '.join(left[:3])}")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)} where its configuration has {tuple(expected[name].shape)}")
        dense = weight.layout == torch.strided and weight.is_contiguous() and weight.device.type == "cpu"
        if weight.dtype not in FLOATS or not dense:
            raise ValueError(f"{name} holds no plain floating-point numbers but {str(weight.dtype).removeprefix('torch.')}")
        if not weight.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite (NaN or infinity)")


def load_weights(model: GPT, weights: dict, name: str) -> None:
    """Put weights into a model. Raises ValueError if they don't fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{name}: weights and configuration do not fit together ({describe(error)[:200]})") from None
