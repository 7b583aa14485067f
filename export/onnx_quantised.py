"""The graph with a cache in 8 or 4 bits, for onnxruntime: weights in blocks of 32 with a scale each (MatMulNBits).

Numbers that a layer reads are rounded to 8 bits while it computes, block by block of each row. onnxruntime's other way,
`quantize_dynamic`, takes one scale for all rows of a batch, so that a text would depend on its neighbours, and one for each column of
weights; it was slower and cost more quality (MEASUREMENTS.md, 14). The token table is also the output layer and is stored once, in 8 bits
in both formats: in 4 it alone would cost about half as much quality as all other layers together.
"""

import dataclasses
import functools
import time
from pathlib import Path

import torch

from export.onnx_cache import HEAD, TABLE, cache_graph, save_and_load
from export.quality import of_logits
from export.verify import Loaded, Measurable, Source
from formats.onnx_file import OnnxFile
from generation.engines import Engine
from generation.loading import onnx_engine
from generation.onnx_engine import OnnxNetwork

BLOCK = 32  # weights with one scale
INT8 = 4  # accuracy_level of MatMulNBits: multiply 8-bit integers
STEPS = 40  # tokens of which speed is measured


def rounded(proto, bits: int, but: tuple[str, ...] = ()):
    """The graph with its matrices in so many bits, but for those of some nodes; blocks of 4 bits have a zero point too."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    options = {"block_size": BLOCK, "is_symmetric": bits == 8, "accuracy_level": INT8, "bits": bits, "nodes_to_exclude": but}
    quantizer = MatMulNBitsQuantizer(proto, **options)
    quantizer.process()
    return quantizer.model.model


def share_table(proto, source: Source) -> None:
    """Let the token table be read from the output layer's rounded weights."""
    from onnx import helper

    graph, config = proto.graph, source.model.config
    head = next(node for node in graph.node if "logits" in node.output)
    look_up = next(node for node in graph.node if TABLE in node.input)
    flat = helper.make_tensor("table_shape", 7, (2,), (config.vocab_size, -1))  # 7: int64
    shapes = [helper.make_node("Reshape", [name, flat.name], [f"table_{i}"]) for i, name in enumerate(head.input[1:3])]
    options = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    inputs = ["table_0", look_up.input[1], "table_1"]
    read = helper.make_node("GatherBlockQuantized", inputs, look_up.output, look_up.name, domain="com.microsoft", **options)
    nodes = [*shapes, read, *(node for node in graph.node if node is not look_up)]
    constants = [flat, *(constant for constant in graph.initializer if constant.name != TABLE)]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)


def quantised_graph(source: Source, bits: int):
    """The network as an onnx.ModelProto with weights of 4 or 8 bits, the output layer's of 8."""
    proto = cache_graph(source, untied=True)
    if bits < 8:
        proto = rounded(proto, bits, (HEAD,))
    proto = rounded(proto, 8)
    if source.model.config.n_embd % BLOCK == 0:  # else blocks are filled up with zeros, which a look-up would give back
        share_table(proto, source)
    return proto


def tokens_per_second(engine: Engine) -> float:
    """Tokens per second, one after the other behind half a context, 200 tokens at most."""
    block = engine.config.block_size
    ids = torch.arange(block)[None] % engine.config.vocab_size
    start = min(200, block // 2)
    engine.prefill(ids[:, : max(1, start)])
    steps = min(STEPS, block - start - 1)
    begin = time.perf_counter()
    for i in range(start, start + steps):
        engine.step(ids[:, i : i + 1])
    return steps / (time.perf_counter() - begin)


def measurable(path: Path, bits: int) -> Measurable:
    file = OnnxFile.read(path)
    engine = onnx_engine(file, threads=1)
    score = of_logits(OnnxNetwork(file).features, file.config)
    pace = functools.partial(tokens_per_second, engine) if file.config.block_size > 2 else None
    return Measurable(path.stat().st_size, score, pace, "onnxruntime", bits)


def write_rounded(source: Source, path: Path, bits: int) -> Loaded:
    loaded = save_and_load(quantised_graph(source, bits), source, path)
    whole = path.with_name("float32.onnx")  # for comparison
    save_and_load(cache_graph(source), source, whole)
    return dataclasses.replace(loaded, rounded=(measurable(whole, 32), measurable(path, bits)))


def write_int8(source: Source, path: Path) -> Loaded:
    """One file with a cache, a quarter of the size."""
    return write_rounded(source, path, 8)


def write_int4(source: Source, path: Path) -> Loaded:
    """One file with a cache, a fifth to a sixth of the size."""
    return write_rounded(source, path, 4)
