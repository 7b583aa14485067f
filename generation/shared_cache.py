"""ONNX files of our own with a cache that stays where it is: a step writes one token into it, where the file itself makes a new one.

For this the file's graph is changed in memory: onnxruntime's own GroupQueryAttention takes the place of Attention, and finds by itself how
long each row is, so that the mask goes. That saves a sixth to a quarter of a step of a small model (MEASUREMENTS.md, 14).
"""

import numpy as np

from formats.onnx_file import PAST, PRESENT, OnnxFile, read_proto
from generation.onnx_engine import OnnxEngine, cache_names

LARGEST = 2**30  # bytes of a file; a graph is handed over as one protobuf of at most twice that
OURS = "export_model.py"  # who wrote the file
LENGTHS = ("seqlens_k", "total_sequence_length")  # inputs: last position of each row (B,) int32, and how long the longest row is


def can_share(file: OnnxFile) -> bool:
    """Whether a file's graph can be changed so. onnxruntime wants head_dim to be a multiple of 16."""
    small = file.path.stat().st_size <= LARGEST and file.config.head_dim % 16 == 0
    return file.cached and small and file.producer == OURS


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
        self.bound = {}  # number of tokens -> binding for as many of each row, the arrays it reads, by name, and the one it writes

    def bind(self, rows: int, tokens: int) -> tuple:
        from onnxruntime import OrtValue

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
        return binding, arrays, logits

    def run(self, ids: np.ndarray, positions: np.ndarray, last: np.ndarray, longest: int) -> np.ndarray:
        """Logits (B, T, V) of ids (B, T) at their positions. last: each row's last position (B,). longest: length of the longest row."""
        rows, tokens = ids.shape
        if tokens not in self.bound:
            self.bound[tokens] = self.bind(rows, tokens)
        binding, arrays, logits = self.bound[tokens]
        for name, value in (("input_ids", ids), ("position_ids", positions), (LENGTHS[0], last), (LENGTHS[1], longest)):
            if name in arrays:
                arrays[name][...] = value
        with self.file.running():
            self.session.run_with_iobinding(binding)
        return logits.copy()

    def begin(self, ids: np.ndarray) -> np.ndarray:
        rows, config = len(ids), self.config
        if not self.cache or len(self.cache[0]) != rows:
            shape = (rows, config.kv_heads, config.block_size, config.head_dim)
            self.hold([np.zeros(shape, np.float32) for _ in range(2 * config.n_layer)])
        self.bound = {tokens: bound for tokens, bound in self.bound.items() if tokens == 1}  # prompts have many lengths
        last = self.lengths - 1
        return self.run(ids, np.arange(self.longest), last, self.longest)[np.arange(rows), last]

    def read(self, ids: np.ndarray) -> np.ndarray:
        steps = [
            self.run(ids[:, i : i + 1], self.lengths[:, None] + i, self.lengths + i, self.longest + i + 1) for i in range(ids.shape[1])
        ]
        return steps[0] if len(steps) == 1 else np.concatenate(steps, axis=1)

    def hold(self, cache: list[np.ndarray]) -> None:
        self.cache, self.bound = cache, {}

    def cut(self, length: int) -> None:
        pass  # what stands behind a row's length is not looked at

    def choose(self, rows: np.ndarray) -> None:
        self.hold([array[rows] for array in self.cache])
