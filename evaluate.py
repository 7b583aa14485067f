"""Checkpoint + token files -> loss, perplexity, token accuracy, bits per byte.

    python evaluate.py
    python evaluate.py --checkpoint checkpoints/stories --data_dir ./data_stories --split val test
    python evaluate.py --checkpoint best_model.pt --text story.txt --output metrics.json

Computed in float32 over the whole split: each token is predicted exactly once.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

from utils import Checked, Count, choose_device, notice, read_command_line, run_script

import numpy as np

from evaluation.measures import Score, check_finite, score_tokens, summarize, text_bytes, why_no_bits_per_byte
from formats.data_directory import DTYPE, DataDirectory
from formats.outputs import output_file, write_json
from formats.run_directory import EVALUATION, find_checkpoint, load_model
from formats.tokenizer import TextTokenizer
from models import GPT
from preparation.sources import Format, find_files

LEAK_STANDARD_ERRORS = 4


@dataclass(frozen=True)
class Arguments(Checked):
    """Flags of evaluate.py."""

    checkpoint: str = "./checkpoints"
    """A .pt file, an HF folder, or a run directory, also by its name below ./checkpoints. Default: the newest finished run there."""
    data_dir: tuple[str, ...] = ()
    """Data directories. Default: ./data, unless --text is given."""
    text: tuple[str, ...] = ()
    """Text files to evaluate, read as prepare_data.py reads them."""
    split: tuple[Literal["train", "val", "test"], ...] = ("val", "test")
    """Splits of each data directory: train, val, test."""
    form: Format = field(default_factory=Format)
    batch_size: Count = 32
    """Windows in one forward pass; changes the results by no more than the last bits of float32."""
    stride: Count | None = None
    """Windows overlap and move on by this many tokens: more context for each prediction, more time. Default: block_size, no overlap."""
    verify_data: bool = False
    """Compare token files above 2 GB too with the SHA-256 in meta.json; smaller ones always are."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    output: str | None = None
    """JSON file for the results. Default: evaluation.json beside the checkpoint."""

    def problems(self) -> list[str]:
        return [] if self.split else ["--split needs a value: train, val or test"]


def text_tokens(name: str, form: Format, tokenizer: TextTokenizer) -> tuple[np.ndarray, int, int]:
    """A text as a split: its ids with an EOT behind each document (n,) uint16, UTF-8 bytes of the documents, their number."""
    texts = map(tokenizer.normalize, itertools.chain.from_iterable(find_files([name], form)))
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{name} holds no text; give a file with some")
    ids = [i for text in texts for i in (*tokenizer.encode(text), tokenizer.eot_id)]
    return np.array(ids, dtype=DTYPE), sum(len(text.encode()) for text in texts), len(texts)


def compare_with_entropy(score: Score, tokens: np.ndarray, eot_id: int, entropy: list[float], n_bytes: int) -> dict:
    """How far a model is above the entropy of the sample corpus, which a perfect one reaches, paired per story.

    entropy: bits of each story under the grammar. Returns entropy_bits_per_byte, and above_entropy_bits_per_story with its standard
    error (None for a single story).
    """
    above = score.per_document(tokens, eot_id) / math.log(2) - np.array(entropy)
    error = float(above.std(ddof=1) / math.sqrt(len(above))) if len(above) > 1 else None
    return {
        "entropy_bits_per_byte": sum(entropy) / n_bytes,
        "above_entropy_bits_per_story": float(above.mean()),
        "above_entropy_standard_error": error,
    }


def evaluate_tokens(
    args: Arguments, model: GPT, tokenizer: TextTokenizer, tokens: np.ndarray, n_bytes: int, documents: int, entropy: list | None = None
) -> dict:
    """All measures of one split. entropy: as compare_with_entropy takes it."""
    if args.stride is not None and args.stride > model.config.block_size:
        raise ValueError(f"stride={args.stride} is above the model's block_size={model.config.block_size}; then tokens would be left out")
    score = score_tokens(model, tokens, tokenizer.eot_id, args.batch_size, args.stride, bar="evaluating")
    check_finite(score, args.checkpoint)
    reason = why_no_bits_per_byte(tokenizer, tokens)
    result = summarize(score, None if reason else n_bytes) | {"tokens": len(tokens), "bytes": n_bytes, "documents": documents}
    if reason:
        result["bits_per_byte_reason"] = reason
    elif entropy is not None:
        result |= compare_with_entropy(score, tokens, tokenizer.eot_id, entropy, n_bytes)
    return result


def evaluate_directory(args: Arguments, model: GPT, tokenizer: TextTokenizer, name: str) -> dict[str, dict]:
    """The measures of each asked split of a data directory; one that isn't there is told.

    Raises ValueError if the directory was prepared with another tokenizer or has none of the splits.
    """
    data = DataDirectory(name, tokenizer, args.verify_data)
    data.check_tokenizer(tokenizer, "the model", "tokenizer.json (the model's run directory holds one)")
    asked = dict.fromkeys(args.split)
    if not asked.keys() & set(data.splits):
        raise FileNotFoundError(f"{name} has no {' or '.join(asked)} split, only {', '.join(data.splits)}; name one with --split")
    results = {}
    for split in asked:
        if split not in data.splits:
            notice(f"{name} has no {split} split; it is left out")
            continue
        tokens = data.tokens(split)
        if data.meta is not None:
            n_bytes, documents = (data.meta["splits"][split][key] for key in ("bytes", "documents"))
        else:
            n_bytes, documents = text_bytes(tokenizer, tokens), max(1, int((tokens == tokenizer.eot_id).sum()))
        results[split] = evaluate_tokens(args, model, tokenizer, tokens, n_bytes, documents, data.entropy(split))
    return results


def print_results(results: dict[str, dict[str, dict]]) -> bool:
    """Print the results; say where bits per byte are missing and why, and where a model is better than a perfect one. True if none is."""
    honest, notes, width = True, [], max(map(len, results))
    header = f"{'loss':>8} {'perplexity':>10} {'accuracy':>8} {'bits/byte':>9} {'perfect':>8} {'tokens':>12} {'documents':>9}"
    print(f"{'data':{width}}  split  {header}")
    for name, split, r in ((name, split, r) for name, splits in results.items() for split, r in splits.items()):
        bits = "-" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:.4f}"
        perfect = f"{r['entropy_bits_per_byte']:.4f}" if "entropy_bits_per_byte" in r else "-"
        line = f"{name:{width}}  {split:5}  {r['loss']:8.4f} {r['perplexity']:10.3f} {r['accuracy']:8.4f} {bits:>9} {perfect:>8}"
        print(f"{line} {r['tokens']:12,} {r['documents']:9,}")
        if "bits_per_byte_reason" in r:
            notes.append(f"{name} {split}: no bits per byte, {r['bits_per_byte_reason']}")
        above, error = r.get("above_entropy_bits_per_story"), r.get("above_entropy_standard_error")
        if error is not None and above < -LEAK_STANDARD_ERRORS * error:
            wrong = f"{-above:.3f} bits a story below a perfect model (standard error {error:.3f})"
            notes.append(f"error: {name} {split}: {wrong}: the model has seen these stories, or something is wrong")
            honest = False
    for note in notes:
        notice(note)
    return honest


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__, aliases={"model_path": "checkpoint"})
    path, texts = find_checkpoint(args.checkpoint), [file.path for file in find_files(args.text, args.form)]
    name = str(path.parent / EVALUATION) if args.output is None else args.output
    output = output_file(name, "evaluation", [path, *texts])
    model, tokenizer, *_ = load_model(str(path), choose_device(args.device))
    directories = args.data_dir or (() if args.text else ("./data",))
    results = {name: evaluate_directory(args, model, tokenizer, name) for name in directories}
    for name in args.text:
        results[name] = {"text": evaluate_tokens(args, model, tokenizer, *text_tokens(name, args.form, tokenizer))}
    write_json(output, results)  # first: who reads what is printed may have gone
    honest = print_results(results)
    notice(f"written to {output}")
    return 0 if honest else 1


if __name__ == "__main__":
    run_script(main)
