"""The names and shapes under which `transformers` knows our two families: the one place for export and, later, import.

gpt2 -> GPT2LMHeadModel, qwen3 -> Qwen3ForCausalLM. Rotary positions rotate the same halves there: no weight is permuted.
"""

import torch
from torch import Tensor

from config import GPTConfig

ATTENTION = {"c_attn": ("q_proj", "k_proj", "v_proj"), "c_proj": ("o_proj",), "q_norm": ("q_norm",), "k_norm": ("k_norm",)}
MLP = {"c_fc": ("gate_proj", "up_proj"), "c_proj": ("down_proj",)}
QWEN3_BLOCK = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}


def hf_config(config: GPTConfig, eot_id: int) -> dict:
    """config.json of the twin. It spells out what transformers would otherwise default to, which is wrong for small models."""
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


def to_hf(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of models.GPT under the twin's names and shapes. The tied output layer is left out, as transformers does."""
    return (_to_gpt2 if config.arch == "gpt2" else _to_qwen3)(config, weights)


def _to_gpt2(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, weight in weights.items():
        if weight.dim() == 2 and name.startswith("h."):
            weight = weight.T.contiguous()  # Conv1D stores (in, out)
        result[f"transformer.{name}"] = weight
    for name in [name for name in result if name.endswith(".weight") and "wte" not in name and "wpe" not in name]:
        outputs = result[name].size(-1)
        result.setdefault(name.removesuffix("weight") + "bias", torch.zeros(outputs))  # the twin has no switch for biases
    return result


def _to_qwen3(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {"model.embed_tokens.weight": weights["wte.weight"], "model.norm.weight": weights["ln_f.weight"]}
    rows = [heads * config.head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    for name, weight in weights.items():
        if not name.startswith("h."):
            continue
        _, layer, *module, _ = name.split(".")
        prefix = f"model.layers.{layer}."
        if len(module) == 1:
            result[f"{prefix}{QWEN3_BLOCK[module[0]]}.weight"] = weight
            continue
        names, prefix = (ATTENTION, f"{prefix}self_attn.") if module[0] == "attn" else (MLP, f"{prefix}mlp.")
        targets = names[module[1]]
        parts = weight.split(rows if module[1] == "c_attn" else len(weight) // len(targets))
        result |= {f"{prefix}{target}.weight": part.contiguous() for target, part in zip(targets, parts, strict=True)}
    return result
