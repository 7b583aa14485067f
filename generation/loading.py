"""What `--checkpoint NAME` means, as what computes: a network that predicts, an engine that continues texts."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from utils import describe, notice, threads_for

import torch
from filelock import FileLock

from formats.export_record import find_export, model_sha256
from formats.onnx_file import ENDING, OnnxFile
from formats.run_directory import find_checkpoint, load_model
from formats.tokenizer import TextTokenizer
from generation.engines import Engine
from generation.onnx_engine import CachedEngine, OnnxNetwork, RecomputingEngine
from generation.shared_cache import SharedEngine, can_share
from generation.torch_engine import TorchEngine
from models import GPT

Network = GPT | OnnxNetwork
Backend = Literal["auto", "torch", "onnx"]
EXPORT = "onnx_cache"  # the format that a backend takes in place of a checkpoint


def read_onnx(path: Path) -> OnnxFile:
    """An ONNX file, told in a line. Raises ValueError."""
    file = OnnxFile.read(path)
    notice(f"{path}, in onnxruntime on the CPU{'' if file.cached else '; without a cache, so each token reads the whole text again'}")
    return file


def onnx_engine(file: OnnxFile, threads: int | None = None) -> Engine:
    """The fastest engine for an ONNX file. threads: by default what suits its size. Raises ValueError."""
    kind = SharedEngine if can_share(file) else CachedEngine if file.cached else RecomputingEngine
    return kind(file, threads)


def load_network(name: str, device: str = "cpu") -> tuple[Network, TextTokenizer, Path, dict]:
    """As formats.run_directory.load_model, for ONNX files too, which run on the CPU whatever the device; their content is empty."""
    path = find_checkpoint(name)
    if path.suffix != ENDING:
        return load_model(str(path), device)
    file = read_onnx(path)
    return OnnxNetwork(file), file.tokenizer, path, {}


def engine_of(network: Network) -> Engine:
    """What continues texts as this network does."""
    return TorchEngine(network) if isinstance(network, GPT) else onnx_engine(network.file)


def cached_export(checkpoint: Path, make: Callable[[Path, Path], object]) -> Path:
    """The ONNX file that was made of this very checkpoint beside it or in the user's cache, where `make` puts it if it is missing or
    damaged. make: writes exports of a checkpoint into a directory. Raises ValueError, OSError."""
    if (path := find_export(checkpoint.parent, EXPORT, checkpoint)) is not None:
        return path
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "small_language_models"  # of the XDG specification
    home.mkdir(parents=True, exist_ok=True)
    directory = home / model_sha256(checkpoint)
    with FileLock(home / f"{directory.name}.lock"):  # whoever comes second waits, and finds it
        if (path := find_export(directory, EXPORT, checkpoint)) is None:
            make(checkpoint, directory)
            path = find_export(directory, EXPORT, checkpoint)
    if path is None:
        raise ValueError(f"{checkpoint} was replaced while it was exported; call again")
    return path


def open_onnx(path: Path) -> tuple[Engine, TextTokenizer, Path]:
    """As `load_engine`, for an ONNX file."""
    file = read_onnx(path)
    return onnx_engine(file), file.tokenizer, path


def load_engine(
    name: str, device: str = "cpu", backend: Backend = "auto", make: Callable[[Path, Path], object] | None = None
) -> tuple[Engine, TextTokenizer, Path]:
    """What `--checkpoint NAME` means: an engine, the tokenizer, the file or HF folder. Raises FileNotFoundError, ValueError, OSError.

    backend: onnx runs an ONNX file made of the checkpoint, see `cached_export`; auto does so where one lies beside it, on a CPU.
    """
    path = find_checkpoint(name)
    if path.suffix == ENDING:
        if backend == "torch":
            raise ValueError(f"{path} is an ONNX file, which torch doesn't run; leave --backend out")
        return open_onnx(path)
    if backend == "onnx":
        if device != "cpu":
            raise ValueError(f"backend onnx computes on the CPU, not on {device}; add --device cpu, or leave --backend out")
        return open_onnx(cached_export(path, make))
    if backend == "auto" and device == "cpu" and (beside := find_export(path.parent, EXPORT, path)) is not None:
        try:
            return open_onnx(beside)
        except ValueError as error:  # onnxruntime is missing or too old, say
            notice(f"torch is used instead: {describe(error)}")
    model, tokenizer, *_ = load_model(str(path), device)
    return TorchEngine(model), tokenizer, path


def choose_threads(engine: Engine) -> None:
    """Let torch take as many threads as suit an engine of its own; onnxruntime has been told already."""
    if isinstance(engine, TorchEngine):
        torch.set_num_threads(threads_for(4 * engine.model.num_parameters()))
