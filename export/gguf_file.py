"""GGUF, the container of llama.cpp: the network under the names and keys that it knows for GPT-2 and Qwen3, with the tokenizer inside.

The keys are those of the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md) and of what llama.cpp reads for each family.
"""

import dataclasses
from pathlib import Path
from typing import BinaryIO

from utils import describe, notice

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor

from config import GPTConfig
from export.llama_runtime import open_files
from export.quality import of_logits
from export.verify import Loaded, Measurable, Mismatch, Source
from formats.checkpoint import empty_weights
from formats.huggingface import from_hf, to_hf
from formats.outputs import write_atomically
from formats.tokenizer import EOT, PADDING, TextTokenizer, byte_level
from models import GPT

Quant = gguf.GGMLQuantizationType
Weights = dict[str, tuple[np.ndarray, Quant]]  # name -> content, bytes where it is rounded, and how it is stored
ARCHITECTURES = {"gpt2": gguf.MODEL_ARCH.GPT2, "qwen3": gguf.MODEL_ARCH.QWEN3}
FILE_TYPES = {Quant.F32: gguf.LlamaFileType.ALL_F32, Quant.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0, Quant.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0}
BITS = {Quant.F32: 32, Quant.Q8_0: 8, Quant.Q4_0: 4}  # of most weights
# our field -> its key behind the name of the family
SHAPE = {"block_size": "context_length", "n_layer": "block_count", "n_embd": "embedding_length", "n_hidden": "feed_forward_length"}
SHAPE |= {"n_head": "attention.head_count"}
OF_QWEN3 = {"n_kv_head": "attention.head_count_kv", "rope_theta": "rope.freq_base"}
UNUSED = "<|unused {}|>"  # for an id without a token; no byte-level token has a blank
NEVER = f"{EOT} {EOT}"  # a merge that no text reaches, since texts begin as single bytes


def why_not(source: Source) -> str | None:
    """Why llama.cpp could not read a text as this tokenizer does; None where it can."""
    said = source.tokenizer.description
    if said.normalizers:
        return f"llama.cpp has no {' or '.join(said.normalizers)}, which this tokenizer does to every text; prepare the data without it"
    unlike = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    if said.token_bytes is None or not said.splits_as_gpt2 or any(said.model.get(name) for name in unlike):
        kind = said.model["type"]
        return f"llama.cpp reads byte-level BPE as GPT-2 has it, unlike this tokenizer ({kind}); prepare the data with bpe, gpt2 or byte"
    return None


# ---------------------------------------------------------------- weights


def _names(config: GPTConfig) -> dict[str, str]:
    """The name of each weight in llama.cpp -> its name in transformers."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.arch], config.n_layer)
    theirs = to_hf(config, empty_weights(config, config.n_layer))
    return {names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in theirs}


def _turned(config: GPTConfig, name: str, weight: Tensor) -> Tensor:
    """The matrices inside GPT-2's blocks are (in, out) in transformers, (out, in) in llama.cpp."""
    return weight.T.contiguous() if config.arch == "gpt2" and name.startswith("blk.") and weight.dim() == 2 else weight


def to_gguf(model: GPT) -> dict[str, np.ndarray]:
    """The weights of a network under llama.cpp's names, float32. GPT-2 has biases there, always."""
    weights = to_hf(model.config, model.state_dict())
    return {name: _turned(model.config, name, weights[theirs]).numpy() for name, theirs in _names(model.config).items()}


def from_gguf(config: GPTConfig, weights: dict[str, np.ndarray]) -> GPT:
    """The network of these weights, in evaluation mode. Raises ValueError where names or shapes are not those of the configuration."""
    config, names = dataclasses.replace(config, bias=config.arch == "gpt2"), _names(config)
    found = {names.get(name, name): _turned(config, name, torch.from_numpy(weight.copy())) for name, weight in weights.items()}
    model = GPT(config)
    model.load_state_dict(from_hf(config, found))
    return model.eval()


def kind_of(name: str, weight: np.ndarray, quant: Quant) -> Quant:
    """How a weight is stored in a file of a kind, as llama.cpp's own quantizer has it: norms, biases and positions are never rounded."""
    if weight.ndim == 1 or name == "position_embd.weight":
        return Quant.F32
    if weight.shape[1] % gguf.GGML_QUANT_SIZES[quant][0]:
        return Quant.F16
    # 4 bits would double what the rounding costs: the token table is the output layer too (MEASUREMENTS.md)
    return Quant.Q8_0 if quant == Quant.Q4_0 and name == "token_embd.weight" else quant


# ---------------------------------------------------------------- writing


def _keys(arch: str) -> dict[str, str]:
    """Our field -> its key, behind the name of the family."""
    return SHAPE | (OF_QWEN3 if arch == "qwen3" else {})


def _add_keys(writer: gguf.GGUFWriter, source: Source, quant: Quant) -> None:
    config, path = source.model.config, source.path.resolve()
    name = path.name if path.is_dir() else path.parent.name
    writer.add_type("model")
    writer.add_name(name.encode(errors="replace").decode())
    writer.add_file_type(FILE_TYPES[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    values = dataclasses.asdict(config) | {"n_hidden": config.mlp_width, "n_kv_head": config.kv_heads, "rope_theta": config.theta}
    for field, key in _keys(config.arch).items():
        add = writer.add_float32 if field == "rope_theta" else writer.add_uint32
        add(f"{config.arch}.{key}", values[field])
    if config.arch == "gpt2":
        writer.add_layer_norm_eps(source.model.ln_f.eps)
    else:
        writer.add_layer_norm_rms_eps(source.model.ln_f.eps)
        for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
            add(config.head_dim)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: TextTokenizer) -> None:
    """The vocabulary in the order of its ids. A text begins with the EOT, as every text did in training."""
    ids = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    tokens = [UNUSED.format(i) for i in range(tokenizer.vocab_size)]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, i in ids.items():
        tokens[i] = token
        types[i] = gguf.TokenType.CONTROL if i in tokenizer.special_ids else gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer.description.model["merges"]] or [NEVER])  # no list is no vocabulary
    writer.add_bos_token_id(tokenizer.eot_id)
    writer.add_eos_token_id(tokenizer.eot_id)
    if PADDING in ids:
        writer.add_pad_token_id(ids[PADDING])
    writer.add_add_bos_token(True)


def _write(source: Source, path: Path, quant: Quant, weights: Weights) -> None:
    writer = gguf.GGUFWriter(None, source.model.config.arch)
    _add_keys(writer, source, quant)
    _add_tokenizer(writer, source.tokenizer)
    for name, (content, kind) in weights.items():
        writer.add_tensor_info(name, content.shape, content.dtype, content.nbytes, raw_dtype=kind)

    def write(file: BinaryIO) -> None:
        writer.fout, writer.state = [file], gguf.WriterState.EMPTY  # its own file would not be synced
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_padding(file, file.tell())
        for content, _ in weights.values():  # its own way of writing them, numpy's tofile, doesn't say why it failed
            file.write(content.data)
            writer.write_padding(file, content.nbytes)

    write_atomically(path, write)


# ---------------------------------------------------------------- reading


def read_gguf(path: Path) -> tuple[GPT, Tokenizer]:
    """The network and the byte-level BPE that a file holds, by nothing but the file."""
    reader = gguf.GGUFReader(path)

    def value(key: str):
        return reader.fields[key].contents()

    arch, tokens = value("general.architecture"), value("tokenizer.ggml.tokens")
    shape = {field: value(f"{arch}.{key}") for field, key in _keys(arch).items()}
    config = GPTConfig(arch=arch, vocab_size=len(tokens), **shape)
    model = from_gguf(config, {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors})
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges") if merge != NEVER]
    return model, byte_level(models.BPE({token: i for i, token in enumerate(tokens)}, merges))


def _stored(model: GPT, quant: Quant) -> Weights:
    weights = to_gguf(model)
    kinds = {name: kind_of(name, weight, quant) for name, weight in weights.items()}
    return {name: (gguf.quants.quantize(weight, kinds[name]), kinds[name]) for name, weight in weights.items()}


def _measurable(source: Source, path: Path, quant: Quant, model: GPT) -> tuple[Measurable, Measurable]:
    """The same model in float32 and a rounded file, by llama.cpp; where there is none, by our network with the numbers of each."""
    whole, config = path.with_name("float32.gguf"), source.model.config
    _write(source, whole, Quant.F32, _stored(source.model, Quant.F32))
    facts = [{"size": file.stat().st_size, "bits": BITS[kind]} for file, kind in ((whole, Quant.F32), (path, quant))]
    if files := open_files([whole, path], config.block_size):
        return tuple(Measurable(runtime="llama.cpp", score=file.score, pace=file.pace, **fact) for file, fact in zip(files, facts))
    scores = [of_logits(lambda ids, net=net: net(ids)[0], config) for net in (source.model, model)]
    return tuple(Measurable(runtime="our network", score=score, pace=None, **fact) for score, fact in zip(scores, facts))


def _export(source: Source, path: Path, quant: Quant) -> Loaded:
    """Write a file of a kind and read it back. Raises Mismatch where it can't be read, OSError."""
    stored = _stored(source.model, quant)
    if wide := [name for name, (_, kind) in stored.items() if kind == Quant.F16]:
        notice(f"{len(wide)} matrices such as {wide[0]} stay in 16 bits: their rows can't be cut into blocks of 32 numbers")
    _write(source, path, quant, stored)
    try:
        model, tokenizer = read_gguf(path)
    except (ValueError, LookupError, TypeError) as error:
        raise Mismatch(f"it can't be read back ({describe(error)})") from None
    loaded = Loaded(lambda ids: model(ids)[0], encode=lambda text: tokenizer.encode(text).ids)
    if quant == Quant.F32:
        return loaded
    rounded = from_gguf(source.model.config, {name: gguf.quants.dequantize(*content) for name, content in stored.items()})
    return dataclasses.replace(loaded, reference=rounded, rounded=_measurable(source, path, quant, model))


def write_gguf(source: Source, path: Path) -> Loaded:
    """One file for llama.cpp, in float32."""
    return _export(source, path, Quant.F32)


def write_q8_0(source: Source, path: Path) -> Loaded:
    """Blocks of 32 numbers, each rounded to 8 bits of their largest: a quarter of the size."""
    return _export(source, path, Quant.Q8_0)


def write_q4_0(source: Source, path: Path) -> Loaded:
    """The same with 4 bits, except for the token table, which is the output layer too."""
    return _export(source, path, Quant.Q4_0)
