"""What rounding a model's numbers costs and saves: bits per byte, size and speed of the file, beside the same format in float32."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config import GPTConfig
from evaluation.held_out import Prefix, split_prefix
from evaluation.measures import score_tokens
from evaluation.samples import beside
from export.verify import Loaded, Source

LONGEST = 50_000  # tokens of held-out text on which quality is measured, whole documents
WINDOWS = 8  # read at once
ROUNDS = 5  # of measuring speed, before and after in turns
ALLOWED = {4: 0.04, 8: 0.01}  # bits -> share by which bits per byte may grow without a warning


@dataclass(frozen=True)
class Predictions:
    """A Network as evaluation.measures has it, of which only the logits are known: ids (B, T) -> (B, T, V)."""

    features: Callable[[Tensor], Tensor]
    config: GPTConfig
    device: torch.device

    def head(self, features: Tensor) -> Tensor:
        return features


def of_logits(logits: Callable[[Tensor], Tensor], config: GPTConfig) -> Callable[[np.ndarray, int], np.ndarray]:
    """What `Measurable.score` is for a file of which only the logits are known."""
    network = Predictions(logits, config, torch.device("cpu"))
    return lambda tokens, eot_id: score_tokens(network, tokens, eot_id, WINDOWS, bar="measuring quality").nats


def held_out(source: Source) -> list[Prefix]:
    """About LONGEST held-out tokens of the source's data, of each directory as many. Raises ValueError, FileNotFoundError."""
    splits = [split_prefix(data, beside(data)[0], LONGEST // len(source.data)) for data in source.data if beside(data)]
    if not splits:
        raise ValueError("the data has neither a val nor a test split; name other data with --data_dir")
    return splits


def measure(source: Source, loaded: Loaded) -> dict:
    """Size in bytes, bits per byte, nats per token and tokens per second, of the file and (`_before`) of the format in float32.

    bits_per_byte is None where the tokenizer loses text. Without data there are no measures of quality, and a `reason`.
    """
    before, after = loaded.rounded
    figures = {"runtime": after.runtime, "bits": after.bits, "size": after.size, "size_before": before.size}
    try:
        splits = held_out(source)
    except (ValueError, FileNotFoundError) as error:
        figures |= {"bits_per_byte": None, "reason": str(error)}
    else:
        tokens = np.concatenate([split.tokens for split in splits])
        sizes = [split.n_bytes for split in splits]
        for name, file in (("_before", before), ("", after)):
            nats = float(file.score(tokens, source.tokenizer.eot_id).sum())
            figures |= {f"loss{name}": nats / len(tokens), f"bits_per_byte{name}": None if None in sizes else nats / np.log(2) / sum(sizes)}
        figures["measured_tokens"] = len(tokens)
    if before.pace and after.pace:
        paces = [(before.pace(), after.pace()) for _ in range(ROUNDS)]
        names = ("tokens_per_second_before", "tokens_per_second")
        figures |= {name: statistics.median(values) for name, values in zip(names, zip(*paces), strict=True)}
    return figures


def sentence(figures: dict) -> str:
    """The figures of `measure` for people, with a warning where rounding cost more than it should."""
    words = [f"{figures['size_before'] / 1e6:.2f} -> {figures['size'] / 1e6:.2f} MB"]
    if "tokens_per_second" in figures:
        words.append(f"{figures['tokens_per_second_before']:,.0f} -> {figures['tokens_per_second']:,.0f} tokens/s with one thread")
    if "reason" in figures:
        return f"{figures['runtime']}: {', '.join(words)}; quality was not measured: {figures['reason']}"
    name, unit = ("loss", "nats per token") if figures["bits_per_byte"] is None else ("bits_per_byte", "bits per byte")
    cost, allowed = figures["loss"] / figures["loss_before"] - 1, ALLOWED[figures["bits"]]
    beyond = f", {cost - allowed:.2%} more than {figures['bits']} bits should cost" if cost > allowed else ""
    words.append(f"{figures[f'{name}_before']:.4f} -> {figures[name]:.4f} {unit} ({cost:+.2%}{beyond})")
    return f"{figures['runtime']}: {', '.join(words)}, on {figures['measured_tokens']:,} held-out tokens"
