"""ONNX: the network as a graph for onnxruntime and other runtimes."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch

from export.verify import Format, LoadedModel, LogitsOnly, example_ids
from formats.tokenizer import TextTokenizer
from models import GPT


def write(model: GPT, tokenizer: TextTokenizer, path: Path) -> LoadedModel:
    """One file, input_ids (B, T) int64 -> logits (B, T, V) float32, any batch and length up to block_size."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the exporter reports its own steps
        warnings.simplefilter("ignore")
        torch.onnx.export(
            LogitsOnly(model),
            (example_ids(model, 2, max(2, model.config.block_size // 2)),),
            str(path),
            dynamo=True,
            external_data=False,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.config.block_size)}},
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda ids: session.run(["logits"], {"input_ids": ids})[0]


ONNX = Format("onnx", "{checkpoint}.onnx", write)
