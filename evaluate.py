"""Checkpoint + token files -> loss, perplexity, token accuracy, bits per byte.

    python evaluate.py
    python evaluate.py --checkpoint checkpoints/stories --data_dir ./data_stories --split val test
    python evaluate.py --checkpoint best_model.pt --text story.txt --output metrics.json

Computed in float32 over the whole split: each token is predicted exactly once, so the figures do not depend on the batch size.
"""

from utils import choose_device, needs_packages, notice, read_command_line, run_script, write_atomically

with needs_packages():
    import itertools
    import json
    import math
    from dataclasses import dataclass
    from pathlib import Path

    import numpy as np
    from tqdm import tqdm

    from evaluation.measures import Score, score_tokens, summarize, text_bytes, why_no_bits_per_byte
    from formats.checkpoint import load_model
    from formats.data_directory import DTYPE, SPLITS, DataDirectory
    from formats.tokenizer import EOT, TextTokenizer
    from models import GPT
    from preparation.sources import Format, find_files

LEAK_STANDARD_ERRORS = 4


@dataclass(frozen=True)
class Arguments:
    """Flags of evaluate.py."""

    checkpoint: str = "./checkpoints"
    """A .pt file, a run directory (its best model), or the name of one under ./checkpoints."""
    data_dir: tuple[str, ...] = ()
    """Data directories. Default: ./data, unless --text is given."""
    text: tuple[str, ...] = ()
    """Text files to evaluate, read as prepare_data.py reads them."""
    split: tuple[str, ...] = ("val", "test")
    """Splits of each data directory: train, val, test."""
    separator: str = EOT
    """What stands between two documents of --text."""
    batch_size: int = 32
    """Windows in one forward pass; does not change the results."""
    stride: int | None = None
    """Windows overlap and move on by this many tokens: more context for each prediction, more time. Default: block_size, no overlap."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    output: str | None = None
    """JSON file for the results. Default: evaluation.json beside the checkpoint."""

    def __post_init__(self):
        problems = [f"split={s!r} is unknown; take {', '.join(SPLITS)}" for s in self.split if s not in SPLITS]
        if not self.split:
            problems.append(f"--split needs a value; take {', '.join(SPLITS)}")
        if self.batch_size < 1:
            problems.append(f"batch_size={self.batch_size} must be at least 1")
        if self.stride is not None and self.stride < 1:
            problems.append(f"stride={self.stride} must be at least 1")
        if problems:
            raise ValueError("; ".join(problems))


def text_tokens(name: str, separator: str, tokenizer: TextTokenizer) -> tuple[np.ndarray, int, int]:
    """A text as a split: its ids with an EOT behind each document (n,) uint16, UTF-8 bytes of the documents, their number."""
    ids: list[int] = []
    n_bytes = documents = 0
    for text in map(tokenizer.normalize, itertools.chain.from_iterable(find_files([name], Format(separator)))):
        if text.strip():
            ids += [*tokenizer.encode(text), tokenizer.eot_id]
            n_bytes += len(text.encode())
            documents += 1
    if not documents:
        raise ValueError(f"{name} holds no text; give a file with some")
    return np.array(ids, dtype=DTYPE), n_bytes, documents


def compare_with_floor(score: Score, tokens: np.ndarray, eot_id: int, floor: list[float], n_bytes: int) -> dict:
    """How far a model is above a perfect one on the sample corpus, paired per story.

    Returns floor_bits_per_byte, and above_floor_bits_per_story with its standard error (None for a single story).
    """
    above = score.per_document(tokens, eot_id) / math.log(2) - np.array(floor)
    error = float(above.std(ddof=1) / math.sqrt(len(above))) if len(above) > 1 else None
    return {
        "floor_bits_per_byte": sum(floor) / n_bytes,
        "above_floor_bits_per_story": float(above.mean()),
        "above_floor_standard_error": error,
    }


def evaluate_tokens(
    args: Arguments,
    model: GPT,
    tokenizer: TextTokenizer,
    tokens: np.ndarray,
    n_bytes: int,
    documents: int,
    floor: list[float] | None = None,
) -> dict:
    """All measures of one split."""
    if args.stride is not None and args.stride > model.config.block_size:
        raise ValueError(f"stride={args.stride} is above the model's block_size={model.config.block_size}; then tokens would be left out")
    with tqdm(total=len(tokens), desc="evaluating", unit="token", unit_scale=True, disable=None, leave=False) as bar:
        score = score_tokens(
            model, tokens, tokenizer.eot_id, model.config.block_size, str(model.device), args.batch_size, args.stride, progress=bar.update
        )
    reason = why_no_bits_per_byte(tokenizer, tokens)
    result = summarize(score, None if reason else n_bytes) | {"tokens": len(tokens), "bytes": n_bytes, "documents": documents}
    if reason:
        result["bits_per_byte_reason"] = reason
    if floor is not None and not reason:
        result |= compare_with_floor(score, tokens, tokenizer.eot_id, floor, n_bytes)
    return result


def evaluate_directory(args: Arguments, model: GPT, tokenizer: TextTokenizer, name: str) -> dict[str, dict]:
    """The measures of each asked split of a data directory. Raises ValueError if it was prepared with another tokenizer."""
    data = DataDirectory(name, tokenizer)
    if data.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(
            f"{name} was prepared with another tokenizer than the model's; prepare the text again with --tokenizer PATH, "
            "where PATH is the tokenizer.json of the model's data directory, or give it to --text"
        )
    results = {}
    for split in dict.fromkeys(args.split):
        tokens = data.tokens(split)
        if data.meta is not None:
            n_bytes, documents = (data.meta["splits"][split][key] for key in ("bytes", "documents"))
        else:
            n_bytes, documents = text_bytes(tokenizer, tokens), int((tokens == tokenizer.eot_id).sum())
        results[split] = evaluate_tokens(args, model, tokenizer, tokens, n_bytes, documents, data.floor(split))
    return results


def table(results: dict[str, dict[str, dict]]) -> str:
    """The results for people."""
    width = max(len(name) for name in results)
    header = f"{'loss':>8} {'perplexity':>10} {'accuracy':>8} {'bits/byte':>9} {'perfect':>8} {'tokens':>12} {'documents':>9}"
    lines = [f"{'data':{width}}  split  {header}"]
    for name, splits in results.items():
        for split, r in splits.items():
            bits = "-" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:.4f}"
            floor = f"{r['floor_bits_per_byte']:.4f}" if "floor_bits_per_byte" in r else "-"
            line = f"{name:{width}}  {split:5}  {r['loss']:8.4f} {r['perplexity']:10.3f} {r['accuracy']:8.4f} {bits:>9} {floor:>8}"
            lines.append(f"{line} {r['tokens']:12,} {r['documents']:9,}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__, aliases={"model_path": "checkpoint"})
    model, tokenizer, path, content = load_model(args.checkpoint, choose_device(args.device))
    directories = args.data_dir or (() if args.text else ("./data",))
    notice(f"{path}, step {content['step']}")
    results = {name: evaluate_directory(args, model, tokenizer, name) for name in directories}
    for name in args.text:
        results[name] = {"text": evaluate_tokens(args, model, tokenizer, *text_tokens(name, args.separator, tokenizer))}
    print(table(results))
    output = Path(args.output) if args.output else path.parent / "evaluation.json"
    write_atomically(output, lambda file: file.write((json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode()))
    notice(f"written to {output}")

    status = 0
    for name, splits in results.items():
        for split, r in splits.items():
            if "bits_per_byte_reason" in r:
                notice(f"{name} {split}: no bits per byte, {r['bits_per_byte_reason']}")
            error = r.get("above_floor_standard_error")
            if error is not None and r["above_floor_bits_per_story"] < -LEAK_STANDARD_ERRORS * error:
                notice(
                    f"error: {name} {split}: {-r['above_floor_bits_per_story']:.3f} bits a story below a perfect model "
                    f"(standard error {error:.3f}): the model has seen these stories, or something is wrong"
                )
                status = 1
    return status


if __name__ == "__main__":
    run_script(main)
