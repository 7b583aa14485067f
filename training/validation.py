"""Validation while training: how well the model predicts a fixed beginning of each validation split, and a text that it writes now."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from utils import derived_seed

import numpy as np
from tqdm import tqdm

from config import TrainConfig
from evaluation.measures import score_tokens, summarize, text_bytes, why_no_bits_per_byte
from formats.data_directory import DataDirectory
from formats.tokenizer import TextTokenizer
from generation.sampling import Sampling
from generation.streaming import encode_prompt, stream_text
from generation.torch_engine import TorchEngine
from generation.writing import Row, Writer
from models import GPT
from training.learner import Learner


@dataclass(frozen=True)
class Prefix:
    """The fixed beginning of a split on which training validates. tokens: (n,) uint16; n_bytes: their text, None if it can't be counted;
    entropy_bits: what a perfect model of the sample corpus needs for the same documents, None for other data."""

    tokens: np.ndarray
    n_bytes: int | None
    entropy_bits: float | None


def split_prefix(data: DataDirectory, split: str, limit: int) -> Prefix:
    """The whole split if it has at most `limit` tokens, else its beginning, up to the last document that ends before the limit.

    A first document longer than the limit is cut, between characters.
    """
    tokens = data.tokens(split)
    whole = len(tokens) <= limit
    if not whole:
        ends = np.flatnonzero(tokens[:limit] == data.tokenizer.eot_id)
        cut = int(ends[-1]) + 1 if len(ends) else limit
        while not len(ends) and cut > 1 and data.tokenizer.decode(tokens[:cut].tolist()).endswith("\ufffd"):
            cut -= 1
        tokens = tokens[:cut]
    tokens = np.asarray(tokens)
    n_bytes = None
    if why_no_bits_per_byte(data.tokenizer, tokens) is None:
        n_bytes = data.meta["splits"][split]["bytes"] if whole and data.meta else text_bytes(data.tokenizer, tokens)
    entropy = data.entropy(split)
    documents = int((tokens == data.tokenizer.eot_id).sum())
    whole_documents = len(tokens) > 0 and tokens[-1] == data.tokenizer.eot_id
    return Prefix(tokens, n_bytes, sum(entropy[:documents]) if entropy is not None and whole_documents else None)


def sample_text(model: GPT, tokenizer: TextTokenizer, config: TrainConfig, step: int) -> str:
    """A text that the model writes now, with random numbers of its own: the training never notices."""
    prompt = encode_prompt(tokenizer, config.sample_prompt, model.config.block_size)
    row = Row(prompt, config.sample_tokens, derived_seed(config.seed, step, -1, 0))
    return config.sample_prompt + "".join(stream_text(Writer(TorchEngine(model), tokenizer, Sampling()), row))


class Validation:
    """What a run validates on. The first data directory's prefix chooses the best model; `also` are further directories to watch."""

    def __init__(self, directory: DataDirectory, also: list[DataDirectory], config: TrainConfig):
        self.tokenizer, self.config = directory.tokenizer, config
        self.prefix = split_prefix(directory, "val", config.eval_tokens)
        self.also = {other.name: split_prefix(other, "val", config.eval_tokens) for other in also}
        self.newest: dict = {}  # the measures of the newest evaluation

    def evaluate(self, learner: Learner, stopped: Callable[[], bool]) -> dict | None:
        """Everything that metrics.jsonl gets from an evaluation, in training precision, told to people too.

        None if `stopped` says so before it is done. Raises FloatingPointError for a loss that isn't finite.
        """
        model, eot_id, step = learner.evaluated.eval(), self.tokenizer.eot_id, learner.progress.step
        summaries = []
        for prefix in (self.prefix, *self.also.values()):
            score = score_tokens(model, prefix.tokens, eot_id, learner.micro_batch, dtype=learner.machine.dtype, stop=stopped)
            if score is None:
                model.train()
                return None
            summaries.append(summarize(score, prefix.n_bytes))
        summary, also = summaries[0], dict(zip(self.also, summaries[1:]))
        learner.check_finite(validation_loss=summary["loss"])
        sample = sample_text(model, self.tokenizer, self.config, step) if self.config.sample_tokens else None
        model.train()
        self.newest = summary
        lines = [f"step {step:>6,}  {self.describe(summary)}"]
        lines += [f"             {name}: {describe(other)}" for name, other in also.items()]
        if sample:
            printable = "".join(character if character.isprintable() else " " for character in sample)
            lines.append(f"             {' '.join(printable.split())}")
        tqdm.write("\n".join(lines), file=sys.stderr)
        further = ({"also": also} if also else {}) | ({"sample": sample} if sample is not None else {})
        return {f"val_{key}": value for key, value in summary.items()} | further

    def entropy(self, per: float) -> float | None:
        """What a perfect model needs for the prefix, in bits divided by `per`; None where that isn't known."""
        return None if self.prefix.entropy_bits is None else self.prefix.entropy_bits / per

    def describe(self, summary: dict) -> str:
        """The measures of the run's own prefix as people read them, beside a perfect model's."""
        perfect = self.entropy(self.prefix.n_bytes) if self.prefix.n_bytes else None
        return describe(summary) + (f" (a perfect model: {perfect:.4f})" if perfect is not None else "")


def describe(summary: dict) -> str:
    bits = f", {summary['bits_per_byte']:.4f} bits/byte" if summary["bits_per_byte"] is not None else ""
    return f"val loss {summary['loss']:.4f}, accuracy {summary['accuracy']:.3f}{bits}"
