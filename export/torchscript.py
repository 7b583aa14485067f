"""TorchScript: the network for torch.jit.load, in Python or C++ without this repository."""

import warnings
from pathlib import Path

import numpy as np
import torch

from export.verify import Format, LoadedModel, LogitsOnly, example_ids
from formats.tokenizer import TextTokenizer
from models import GPT


def write(model: GPT, tokenizer: TextTokenizer, path: Path) -> LoadedModel:
    """One file that takes any batch and length up to block_size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated in favour of torch.export, and tracing asks to mind the length
        traced = torch.jit.trace(LogitsOnly(model), example_ids(model, 2, model.config.block_size // 2 + 1), check_trace=False)
        torch.jit.save(traced, str(path))
        loaded = torch.jit.load(str(path))

    @torch.inference_mode()
    def logits(ids: np.ndarray) -> np.ndarray:
        return loaded(torch.from_numpy(ids)).numpy()

    return logits


TORCHSCRIPT = Format("torchscript", "{checkpoint}.ts.pt", write)
