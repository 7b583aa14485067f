"""A checkpoint of weights only, without what it takes to resume a training: what is left of a step_*.pt to keep or to pass on."""

import dataclasses
import zlib
from pathlib import Path

from config import GPTConfig
from export.verify import Loaded, Source
from formats.checkpoint import load_checkpoint, load_weights, save_checkpoint
from formats.metrics import METRICS, read_metrics
from formats.schemas import read_file
from formats.tokenizer import TextTokenizer
from models import GPT

MEASURES = ("loss", "perplexity", "accuracy", "bits_per_byte")


def measured_in_training(source: Source) -> dict[str, float | None] | None:
    """What the training measured of these weights on its validation split; None where that isn't known for certain.

    A complete checkpoint doesn't say it, but knows the log whose last evaluation may be its own.
    """
    content, log = source.content, source.path.parent / METRICS
    if "resume" not in content:
        return content.get("val")
    state = content["resume"]["metrics"]
    averaged = content["resume"]["ema"] is not None  # then those weights were evaluated
    if averaged or not log.is_file() or zlib.crc32(read_file(log)[: state["bytes"]]) != state["crc32"]:
        return None
    lines = (line for line in read_metrics(log) if line["step"] == content["step"])
    return next(({name: line[f"val_{name}"] for name in MEASURES} for line in lines if "val_loss" in line), None)


def write_slim(source: Source, path: Path) -> Loaded:
    """Weights, configuration, tokenizer, and what is known of the data and the measures."""
    kept = {name: value for name, value in source.content.items() if name != "resume"}
    kept |= {"model_config": dataclasses.asdict(source.model.config), "model": source.model.state_dict()}
    val = measured_in_training(source)
    kept |= {"val": val} if val else {}
    save_checkpoint(path, kept)
    content = load_checkpoint(path)
    model = GPT(GPTConfig(**content["model_config"])).eval()
    load_weights(model, content["model"], str(path))
    return Loaded(lambda ids: model(ids)[0], encode=TextTokenizer(content["tokenizer"]).encode)
