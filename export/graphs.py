"""The network as a graph that runs without this repository: token ids (B, T) int64 -> logits (B, T, V) float32, T up to block_size.

Each file also holds two texts, `tokenizer` and `config`, see export.companions.properties.
"""

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from export.companions import encoder, properties
from export.verify import Loaded, Source, example_ids
from formats.onnx_file import OnnxFile
from formats.outputs import write_atomically
from generation.onnx_engine import OnnxNetwork
from models import GPT


class LogitsOnly(nn.Module):
    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)[0]


def examples(model: GPT) -> tuple[tuple[Tensor], dict]:
    """Token ids to export a graph with, and which of their sizes may be others: any batch, any length up to block_size."""
    block = model.config.block_size
    length = torch.export.Dim("length", max=block) if block > 1 else torch.export.Dim.STATIC
    return (example_ids(model, 2, min(block, max(2, block // 2))),), {"input_ids": {0: torch.export.Dim("batch"), 1: length}}


def write_onnx(source: Source, path: Path) -> Loaded:
    """One file for onnxruntime and other runtimes."""
    options = {"dynamo": True, "input_names": ["input_ids"], "output_names": ["logits"]}
    ids, sizes = examples(source.model)
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter reports its own steps
        proto = torch.onnx.export(LogitsOnly(source.model), ids, dynamic_shapes=sizes, **options).model_proto
    for name, text in properties(source).items():
        proto.metadata_props.add(key=name, value=text)
    write_atomically(path, lambda file: file.write(proto.SerializeToString()))
    file = OnnxFile.read(path)
    return Loaded(OnnxNetwork(file).features, encode=encoder(file.texts["tokenizer"], source.tokenizer.eot_id))


def write_torch_export(source: Source, path: Path) -> Loaded:
    """One file for torch.export.load."""
    ids, sizes = examples(source.model)
    program = torch.export.export(LogitsOnly(source.model), ids, dynamic_shapes=sizes)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files=properties(source))
    write_atomically(path, lambda file: file.write(content.getbuffer()))
    inside = {"tokenizer": ""}  # torch fills it in
    loaded = torch.export.load(str(path), extra_files=inside).module()
    return Loaded(loaded, encode=encoder(inside["tokenizer"], source.tokenizer.eot_id))


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
    example = example_ids(source.model, 2, source.model.config.block_size // 2 + 1)
    traced = torch.jit.trace(LogitsOnly(source.model), example, check_trace=False)
    follow_the_input(traced)
    content = io.BytesIO()
    torch.jit.save(traced, content, _extra_files=properties(source))  # into memory: on a full disk torch's own writer ends the process
    write_atomically(path, lambda file: file.write(content.getbuffer()))
    inside = {"tokenizer": ""}  # torch fills it in, with bytes
    loaded = torch.jit.load(str(path), _extra_files=inside)
    return Loaded(loaded, encode=encoder(inside["tokenizer"].decode(), source.tokenizer.eot_id))
