"""Validation while training: how well the model predicts a fixed beginning of each validation split, and a text that it writes now."""

import sys
from collections.abc import Callable

from utils import derived_seed

from tqdm import tqdm

from config import TrainConfig
from evaluation.held_out import split_prefix
from evaluation.measures import score_tokens, summarize
from formats.data_directory import DataDirectory
from formats.tokenizer import TextTokenizer
from generation.sampling import Sampling
from generation.streaming import encode_prompt, stream_text
from generation.torch_engine import TorchEngine
from generation.writing import Row, Writer
from models import GPT
from training.learner import Learner


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
