"""nanoGPT as a peer: its own scripts, run unchanged from its own checkout, and what they print and save."""

import contextlib
import importlib.util
import io
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from benchmarks.harness import Finished, flags, run
from config import GPTConfig


def lay_out(checkout: Path, cwd: Path) -> Path:
    """A directory in which nanoGPT's train.py runs unchanged, with data of its own in data/bench."""
    directory = cwd / "nanogpt"
    (directory / "data" / "bench").mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py"):
        (directory / name).symlink_to((checkout / name).resolve())
    return directory


def train(directory: Path, values: dict, device: str, *config: str) -> Finished:
    """Its training as its README runs it on a CPU (uncompiled, float32), or with its own defaults on a GPU. config: its configuration."""
    common = {"dataset": "bench", "device": device, "eval_iters": 1, "log_interval": 1, "dropout": 0.0, "gradient_accumulation_steps": 1}
    uncompiled = {"compile": False} if device == "cpu" else {}
    return run([sys.executable, "train.py", *config, *flags(common | uncompiled | values)], directory)


def step_seconds(output: str) -> list[float]:
    """Seconds of each iteration from what its training printed, without the first and the last, which evaluate too."""
    times = [float(found) / 1e3 for found in re.findall(r"^iter \d+: loss .*, time ([\d.]+)ms", output, re.MULTILINE)]
    return times[1:-1]


def load_module(path: Path) -> ModuleType:
    """Its model.py, from where it lies."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_model(checkout: Path, config: GPTConfig) -> torch.nn.Module:
    """Its network with the shape of ours and random weights."""
    module, names = load_module(checkout / "model.py"), ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its size
        return module.GPT(module.GPTConfig(**{name: getattr(config, name) for name in names}, dropout=0.0, bias=True)).eval()


def validate(directory: Path) -> tuple[float, int]:
    """Nats per token of its checkpoint on the whole validation split, each token predicted once, and its number of parameters."""
    module = load_module(directory / "model.py")
    saved = torch.load(directory / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    model = module.GPT(module.GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict({name.removeprefix("_orig_mod."): weight for name, weight in saved["model"].items()})
    tokens = torch.from_numpy(np.fromfile(directory / "data" / "bench" / "val.bin", np.uint16).astype(np.int64))
    size, nats = saved["model_args"]["block_size"], 0.0
    with torch.inference_mode():
        for x, y in zip(tokens[:-1].split(size), tokens[1:].split(size)):
            nats += model(x[None], y[None])[1].item() * len(y)
    return nats / (len(tokens) - 1), sum(p.numel() for p in model.parameters())
