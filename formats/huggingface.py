"""Folders of `transformers`, and the names and shapes under which it knows our two families: the one place for export and --init_from.

Each family has a reference implementation there: gpt2 -> GPT2LMHeadModel, qwen3 -> Qwen3ForCausalLM. Rotary positions rotate the same
halves of a head in both, so no weight is permuted.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import GPTConfig

# our field -> its name in the reference's config.json; vocab_size is called so everywhere
SHAPES = {
    "gpt2": {"block_size": "n_positions", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_hidden": "n_inner"},
    "qwen3": {
        "block_size": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "n_embd": "hidden_size",
        "n_hidden": "intermediate_size",
    },
}
# what ours always is, and what a config.json that doesn't say means too; except that a Qwen3 is then not tied
FIXED = {
    "gpt2": {"tie_word_embeddings": True, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    "qwen3": {"tie_word_embeddings": True, "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False},
}
# our module in a block -> the reference's modules, whose rows stand one after the other in ours
QWEN3_BLOCK = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.c_proj": ("mlp.down_proj",),
}


def is_folder(path: Path) -> bool:
    """Whether a directory looks like a model that transformers saved."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors*"))


def load_folder(path: Path) -> dict:
    """A folder of transformers (GPT-2 or Qwen3) as the content of a checkpoint. Raises ValueError where ours can't be the same model."""
    try:
        config = config_from_hf(json.loads((path / "config.json").read_text(encoding="utf-8")))
        index = path / "model.safetensors.index.json"
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"it names {outside[0]!r}, a file outside of the folder")
        weights = {key: weight for name in names for key, weight in load_file(path / name).items()}
        tokenizer = (path / "tokenizer.json").read_bytes().decode()
        model = from_hf(config, weights)
    except FileNotFoundError as error:
        name = Path(str(error.filename or error)).name
        raise ValueError(f"{path} has no {name}; an HF folder needs config.json, safetensors and tokenizer.json") from None
    except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read as an HF folder: {' '.join(str(error).split())[:200]}") from None
    return {"model_config": dataclasses.asdict(config), "train_config": {}, "tokenizer": tokenizer, "data": [], "step": 0, "model": model}


def hf_config(config: GPTConfig, eot_id: int) -> dict:
    """config.json of the reference. It spells out what transformers would otherwise default to, which is wrong for small models."""
    ours = dataclasses.asdict(config) | {"n_hidden": config.mlp_width, "n_kv_head": config.kv_heads}
    hf = {"model_type": config.arch, "vocab_size": config.vocab_size, "bos_token_id": eot_id, "eos_token_id": eot_id, "dtype": "float32"}
    hf |= FIXED[config.arch] | {theirs: ours[name] for name, theirs in SHAPES[config.arch].items()}
    if config.arch == "gpt2":
        hf |= dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), config.dropout)
        return hf | {"architectures": ["GPT2LMHeadModel"], "n_ctx": config.block_size}
    return hf | {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": config.head_dim,
        "attention_dropout": config.dropout,
        "rope_theta": config.theta,  # read by transformers 4, llama.cpp and vLLM
        "rope_parameters": {"rope_type": "default", "rope_theta": config.theta},  # by transformers 5
    }


def config_from_hf(values: dict) -> GPTConfig:
    """The shape of a reference model by its config.json. Raises ValueError for a model that ours can't be equal to."""
    kind = values.get("model_type")
    if kind not in ("gpt2", "qwen3"):
        raise ValueError(f"its model_type is {kind!r}; only gpt2 and qwen3 can be read")
    names = SHAPES[kind] | {"vocab_size": "vocab_size"}
    if missing := [theirs for theirs in names.values() if theirs not in (*values, "n_inner", "num_key_value_heads")]:
        raise ValueError(f"its config.json has no {missing[0]!r}")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = rope.get("rope_theta", values.get("rope_theta")) if kind == "qwen3" else None
    config = GPTConfig(**{ours: values.get(theirs) for ours, theirs in names.items()}, rope_theta=theta, arch=kind)
    fixed = FIXED[kind]
    if kind == "qwen3":
        fixed = fixed | {"head_dim": config.head_dim, "use_sliding_window": False, "rope_type": "default"}
        values = {"tie_word_embeddings": False, "head_dim": 128} | values | {"rope_type": rope.get("rope_type", "default")}
    for name, ours in fixed.items():
        if values.get(name, ours) != ours:
            raise ValueError(f"its {name} is {values[name]!r}, ours is always {ours!r}")
    return config


def to_hf(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of models.GPT under the reference's names and shapes, without the tied output layer, as transformers saves it."""
    result = {}
    if config.arch == "qwen3":
        heads = [count * config.head_dim for count in (config.n_head, config.kv_heads, config.kv_heads)]
        for name, parts in _qwen3_names(config).items():
            rows = heads if len(parts) == 3 else len(weights[name]) // len(parts)
            result |= {theirs: part.contiguous() for theirs, part in zip(parts, weights[name].split(rows), strict=True)}
        return result
    for name, weight in weights.items():
        result[f"transformer.{name}"] = _conv1d(name, weight)
        if name.endswith(".weight") and not name.startswith(("wte", "wpe")):  # the reference has no switch for biases
            result.setdefault(f"transformer.{name.removesuffix('weight')}bias", torch.zeros(len(weight)))
    return result


def from_hf(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of to_hf, float32. Raises ValueError if weights are missing, left over, or the output layer isn't the embedding."""
    weights = {name.removeprefix("transformer."): weight.float() for name, weight in weights.items()}
    embedding = "wte.weight" if config.arch == "gpt2" else "model.embed_tokens.weight"
    head = weights.pop("lm_head.weight", None)
    try:
        if head is not None and not torch.equal(head, weights[embedding]):
            raise ValueError("its output layer is not its embedding, as ours is")
        if config.arch == "gpt2":  # old files carry the causal mask too
            return {name: _conv1d(name, w) for name, w in weights.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
        result = {name: torch.cat([weights.pop(part) for part in parts]) for name, parts in _qwen3_names(config).items()}
    except KeyError as error:
        raise ValueError(f"it has no weight {error}") from None
    if weights:
        raise ValueError(f"it has weights that ours has no place for: {', '.join(sorted(weights)[:3])}")
    return result


def _conv1d(name: str, weight: Tensor) -> Tensor:
    """GPT-2's Conv1D stores the matrices inside the blocks as (in, out), ours are (out, in)."""
    return weight.T.contiguous() if weight.dim() == 2 and name.startswith("h.") else weight


def _qwen3_names(config: GPTConfig) -> dict[str, tuple[str, ...]]:
    """Our name of each weight -> the reference's names of its parts."""
    names = {"wte.weight": ("model.embed_tokens.weight",), "ln_f.weight": ("model.norm.weight",)}
    for layer in range(config.n_layer):
        for module, parts in QWEN3_BLOCK.items():
            names[f"h.{layer}.{module}.weight"] = tuple(f"model.layers.{layer}.{part}.weight" for part in parts)
    return names
