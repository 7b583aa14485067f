"""What a model writes, measured without a judge's opinion: does it end, is it varied, does it repeat itself or its training data?"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from utils import derived_seed

import numpy as np
from tqdm import tqdm

from evaluation.held_out import from_texts
from evaluation.measures import check_finite, score_tokens, why_no_bits_per_byte
from formats.data_directory import DataDirectory
from formats.outputs import write_text
from formats.tokenizer import TextTokenizer
from generation.loading import Network, engine_of
from generation.sampling import Sampling
from generation.streaming import encode_prompt
from generation.writing import Row, Writer

ROWS = 32  # texts written at once
REPEATED = 4  # words
MEMORISED = (8, 13)  # tokens
CHUNK = 2**20  # tokens of training data looked at together
HELD_OUT_DOCUMENTS = 200  # whose n-grams are looked up for comparison


@dataclass(frozen=True)
class Sample:
    """A text: the prompt, what the model wrote behind it (as ids without EOT, and as text), and whether it ended by itself."""

    prompt: str
    ids: list[int]
    written: str
    ended: bool

    @property
    def text(self) -> str:
        return self.prompt + self.written


def draw_samples(
    model: Network, tokenizer: TextTokenizer, prompts: list[str], count: int, max_new_tokens: int, temperature: float, seed: int
) -> list[Sample]:
    """`count` texts, shared out evenly among the prompts, each up to its EOT or max_new_tokens; a pure function of the seed on a CPU."""
    samples, writer = [], Writer(engine_of(model), tokenizer, Sampling(temperature))
    with tqdm(total=count, desc="writing", unit="text", disable=None, leave=False) as bar:
        for number, prompt in enumerate(prompts):
            wanted = count // len(prompts) + (number < count % len(prompts))
            start = encode_prompt(tokenizer, prompt, model.config.block_size)
            rows = [Row(start, max_new_tokens, derived_seed(seed, "samples", number, i)) for i in range(wanted)]
            for first in range(0, wanted, ROWS):
                bar.update(sum(row.finish is not None for row in writer.write(rows[first : first + ROWS])))
            for row in rows:
                ids = [token for token in row.drawn if token != tokenizer.eot_id]
                samples.append(Sample(prompt, ids, tokenizer.decode(ids), row.finish == "eot"))
    return samples


# ---------------------------------------------------------------- variety


def ngrams(words: list, n: int) -> list[tuple]:
    return list(zip(*(words[i:] for i in range(n))))


def distinct(texts: list[list[str]], n: int) -> float | None:
    """Different n-grams of words in all texts together, as a share of all (Li et al. 2016, distinct-n); None without any."""
    found = [gram for words in texts for gram in ngrams(words, n)]
    return len(set(found)) / len(found) if found else None


def repeated(texts: list[list[str]], n: int = REPEATED) -> float | None:
    """Share of n-grams of words that stood in the same text before (Welleck et al. 2020, seq-rep-n); None without any."""
    grams = [ngrams(words, n) for words in texts]
    total = sum(map(len, grams))
    return sum(len(text) - len(set(text)) for text in grams) / total if total else None


# ---------------------------------------------------------------- memorisation


def hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of each run of n tokens, (len(tokens) - n + 1,) uint64: random numbers of the tokens, each multiplied for its place."""
    if len(tokens) < n:
        return np.empty(0, np.uint64)
    rng = np.random.Generator(np.random.PCG64(n))
    of_token = rng.integers(0, 2**64, 2**16, np.uint64)
    of_place = rng.integers(0, 2**63, n, np.uint64) * 2 + 1
    values, length = of_token[tokens], len(tokens) - n + 1
    total = np.zeros(length, np.uint64)
    for place, factor in enumerate(of_place):
        total += values[place : place + length] * factor
    return total


def found_in(train: np.ndarray, wanted: np.ndarray, n: int, bar: tqdm) -> np.ndarray:
    """Those of the sorted hashes `wanted` that a run of n training tokens has. Memory doesn't grow with the training data."""
    likely = np.zeros(2**24, bool)
    likely[wanted >> np.uint64(40)] = True
    found = np.zeros(len(wanted), bool)
    for start in range(0, len(train), CHUNK):
        ours = hashes(np.asarray(train[start : start + CHUNK + n - 1]), n)
        ours = ours[likely[ours >> np.uint64(40)]]
        at = np.minimum(np.searchsorted(wanted, ours), len(wanted) - 1)
        found[at[wanted[at] == ours]] = True
        bar.update(min(CHUNK, len(train) - start))
    return wanted[found]


def shared_with_training(texts: list[list[int]], directories: list[DataDirectory]) -> dict[str, dict]:
    """For each n, the share of the texts' runs of n tokens that stand in the training data, and of held-out documents' for comparison.

    Held-out text of the same kind shares some runs too: only what is far above that was learned by heart. None where no text is so long.
    """
    held_out = [row for directory in directories for row in documents_of(directory)]
    result = {}
    total = len(MEMORISED) * sum(len(directory.tokens("train")) for directory in directories)
    with tqdm(total=total, desc="looking through the training data", unit="token", unit_scale=True, disable=None, leave=False) as bar:
        for n in MEMORISED:
            ours, theirs = (np.concatenate([hashes(np.array(ids, np.int64), n) for ids in rows]) for rows in (texts, held_out))
            wanted = np.unique(np.concatenate((ours, theirs)))
            found = [found_in(directory.tokens("train"), wanted, n, bar) for directory in directories if len(wanted)]
            found = np.concatenate([np.empty(0, np.uint64), *found])
            shares = [float(np.isin(grams, found).mean()) if len(grams) else None for grams in (ours, theirs)]
            result[str(n)] = {"samples": shares[0], "held_out": shares[1]}
    return result


def beside(directory: DataDirectory) -> list[str]:
    """The held-out split that texts are compared with: val, or test where that isn't there; a directory may have none."""
    return [split for split in ("val", "test") if split in directory.splits][:1]


def documents_of(directory: DataDirectory) -> Iterator[list[int]]:
    """The first held-out documents of a data directory, as ids without EOT; at least one row, which may be empty."""
    split = beside(directory)
    tokens = np.asarray(directory.tokens(split[0])) if split else np.empty(0, np.uint16)
    ends = np.flatnonzero(tokens == directory.tokenizer.eot_id)[:HELD_OUT_DOCUMENTS]
    for start, end in zip([0, *(ends[:-1] + 1)], ends if len(ends) else [len(tokens)]):
        yield tokens[start:end].tolist()


# ---------------------------------------------------------------- all together


def judged(samples: list[Sample], judge: Network, tokenizer: TextTokenizer, name: str | Path) -> dict:
    """How well another model, which `name` holds, predicts the texts: perplexity, and bits per byte where its tokenizer knows the texts.

    EOTs are counted where the texts ended by themselves. Raises ValueError for a model whose weights give no probabilities.
    """
    held_out = from_texts(tokenizer, [sample.text for sample in samples])
    score = score_tokens(judge, held_out.tokens, tokenizer.eot_id, bar="judging")
    check_finite(score, name)
    nats, reason = score.nats, why_no_bits_per_byte(tokenizer, held_out.tokens)
    counted = np.ones(len(nats), bool)
    counted[np.flatnonzero(held_out.tokens == tokenizer.eot_id)[[not sample.ended for sample in samples]]] = False
    total = float(nats[counted].sum())
    return {
        "perplexity": math.exp(min(700.0, total / counted.sum())),
        "bits_per_byte": None if reason else total / math.log(2) / max(1, held_out.n_bytes),
    } | ({"bits_per_byte_reason": reason} if reason else {})


def from_the_grammar(samples: list[Sample], parse: Callable[[str], float | None]) -> dict:
    """Share of texts that the sample corpus's grammar could have written, and the mean bits of those; parse gives log2 P or None."""
    known = [log2p for sample in samples if sample.ended and (log2p := parse(sample.text)) is not None]
    return {"share": len(known) / len(samples), "bits_per_story": -sum(known) / len(known) if known else None}


def measure_samples(samples: list[Sample]) -> dict:
    """What can be said of the texts alone: see docs/evaluate.md."""
    words = [sample.written.split() for sample in samples]
    return {
        "texts": len(samples),
        "ended": sum(sample.ended for sample in samples) / len(samples),
        "tokens": sum(len(sample.ids) for sample in samples) / len(samples),
        "bytes": sum(len(sample.written.encode()) for sample in samples) / len(samples),
        "distinct": {str(n): distinct(words, n) for n in (1, 2, 3)},
        "repeated": repeated(words),
        "different": len({sample.text for sample in samples}) / len(samples),
    }


def write_samples(path: Path, samples: list[Sample], heading: str) -> None:
    """A text file for people. Raises OSError."""
    ends = {True: "<|endoftext|>", False: "[…]"}
    parts = [f"--- {number}\n{sample.text}{ends[sample.ended]}\n" for number, sample in enumerate(samples, 1)]
    write_text(path, f"{heading}\n\n" + "\n".join(parts))
