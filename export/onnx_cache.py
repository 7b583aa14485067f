"""The network as an ONNX graph that keeps keys and values, so that a further token costs one row of work.

Inputs and outputs have the names and meaning that Optimum gives them: input_ids (batch, sequence) int64, attention_mask
(batch, past + sequence) int64, position_ids (batch, sequence) int64, past_key_values.N.key and .value (batch, key/value heads, past,
head_dim) float32 -> logits (batch, sequence, vocabulary) float32, present.N.key and .value, which are the next call's past. A past of
length 0 begins a text; a 0 in attention_mask hides what stands there, so texts of different lengths are padded on their left.

The graph is written node by node, since each node costs a step of a small model about as much as reading 50 kB of weights: the operators
of opset 23 (Attention, RMSNormalization, RotaryEmbedding) need half as many as what torch.onnx exports. Weights lie as (in, out), which a
single row is multiplied with fastest.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.companions import encoder, properties
from export.verify import Loaded, Source
from formats.onnx_file import OnnxFile
from formats.outputs import write_atomically
from generation.onnx_engine import CachedEngine, OnnxNetwork
from models import GPT, rotary_angles

OPSET, IR = 23, 11  # the first with Attention; onnxruntime 1.23 and newer read it
HIDDEN = -1e9  # added to the score of what a query may not see. Finite: a row of padding sees nothing, and must not become NaN
TABLE, HEAD = "wte.weight", "lm_head"  # the token table's initialiser, and the node of the output layer


class Graph:
    """Nodes and constants of an ONNX graph as they are written. Values are known by their names."""

    def __init__(self, model: GPT):
        self.config = model.config
        self.weights = {name: weight.detach() for name, weight in model.state_dict().items()}
        self.nodes, self.constants = [], {}

    def constant(self, name: str, value: Tensor | np.ndarray) -> str:
        from onnx import numpy_helper

        self.constants.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant("integers_" + "_".join(map(str, values)), np.array(values, np.int64))

    def add(self, kind: str, *inputs: str, outputs: tuple[str, ...] = (), name: str | None = None, **attributes) -> str:
        """A node; the name of its first output. outputs: names of all, where they matter."""
        from onnx import helper

        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, outputs or (f"{name}_output",), name, **attributes))
        return self.nodes[-1].output[0]

    def linear(self, x: str, name: str) -> str:
        """x (..., in) -> (..., out), with the weights of this name."""
        x = self.add("MatMul", x, self.constant(f"{name}.weight", self.weights[f"{name}.weight"].T), name=name)
        return self.add("Add", x, self.constant(f"{name}.bias", bias)) if (bias := self.weights.get(f"{name}.bias")) is not None else x

    def norm(self, x: str, name: str) -> str:
        scale = self.constant(f"{name}.weight", self.weights[f"{name}.weight"])
        if self.config.arch == "qwen3":
            return self.add("RMSNormalization", x, scale, epsilon=1e-6)
        bias = self.weights.get(f"{name}.bias")
        return self.add("LayerNormalization", x, scale, *([] if bias is None else [self.constant(f"{name}.bias", bias)]), epsilon=1e-5)

    def mask(self) -> str:
        """What is added to the scores, (batch, 1, sequence, total): HIDDEN for later tokens, and where attention_mask is 0."""
        from onnx import TensorProto

        sequence, total = (self.add("Shape", name, start=1, end=2) for name in ("input_ids", "attention_mask"))
        total, past = self.add("Squeeze", total), self.add("Squeeze", self.add("Sub", total, sequence))
        one, zero = (self.constant(f"integer_{n}", np.array(n, np.int64)) for n in (1, 0))
        keys = self.add("Range", zero, total, one)
        queries = self.add("Unsqueeze", self.add("Range", past, total, one), self.integers(1))
        shown = self.add("Cast", self.add("Unsqueeze", "attention_mask", self.integers(1, 2)), to=TensorProto.BOOL)
        seen = self.add("And", shown, self.add("LessOrEqual", keys, queries))
        return self.add("Where", seen, *(self.constant(f"score_{n:g}", np.array(n, np.float32)) for n in (0.0, HIDDEN)))

    def positions(self) -> tuple[str, ...]:
        """Cosines and sines of all positions, (block_size, D/2), where the family rotates."""
        if self.config.arch == "gpt2":
            return ()
        angles = rotary_angles(torch.arange(self.config.block_size), self.config)
        return tuple(self.constant(name, values) for name, values in zip(("cos", "sin"), angles, strict=True))

    def attention(self, x: str, layer: int, mask: str, turns: tuple[str, ...]) -> str:
        config, name = self.config, f"h.{layer}.attn"
        heads = (config.n_head, config.kv_heads, config.kv_heads)
        qkv = [f"{name}.{part}" for part in "qkv"]
        sizes = self.integers(*(n * config.head_dim for n in heads))
        self.add("Split", self.linear(x, f"{name}.c_attn"), sizes, outputs=(*qkv,), axis=-1)
        for i, part in enumerate("qk" if turns else ""):
            split = self.add("Reshape", qkv[i], self.integers(0, 0, heads[i], config.head_dim))
            whole = self.add("Reshape", self.norm(split, f"{name}.{part}_norm"), self.integers(0, 0, heads[i] * config.head_dim))
            qkv[i] = self.add("RotaryEmbedding", whole, *turns, "position_ids", num_heads=heads[i])
        past, present = ([f"{which}.{layer}.{part}" for part in ("key", "value")] for which in ("past_key_values", "present"))
        options = {"q_num_heads": config.n_head, "kv_num_heads": config.kv_heads}
        y = self.add("Attention", *qkv, mask, *past, outputs=(f"{name}.y", *present), **options)
        return self.linear(y, f"{name}.c_proj")

    def mlp(self, x: str, name: str) -> str:
        x = self.linear(x, f"{name}.c_fc")
        if self.config.arch == "gpt2":
            x = self.add("Gelu", x, approximate="tanh")
        else:
            gate, up = f"{name}.gate", f"{name}.up"
            self.add("Split", x, outputs=(gate, up), axis=-1, num_outputs=2)
            x = self.add("Mul", self.add("Mul", gate, self.add("Sigmoid", gate)), up)
        return self.linear(x, f"{name}.c_proj")

    def network(self, untied: bool) -> None:
        table = self.constant(TABLE, self.weights[TABLE])
        x = self.add("Gather", table, "input_ids")
        if self.config.arch == "gpt2":
            x = self.add("Add", x, self.add("Gather", self.constant("wpe.weight", self.weights["wpe.weight"]), "position_ids"))
        mask, turns = self.mask(), self.positions()
        for layer in range(self.config.n_layer):
            x = self.add("Add", x, self.attention(self.norm(x, f"h.{layer}.ln_1"), layer, mask, turns))
            x = self.add("Add", x, self.mlp(self.norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp"))
        head = self.constant("lm_head.weight", self.weights[TABLE].T) if untied else self.add("Transpose", table, perm=[1, 0])
        self.add("MatMul", self.norm(x, "ln_f"), head, outputs=("logits",), name=HEAD)


def cache_graph(source: Source, untied: bool = False):
    """The network as an onnx.ModelProto, see above. untied: the output layer gets weights of its own, as quantisation wants them;
    else it is the token table, which the runtime transposes when it loads the file."""
    from onnx import TensorProto, helper

    config, graph = source.model.config, Graph(source.model)
    graph.network(untied)

    def value(name: str, *shape: int | str):
        kind = TensorProto.FLOAT if "." in name or name == "logits" else TensorProto.INT64
        return helper.make_tensor_value_info(name, kind, shape)

    def cache(which: str, length: str):
        shape = ("batch_size", config.kv_heads, length, config.head_dim)
        return [value(f"{which}.{layer}.{part}", *shape) for layer in range(config.n_layer) for part in ("key", "value")]

    rows, total = ("batch_size", "sequence_length"), "total_sequence_length"
    inputs = [value("input_ids", *rows), value("attention_mask", "batch_size", total), value("position_ids", *rows)]
    inputs += cache("past_key_values", "past_sequence_length")
    outputs = [value("logits", *rows, config.vocab_size), *cache("present", total)]
    proto = helper.make_graph(graph.nodes, config.arch, inputs, outputs, [*graph.constants.values()])
    proto = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="export_model.py")
    helper.set_model_props(proto, properties(source))
    return proto


def save_and_load(proto, source: Source, path: Path) -> Loaded:
    """Write a graph with a cache, and load it back in onnxruntime."""
    content = proto.SerializeToString()
    write_atomically(path, lambda file: file.write(content))
    file = OnnxFile.read(path)
    return Loaded(OnnxNetwork(file).features, CachedEngine(file), encoder(file.texts["tokenizer"], source.tokenizer.eot_id))


def write_onnx_cache(source: Source, path: Path) -> Loaded:
    """One file with a cache for onnxruntime, and for what reads Optimum's names."""
    return save_and_load(cache_graph(source), source, path)
