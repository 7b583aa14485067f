"""Folders of `transformers`, and the names and shapes under which it knows our two families: the one place for export and --init_from.

Each family has a reference implementation there: gpt2 -> GPT2LMHeadModel, qwen3 -> Qwen3ForCausalLM. Rotary positions rotate the same
halves of a head in both, so no weight is permuted.
"""

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import GPTConfig
from formats.checkpoint import check_weights, empty_weights
from formats.schemas import HFConfig, Index, read_file, read_json

WEIGHTS = "model.safetensors"
AGAIN = "save it again with transformers"
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
# the same for options that we leave out of what we write
NEVER = {
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False},
    "qwen3": {"use_sliding_window": False, "partial_rotary_factor": 1.0},
}
NEVER = {family: never | {"add_cross_attention": False, "is_encoder_decoder": False, "pruned_heads": {}} for family, never in NEVER.items()}
# of rope_parameters (transformers 5) and rope_scaling (4), beside rope_theta
NEVER_ROTARY = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
# options that don't change what a trained model computes: who wrote it, dropout, training, sampling, other heads
HARMLESS = set(
    """
    model_type architectures _name_or_path _commit_hash transformers_version dtype torch_dtype tokenizer_class bos_token_id
    eos_token_id pad_token_id sep_token_id unk_token_id use_cache initializer_range attn_pdrop embd_pdrop resid_pdrop
    attention_dropout n_ctx n_special predict_special_tokens gradient_checkpointing summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj rope_theta sliding_window max_window_layers _attn_implementation
    _attn_implementation_autoset attn_implementation use_bfloat16 return_dict output_attentions output_hidden_states torchscript
    chunk_size_feed_forward is_decoder problem_type task_specific_params finetuning_task id2label label2id num_labels prefix
    tie_encoder_decoder max_length min_length do_sample num_beams temperature top_k top_p repetition_penalty num_return_sequences
    """.split()  # noqa: SIM905
)
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
        config = config_from_hf(read_json(path / "config.json", HFConfig, AGAIN))
        weights = from_hf(config, _read_weights(path))
        tokenizer = read_file(path / "tokenizer.json").decode()
    except FileNotFoundError as error:
        name = Path(str(error.filename or error)).name
        raise ValueError(f"{path} has no {name}; an HF folder needs config.json, safetensors and tokenizer.json") from None
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read as an HF folder: {' '.join(str(error).split())[:300]}") from None
    return {"model_config": dataclasses.asdict(config), "train_config": {}, "tokenizer": tokenizer, "data": [], "step": 0, "model": weights}


def _read_weights(path: Path) -> dict[str, Tensor]:
    """All weights of a folder, of one file or of those that an index names, as transformers chooses. Raises ValueError, SafetensorError."""
    index, names = path / f"{WEIGHTS}.index.json", [WEIGHTS]
    if index.exists() and not (path / WEIGHTS).exists():
        names = sorted(set(read_json(index, Index, AGAIN)["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"it names {name!r}, a file outside of the folder")
        if (path / name).exists() and not (path / name).is_file():
            raise ValueError(f"{name} is no file")
        part = load_file(path / name)
        if twice := sorted(part.keys() & weights.keys()):
            raise ValueError(f"two of its files hold {twice[0]!r}")
        weights |= part
    return weights


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
    values = dict(values)
    kind = values.get("model_type")
    if kind not in ("gpt2", "qwen3"):
        raise ValueError(f"its model_type is {kind!r}; only gpt2 and qwen3 can be read")
    names = SHAPES[kind] | {"vocab_size": "vocab_size"}
    if missing := [theirs for theirs in names.values() if theirs not in (*values, "n_inner", "num_key_value_heads")]:
        raise ValueError(f"its config.json has no {missing[0]!r}")
    theta = _rope_theta(values) if kind == "qwen3" else None
    config = GPTConfig(**{ours: values.get(theirs) for ours, theirs in names.items()}, rope_theta=theta, arch=kind)
    fixed = FIXED[kind] | NEVER[kind]
    if kind == "qwen3":
        fixed |= {"head_dim": config.head_dim}
        if isinstance(layers := values.get("layer_types"), list) and len(layers) == config.n_layer:
            fixed |= {"layer_types": ["full_attention"] * len(layers)}
        values = {"tie_word_embeddings": False, "head_dim": 128} | values
    _check_options(values, fixed, HARMLESS | {*names.values()})
    return config


def _check_options(values: dict, fixed: dict[str, object], free: set[str]) -> None:
    """Raise ValueError unless each option has the value that ours always has, or is free to have any, or isn't set."""
    for name, value in values.items():
        if name in fixed and (value != fixed[name] or isinstance(value, bool) != isinstance(fixed[name], bool)):
            raise ValueError(f"its {name} is {value!r}, ours is always {fixed[name]!r}")
        if name not in fixed and name not in free and value is not None:
            raise ValueError(f"its config.json sets {name}={value!r}, an option that ours doesn't have")


def _rope_theta(values: dict) -> float | None:
    """The base of a Qwen3's rotary frequencies, None where no option says it. Raises ValueError for another kind of frequencies."""
    found = [values.get("rope_theta")]
    for name in ("rope_parameters", "rope_scaling"):
        rotary = values.pop(name, None) or {}
        if not isinstance(rotary, dict):
            raise ValueError(f"its {name} is {rotary!r}, no object")
        _check_options(rotary, NEVER_ROTARY, {"rope_theta"})
        found.append(rotary.get("rope_theta"))
    bases = [base for base in found if base is not None]
    if any(base != bases[0] for base in bases):
        raise ValueError(f"it has several values of rope_theta, {' and '.join(map(str, bases))}")
    return bases[0] if bases else None


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
    """The inverse of to_hf, float32. Raises ValueError for weights that aren't those of the reference, by name, shape and kind of number,
    and for an output layer that isn't the embedding."""
    prefix, embedding = ("transformer.", "transformer.wte.weight") if config.arch == "gpt2" else ("model.", "model.embed_tokens.weight")
    if config.arch == "gpt2":  # published files carry no prefix, old ones the causal mask too
        weights = {name if name.startswith((prefix, "lm_head.")) else prefix + name: weight for name, weight in weights.items()}
        weights = {name: weight for name, weight in weights.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    head = weights.pop("lm_head.weight", None)
    check_weights(weights, to_hf(config, empty_weights(config, len(weights))))
    if head is not None and not torch.equal(head, weights[embedding]):
        raise ValueError("its output layer is not its embedding, as ours is")
    weights = {name: weight.float() for name, weight in weights.items()}
    if config.arch == "gpt2":
        return {name.removeprefix(prefix): _conv1d(name.removeprefix(prefix), weight) for name, weight in weights.items()}
    return {name: torch.cat([weights[part] for part in parts]) for name, parts in _qwen3_names(config).items()}


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
