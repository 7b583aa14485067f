"""The network as a graph that runs without this repository: token ids (B, T) int64 -> logits (B, T, V) float32, T up to block_size."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from export.verify import Loaded, Source, example_ids
from formats.outputs import write_atomically
from models import GPT


class LogitsOnly(nn.Module):
    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)[0]


def write_onnx(source: Source, path: Path) -> Loaded:
    """One file for onnxruntime and other runtimes."""
    import onnxruntime

    model, block = source.model, source.model.config.block_size
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=block)}
    options = {"dynamo": True, "input_names": ["input_ids"], "output_names": ["logits"]}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the exporter reports its own steps
        warnings.simplefilter("ignore")
        example = example_ids(model, 2, max(2, block // 2))
        program = torch.onnx.export(LogitsOnly(model), (example,), dynamic_shapes={"input_ids": sizes}, **options)
    write_atomically(path, lambda file: file.write(program.model_proto.SerializeToString()))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return Loaded(lambda ids: torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy()})[0]))


def follow_the_input(traced: torch.jit.ScriptModule) -> None:
    """Replace the device that tracing wrote into the graph by that of the token ids, so that a file from a CPU runs on a GPU too."""
    graph = traced.graph
    torch._C._jit_pass_inline(graph)  # else the parts of the model don't see the ids
    _, ids = graph.inputs()
    for constant in graph.findAllNodes("prim::Constant"):
        if constant.output().type().kind() == "DeviceObjType":
            device = graph.create("prim::device", [ids])
            device.output().setType(constant.output().type())
            device.insertBefore(constant)
            constant.output().replaceAllUsesWith(device.output())


def write_torchscript(source: Source, path: Path) -> Loaded:
    """One file for torch.jit.load, in Python or C++, on any device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated in favour of torch.export, and tracing asks to mind the length
        example = example_ids(source.model, 2, source.model.config.block_size // 2 + 1)
        traced = torch.jit.trace(LogitsOnly(source.model), example, check_trace=False)
        follow_the_input(traced)
        content = io.BytesIO()
        torch.jit.save(traced, content)  # into memory: on a full disk torch's own writer ends the process
        write_atomically(path, lambda file: file.write(content.getbuffer()))
        return Loaded(torch.jit.load(str(path)))
