"""Folders of `transformers`, and the names and shapes under which it knows our two families: the one place for export and --init_from.

Each family has a reference implementation there: gpt2 -> GPT2LMHeadModel, qwen3 -> Qwen3ForCausalLM. Rotary positions rotate the same
halves of a head in both, so no weight is permuted.
"""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from config import GPTConfig

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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = config_from_hf(json.loads((path / "config.json").read_text(encoding="utf-8")))
        index = path / "model.safetensors.index.json"
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"it names {outside[0]!r}, a file outside of the folder")
        weights = {key: weight for name in names for key, weight in load_file(path / name).items()}
        tokenizer = (path / "tokenizer.json").read_bytes().decode()
        model = from_hf(config, weights)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} has no {Path(str(error.filename or error)).name}; an HF folder needs config.json, safetensors and tokenizer.json"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read as an HF folder: {' '.join(str(error).split())[:200]}") from None
    return {
        "model_config": dataclasses.asdict(config),
        "train_config": {},
        "tokenizer": tokenizer,
        "data": [],
        "step": 0,
        "model": model,
    }


def hf_config(config: GPTConfig, eot_id: int) -> dict:
    """config.json of the reference. It spells out what transformers would otherwise default to, which is wrong for small models."""
    common = {
        "vocab_size": config.vocab_size,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    if config.arch == "gpt2":
        return common | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": config.block_size,
            "n_ctx": config.block_size,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.mlp_width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
        }
    return common | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "rope_theta": config.theta,  # read by transformers 4, llama.cpp and vLLM
        "rope_parameters": {"rope_type": "default", "rope_theta": config.theta},  # by transformers 5
    }


def config_from_hf(values: dict) -> GPTConfig:
    """The shape of a reference model by its config.json. Raises ValueError for a model that ours can't be equal to."""

    def expect(name: str, value, default) -> None:
        if values.get(name, default) != value:
            raise ValueError(f"its {name} is {values.get(name, default)!r}, ours is always {value!r}")

    kind = values.get("model_type")
    if kind not in ("gpt2", "qwen3"):
        raise ValueError(f"its model_type is {kind!r}; only gpt2 and qwen3 can be read")
    try:
        if kind == "gpt2":
            expect("activation_function", "gelu_new", "gelu_new")
            expect("layer_norm_epsilon", 1e-5, 1e-5)
            expect("tie_word_embeddings", True, True)
            return GPTConfig(
                block_size=values["n_positions"],
                vocab_size=values["vocab_size"],
                n_layer=values["n_layer"],
                n_head=values["n_head"],
                n_embd=values["n_embd"],
                n_hidden=values.get("n_inner") or None,
                arch="gpt2",
            )
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        expect("tie_word_embeddings", True, False)
        expect("hidden_act", "silu", "silu")
        expect("rms_norm_eps", 1e-6, 1e-6)
        expect("attention_bias", False, False)
        expect("use_sliding_window", False, False)
        expect("head_dim", values["hidden_size"] // values["num_attention_heads"], 128)
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"its rope_type is {rope['rope_type']!r}, ours is always 'default'")
        return GPTConfig(
            block_size=values["max_position_embeddings"],
            vocab_size=values["vocab_size"],
            n_layer=values["num_hidden_layers"],
            n_head=values["num_attention_heads"],
            n_embd=values["hidden_size"],
            n_hidden=values["intermediate_size"],
            n_kv_head=values.get("num_key_value_heads"),
            rope_theta=rope.get("rope_theta", values.get("rope_theta")),
            arch="qwen3",
        )
    except KeyError as error:
        raise ValueError(f"its config.json has no {error}") from None


def to_hf(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of models.GPT under the reference's names and shapes, without the tied output layer, as transformers saves it."""
    if config.arch == "gpt2":
        result = {f"transformer.{name}": _conv1d(name, weight) for name, weight in weights.items()}
        for name in [name for name in result if name.endswith(".weight") and "wte" not in name and "wpe" not in name]:
            outputs = result[name].size(-1)
            result.setdefault(name.removesuffix("weight") + "bias", torch.zeros(outputs))  # the reference has no switch for biases
        return result
    return {
        theirs: part.contiguous()
        for name, parts in _qwen3_names(config).items()
        for theirs, part in zip(parts, weights[name].split(_rows(config, name, len(weights[name]))), strict=True)
    }


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


def _rows(config: GPTConfig, name: str, rows: int) -> list[int] | int:
    """How the rows of one of our weights are shared among the reference's."""
    if name.endswith("c_attn.weight"):
        return [heads * config.head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    return config.mlp_width if name.endswith("c_fc.weight") else rows
