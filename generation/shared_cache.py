"""ONNX files of our own with a cache that stays where it is: a step writes one token into it, where the file itself makes a new one.

For this the file's graph is changed in memory: onnxruntime's own GroupQueryAttention takes the place of Attention, and finds by itself how
long each row is, so that the mask goes. That saves a sixth to a quarter of a step of a small model (MEASUREMENTS.md, 14).
"""

import numpy as np
import torch
from torch import Tensor

from formats.onnx_file import PAST, PRESENT, OnnxFile, read_proto
from generation.onnx_engine import OnnxEngine, cache_names

LARGEST = 2**30  # bytes of a file; a graph is handed over as one protobuf of at most twice that
OURS = "export_model.py"  # who wrote the file
LENGTHS = ("seqlens_k", "total_sequence_length")  # inputs: last position of each row (B,) int32, and how long the longest row is


def can_share(file: OnnxFile) -> bool:
    """Whether a file's graph can be changed so. onnxruntime wants head_dim to be a multiple of 16."""
    small = file.path.stat().st_size <= LARGEST and file.config.head_dim % 16 == 0
    return file.cached and small and read_proto(file.path).producer_name == OURS


def shared_graph(file: OnnxFile) -> bytes:
    """The file's graph with a cache in place, as serialised onnx.ModelProto."""
    from onnx import TensorProto, helper

    proto = read_proto(file.path)
    graph, made_by = proto.graph, {name: node for node in proto.graph.node for name in node.output}
    kept, needed = [], {value.name for value in graph.output}
    for node in reversed(graph.node):  # what only the mask needed goes with it
        if needed.isdisjoint(node.output):
            continue
        if node.op_type == "Attention":
            query, key, value, _, *past = node.input
            turned = made_by[query].op_type == "RotaryEmbedding"
            (query, cos, sin), key = (made_by[query].input[:3], made_by[key].input[0]) if turned else ((query, "", ""), key)
            inputs = [query, key, value, *past, *LENGTHS, *([cos, sin] if turned else [])]
            options = {"num_heads": file.config.n_head, "kv_num_heads": file.config.kv_heads, "do_rotary": int(turned)}
            node = helper.make_node("GroupQueryAttention", inputs, node.output, node.name, domain="com.microsoft", **options)
        kept.append(node)
        needed.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    inputs = [value for value in graph.input if value.name in needed]
    inputs += [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name, shape in zip(LENGTHS, (["batch_size"], []))]
    for value in (*inputs, *graph.output):
        if value.name.startswith((f"{PAST}.", f"{PRESENT}.")):
            value.type.tensor_type.shape.dim[2].dim_param = "block_size"
    del graph.input[:]
    graph.input.extend(inputs)
    if not any(opset.domain == "com.microsoft" for opset in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto.SerializeToString()


class SharedEngine(OnnxEngine):
    """Rows stand left-aligned in caches of block_size; padding behind a row is not looked at, and the next token takes its place."""

    graph = staticmethod(shared_graph)

    def __init__(self, file: OnnxFile, threads: int | None = None):
        super().__init__(file, threads)
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.cache: list[np.ndarray] = []  # keys and values of each layer, (B, K, block_size, D)
        self.bound = {}  # rows, tokens -> binding, inputs and logits for that many

    def bind(self, rows: int, tokens: int):
        """A binding to the cache for that many tokens, the arrays it reads, by name, and the one it writes logits to."""
        from onnxruntime import OrtValue

        if (rows, tokens) not in self.bound:
            shapes = {"input_ids": (rows, tokens), "position_ids": (rows, tokens)}
            arrays = {name: np.zeros(shape, np.int64) for name, shape in shapes.items() if name in self.inputs}
            arrays |= {LENGTHS[0]: np.zeros(rows, np.int32), LENGTHS[1]: np.zeros((), np.int32)}
            logits, binding = np.empty((rows, tokens, self.config.vocab_size), np.float32), self.session.io_binding()
            for name, array in arrays.items():
                binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
            for past, present, array in zip(cache_names(self.file, PAST), cache_names(self.file, PRESENT), self.cache, strict=True):
                value = OrtValue.ortvalue_from_numpy(array)
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present, value)
            binding.bind_ortvalue_output("logits", OrtValue.ortvalue_from_numpy(logits))
            self.bound[rows, tokens] = binding, arrays, logits
        return self.bound[rows, tokens]

    def run(self, ids: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, T, V) of ids (B, T) at their positions, each row being so long with them."""
        binding, arrays, logits = self.bind(*ids.shape)
        for name, value in (("input_ids", ids), ("position_ids", positions), (LENGTHS[0], lengths - 1), (LENGTHS[1], lengths.max())):
            if name in arrays:
                arrays[name][...] = value.numpy()
        self.session.run_with_iobinding(binding)
        return torch.from_numpy(logits.copy())

    def begin(self, ids: Tensor) -> Tensor:
        rows, config = len(ids), self.config
        if not self.cache or len(self.cache[0]) != rows:
            shape = (rows, config.kv_heads, config.block_size, config.head_dim)
            self.replace([np.zeros(shape, np.float32) for _ in range(2 * config.n_layer)])
        positions = torch.arange(ids.size(1)).expand_as(ids)
        return self.run(ids, positions, self.lengths)[torch.arange(rows), self.lengths - 1]

    def replace(self, cache: list[np.ndarray]) -> None:
        self.cache, self.bound = cache, {}

    def read(self, ids: Tensor) -> Tensor:
        positions = self.positions(ids.size(1))
        return torch.cat([self.run(ids[:, i : i + 1], at[:, None], at + 1) for i, at in enumerate(positions.T)], dim=1)

    def cut(self, length: int) -> None:
        pass  # what stands behind a row's length is not looked at

    def choose(self, rows: Tensor) -> None:
        self.replace([array[rows.numpy()] for array in self.cache])
