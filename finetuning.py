"""Continue from another model's weights: its shape and tokenizer, and rates for a model that already knows something."""

import dataclasses
import hashlib
import os
from pathlib import Path

import checkpoints_io as ckpt
from config import GPTConfig, TrainConfig
from tokenizers_io import TextTokenizer
from utils import notice

HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium")}
HUB_FILES = ("config.json", "model.safetensors", "tokenizer.json")
OWN_SHAPE = {"dropout", "flash", "block_size"}  # what may differ from the source's shape

# What a field is set to unless a flag says otherwise; chosen by measurement (MEASUREMENTS.md).
VALUES = {
    "learning_rate": 3e-4,
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


def with_values(config: TrainConfig, given: set[str]) -> TrainConfig:
    """The configuration with fine-tuning's values in the fields that no flag sets."""
    length = {"epochs", "max_steps", "max_tokens"}
    values = {key: value for key, value in VALUES.items() if key not in given and not (key in length and length & given)}
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
