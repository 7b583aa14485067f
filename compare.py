"""Several runs -> which data (or model) is better, and how sure that is.

    python compare.py checkpoints/data_v1 checkpoints/data_v2 --data_dir ./data_v1 ./data_v2
    python compare.py checkpoints/*/best_model.pt --data_dir ./data --split val
    python compare.py --recipe recipes/sample.toml

Each run reads the same documents with its own tokenizer; bits per byte make them comparable whatever the tokenizers are. Differences are
paired per document, which takes most of the chance out of them. They compare these models: for a claim about datasets, train several seeds.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from utils import Checked, Count, choose_device, flag_types, notice, read_command_line, run_script

import numpy as np
import tyro

from evaluation.measures import check_finite, score_tokens, why_no_bits_per_byte
from evaluation.plans import Texts
from evaluation.recipes import Script
from evaluation.studies import StudyFlags, Variants, run_study
from formats.data_directory import DTYPE, DataDirectory
from formats.outputs import output_file, write_json
from formats.run_directory import find_checkpoint, load_model
from preparation.overlap import file_texts, seen_in_training, split_texts
from preparation.sources import find_files


@dataclass(frozen=True)
class Arguments(Checked):
    """Flags of compare.py."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Runs, as evaluate.py --checkpoint takes them; two or more."""
    data_dir: tuple[str, ...] = ("./data",)
    """Data directories whose documents are read."""
    split: Literal["train", "val", "test"] | None = None
    """Split of each data directory. Default: test, or val where there is no test."""
    max_documents: Count | None = None
    """Read only this many documents of each split, from its beginning."""
    batch_size: Count = 32
    """Windows in one forward pass; changes the results by no more than the last bits of float32."""
    verify_data: bool = False
    """Compare token files above 2 GB too with the SHA-256 in meta.json; smaller ones always are."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    output: str | None = None
    """JSON file for the results."""
    study: StudyFlags = field(default_factory=StudyFlags)

    def problems(self) -> list[str]:
        problems = []
        if self.study.recipe is not None and self.runs:
            problems.append("give runs or a --recipe, not both")
        elif self.study.recipe is None and len(self.runs) < 2:
            problems.append("give two or more runs to compare")
        if len(set(self.runs)) < len(self.runs) or len(set(self.data_dir)) < len(self.data_dir):
            problems.append("a run or data directory is named twice; name each once")
        if not self.data_dir:
            problems.append("--data_dir needs a directory whose documents are read")
        return problems


def read_documents(data: DataDirectory, split: str, limit: int | None) -> list[str]:
    """The documents of a split as text. Raises ValueError where its tokenizer can't give them back."""
    tokens = np.asarray(data.tokens(split))
    reason = why_no_bits_per_byte(data.tokenizer, tokens)
    if reason:
        raise ValueError(f"{data.name} can't be compared on: {reason}; prepare it with a byte-level tokenizer, e.g. --tokenizer bpe")
    ends = np.flatnonzero(tokens == data.tokenizer.eot_id)
    if not len(ends) or ends[-1] + 1 < len(tokens):  # nanoGPT's files don't end with an EOT
        ends = np.append(ends, len(tokens))
    return [data.tokenizer.decode(tokens[start:end].tolist()) for start, end in zip([0, *(ends[:-1] + 1)], ends[:limit])]


def document_bits(run: str, texts: list[str], device: str, batch_size: int) -> np.ndarray:
    """Bits that a run needs for each document, its end included, (documents,) float64. Raises ValueError for a lossy tokenizer."""
    model, tokenizer, path, _ = load_model(run, device)
    tokens = np.array([i for text in texts for i in (*tokenizer.encode(text), tokenizer.eot_id)], DTYPE)
    reason = why_no_bits_per_byte(tokenizer, tokens)
    if reason:
        raise ValueError(f"{path} can't be compared: {reason}; train it with a byte-level tokenizer")
    score = score_tokens(model, tokens, tokenizer.eot_id, batch_size, bar=run)
    check_finite(score, path)
    return score.per_document(tokens, tokenizer.eot_id) / math.log(2)


def paired_difference(bits: np.ndarray, other: np.ndarray, n_bytes: np.ndarray) -> tuple[float, float]:
    """Difference of two models' bits per byte over the same documents, and its standard error.

    All (documents,). The error is that of a ratio of sums over documents (Cochran 1977, "Sampling Techniques", chapter 6);
    NaN for fewer than two documents.
    """
    difference = bits - other
    ratio = difference.sum() / n_bytes.sum()
    if len(bits) < 2:
        return float(ratio), math.nan
    residual = difference - ratio * n_bytes
    return float(ratio), float(math.sqrt(len(bits)) * residual.std(ddof=1) / n_bytes.sum())


def verdict(difference: float, error: float) -> str:
    if math.isnan(error):
        return "one document says nothing about chance"
    if abs(difference) <= 2 * error:
        return "no clear difference"
    return f"{abs(difference) / error:.0f} standard errors" if error else "in every document alike"


def finish(out_dir: Path, variants: Variants) -> None:
    """The mean bits per byte of each variant's runs on each held-out set."""
    for variant, runs in variants.items():
        for name in next(iter(runs.values())):
            bits = [sets[name].summary.get("bits_per_byte") for sets in runs.values()]
            if None not in bits:
                print(f"{variant}, {name}: {np.mean(bits):.4f} bits/byte in {len(bits)} runs")


def study(flags: StudyFlags) -> int:
    """Run a study with the scripts that stand beside this one."""
    import evaluate
    import prepare_data
    import training.start

    def read_by(kind: type):
        return lambda words: read_command_line(kind, words, None)

    def digests(evaluating: evaluate.Arguments) -> list:
        return [file.describe()["sha256"] for file in find_files(evaluating.text, evaluating.form)]

    def seen(directory: Path, held_out: dict[str, Path], evaluating: evaluate.Arguments) -> dict[str, int]:
        sets = {name: split_texts(path, "test") for name, path in held_out.items()}
        return seen_in_training(directory, sets | {name: file_texts([name], evaluating.form) for name in evaluating.text})

    readers = {
        "prepare_data": (prepare_data.Arguments, read_by(prepare_data.Arguments)),
        "train": (training.start.Arguments, lambda words: training.start.read_arguments(words, None)),
        "evaluate": (evaluate.Arguments, read_by(evaluate.Arguments)),
    }
    here = Path(__file__).resolve().parent
    scripts = {name: Script(here / f"{name}.py", frozenset(flag_types(kind)), read) for name, (kind, read) in readers.items()}
    return run_study(flags, scripts, Texts(prepare_data.content_of, digests, seen), finish)


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__)
    if args.study.recipe is not None:
        return study(args.study)
    device, results = choose_device(args.device), {}
    directories = [DataDirectory(name, verify=args.verify_data) for name in args.data_dir]
    models = {run: find_checkpoint(run) for run in args.runs}
    same = [run for run in args.runs if list(models.values()).count(models[run]) > 1]
    if same:
        raise ValueError(f"{' and '.join(same)} mean the same model, {models[same[0]]}; name each run by its own directory")
    output = None if args.output is None else output_file(args.output, "comparison", models.values())
    for name, data in zip(args.data_dir, directories):
        split = args.split or ("val" if "val" in data.splits and "test" not in data.splits else "test")
        if args.split is None and split == "val":
            notice(f"{name} has no test split; its val split is read")
        texts = read_documents(data, split, args.max_documents)
        n_bytes = np.array([len(text.encode()) for text in texts], float)
        bits = {run: document_bits(run, texts, device, args.batch_size) for run in args.runs}
        ranked = sorted(args.runs, key=lambda run: bits[run].sum())
        width = max(map(len, args.runs))
        print(f"{name} {split}: {len(texts):,} documents, {int(n_bytes.sum()):,} bytes")
        results[name] = {}
        for run in ranked:
            per_byte = float(bits[run].sum() / n_bytes.sum())
            difference, error = paired_difference(bits[run], bits[ranked[0]], n_bytes)
            line = f"  {run:{width}}  {per_byte:.4f} bits/byte"
            if run != ranked[0]:
                line += f"  +{difference:.4f} ± {error:.4f}  ({verdict(difference, error)})"
            print(line)
            error = None if math.isnan(error) else error
            results[name][run] = {"bits_per_byte": per_byte, "above_best": difference, "standard_error": error}
    if output is not None:
        write_json(output, results)
        notice(f"written to {output}")
    return 0


if __name__ == "__main__":
    run_script(main)
