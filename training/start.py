"""What a run starts from: nothing, a run to resume, or another model's weights; and the configuration that follows from it."""

import dataclasses
import hashlib
import math
import os
from pathlib import Path

from config import GPTConfig, TrainConfig
from formats import checkpoint as ckpt
from formats.data_directory import TrainingData
from formats.tokenizer import TextTokenizer
from utils import notice

# What may change when a run is resumed; everything else would make it another run.
CHANGEABLE = {"max_steps", "epochs", "eval_interval", "eval_tokens", "checkpoint_interval", "keep_checkpoints", "log_interval"}
CHANGEABLE |= {"max_tokens", "patience", "sample_tokens", "sample_prompt", "tensorboard"}
CHANGEABLE |= {"device", "dtype", "compile", "warmup_steps", "learning_rate", "muon_learning_rate"}

HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium")}
HUB_FILES = ("config.json", "model.safetensors", "tokenizer.json")
OWN_SHAPE = {"dropout", "flash", "block_size"}  # what may differ from the source's shape

# For a model that already knows something: what a field is set to unless a flag says otherwise; chosen by measurement (MEASUREMENTS.md).
VALUES = {
    "learning_rate": 1e-3,  # at a width of 128; falls with the width, as the presets' rates do
    "muon_learning_rate": 2e-3,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "epochs": 2.0,
    "warmup_steps": 50,
    "lr_schedule": "linear",
    "final_lr_fraction": 0.0,
    "eval_interval": 200,
    "checkpoint_interval": 200,
}


# ---------------------------------------------------------------- nothing, or a run to resume


def fit_to_data(model: GPTConfig, given: set[str], new_data: bool, tokenizer: TextTokenizer) -> GPTConfig:
    """The model's shape with the tokenizer's vocabulary. Raises ValueError if a flag asks for another, unless the data is made for it."""
    asked = model.vocab_size
    if "vocab_size" in given and not new_data and asked != tokenizer.vocab_size:
        raise ValueError(f"vocab_size={asked}, but the data's tokenizer has {tokenizer.vocab_size} ids; leave --vocab_size out")
    return dataclasses.replace(model, vocab_size=tokenizer.vocab_size)


def fix_length(config: TrainConfig, keep_warmup: bool, data: TrainingData) -> TrainConfig:
    """The configuration with epochs or tokens turned into steps, and warmup at most a tenth of the run unless it is to be kept."""
    max_steps, windows = config.max_steps, config.batch_size * config.gradient_accumulation_steps
    if config.max_tokens is not None:
        max_steps = math.ceil(config.max_tokens / (windows * data.block_size))
    if config.epochs is not None:
        if data.mixed:
            raise ValueError("--epochs has no meaning for weighted directories; give --max_steps or --max_tokens")
        max_steps = max(1, math.ceil(config.epochs * data.samples_per_epoch / windows))
    warmup = config.warmup_steps if keep_warmup else min(config.warmup_steps, max_steps // 10)
    return dataclasses.replace(config, max_steps=max_steps, warmup_steps=warmup)


def merge_resumed(model: GPTConfig, train: TrainConfig, given: set[str], content: dict) -> tuple[GPTConfig, TrainConfig]:
    """The saved run's configuration, with those changes that flags ask for. Raises ValueError for a change that makes it another run."""
    saved = {GPTConfig: content["model_config"], TrainConfig: content["train_config"]}
    merged = []
    for kind, now in ((GPTConfig, model), (TrainConfig, train)):
        values = saved[kind].copy()
        for name in [f.name for f in dataclasses.fields(kind) if f.name in given]:
            value = getattr(now, name)
            if value != values.get(name) and name not in CHANGEABLE:
                raise ValueError(
                    f"the run to resume has {name}={values.get(name)}, not {value}; leave the flag out, or start in another --out_dir"
                )
            values[name] = value
        merged.append(kind(**values))
    return merged[0], merged[1]


# ---------------------------------------------------------------- another model


def read_source(name: str) -> dict:
    """The model that `--init_from NAME` means, as the content of a checkpoint with an `origin`: its name and a hash of its weights.

    NAME is whatever --checkpoint takes, or gpt2, gpt2-medium from the Hugging Face hub. Raises FileNotFoundError, ValueError.
    """
    if name in HUB_NAMES and not Path(name).exists():
        content = ckpt.load_hf_folder(download(name))
    else:
        path = ckpt.find_checkpoint(name)
        content = ckpt.load_hf_folder(path) if path.is_dir() else ckpt.load_checkpoint(path)
    digest = hashlib.sha256()
    for key, weight in sorted(content["model"].items()):
        digest.update(key.encode() + weight.contiguous().numpy().tobytes())
    return content | {"origin": {"name": name, "sha256": digest.hexdigest()}}


def download(name: str) -> Path:
    """The folder with GPT-2's published weights, fetched once. Raises ValueError if the hub can't be reached."""
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(HUB_NAMES[name], allow_patterns=list(HUB_FILES), etag_timeout=5))
    except Exception as error:  # its own kinds, requests', httpx', the system's
        raise ValueError(
            f"{name} can't be had from the Hugging Face hub ({type(error).__name__}); "
            "give --init_from a folder with its config.json, model.safetensors and tokenizer.json, or a checkpoint"
        ) from None


def with_values(config: TrainConfig, given: set[str], n_embd: int) -> TrainConfig:
    """The configuration with fine-tuning's values, for a model of this width, in the fields that no flag sets."""
    length = {"epochs", "max_steps", "max_tokens"}
    values = {key: value for key, value in VALUES.items() if key not in given and not (key in length and length & given)}
    if "learning_rate" in values:
        values["learning_rate"] *= min(1.0, 128 / n_embd)
    if length & given and "epochs" not in given:
        values["epochs"] = None
    if "learning_rate" in given and "muon_learning_rate" not in given and config.optimizer == "muon":
        notice(f"--muon_learning_rate is {values['muon_learning_rate']}, fine-tuning's own; --learning_rate is the AdamW part's")
    return dataclasses.replace(config, **values)


def source_shape(source: dict, asked: GPTConfig, given: set[str]) -> GPTConfig:
    """The source's shape, with dropout, flash and a shorter block_size if flags ask for them. Raises ValueError for other changes."""
    shape = source["model_config"] | {"dropout": 0.0, "flash": True}
    name = source["origin"]["name"]
    for field in [f.name for f in dataclasses.fields(GPTConfig) if f.name in given]:
        value = getattr(asked, field)
        if field not in OWN_SHAPE and value != shape[field]:
            raise ValueError(f"{field}={value}, but {name} has {field}={shape[field]}; leave the flag out")
        if field == "block_size" and value > shape[field]:
            raise ValueError(f"block_size={value}, but {name} has learned {shape[field]} positions; pass at most that")
        shape[field] = value
    return GPTConfig(**shape)


def weights_for(source: dict, shape: GPTConfig) -> dict:
    """The source's weights for this shape: learned positions beyond block_size are left out."""
    return {name: weight[: shape.block_size] if name == "wpe.weight" else weight for name, weight in source["model"].items()}


def check_tokenizer(source: dict, tokenizer: TextTokenizer, directory: str) -> None:
    """Raise ValueError unless the data was prepared with the source's tokenizer: its ids would mean nothing to the model."""
    name = source["origin"]["name"]
    if not TextTokenizer(source["tokenizer"], name).same_ids(tokenizer):
        kind = name if name == "gpt2" else Path(name).parent if name.endswith(".pt") else name
        raise ValueError(
            f"{directory} was prepared with another tokenizer than {name}'s; prepare it again with "
            f"prepare_data.py --tokenizer {kind} (a run directory holds its tokenizer.json), or use --dataset FILE"
        )
