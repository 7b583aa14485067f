"""Checkpoint + held-out text -> loss, perplexity, accuracy, bits per byte, each with how sure it is.

    python evaluate.py
    python evaluate.py --checkpoint checkpoints/stories --data_dir ./data_stories --split val test
    python evaluate.py --checkpoint best_model.pt --text story.txt --output metrics.json
    python evaluate.py --samples 100

Computed in float32 over the whole split: each document from its own beginning, each token exactly once.
"""

import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from utils import Checked, Count, Natural, NonNegative, Seed, choose_device, notice, parse_weighted, read_command_line, run_script

from evaluation import samples
from evaluation.held_out import HeldOut, Scorer, from_directory, from_texts
from evaluation.plots import draw_evaluation
from formats.data_directory import DataDirectory
from formats.outputs import output_file, write_json
from formats.run_directory import EVALUATION, find_checkpoint, load_model
from formats.scores import ItemScores, read_known, write_scores
from formats.tokenizer import TextTokenizer
from models import GPT
from preparation.sample_corpus import GRAMMAR_PATH, load_grammar
from preparation.sources import Format, find_files

LEAK_STANDARD_ERRORS = 4
DETAILS = ("positions", "calibration")  # of a set: for pictures


@dataclass(frozen=True)
class Arguments(Checked):
    """Flags of evaluate.py."""

    checkpoint: str = "./checkpoints"
    """A .pt file, an HF folder, or a run directory, also by its name below ./checkpoints. Default: the newest finished run there."""
    data_dir: tuple[str, ...] = ()
    """Data directories. Default: ./data, unless --text or --samples is given."""
    text: tuple[str, ...] = ()
    """Text files to evaluate, read as prepare_data.py reads them."""
    split: tuple[Literal["train", "val", "test"], ...] = ("val", "test")
    """Splits of each data directory: train, val, test."""
    form: Format = field(default_factory=Format)
    batch_size: Count = 32
    """Windows in one forward pass; changes the results by no more than the last bits of float32."""
    stride: Count | None = None
    """Windows overlap and move on by this many tokens: more context for each prediction, more time. Default: block_size, no overlap."""
    stream: bool = False
    """Cut the split into windows as if it were one text, as other projects do: most windows then begin inside a document."""
    positions: bool = False
    """Print how the loss falls with the number of tokens that the model has seen, and write it into the results."""
    samples: Natural = 0
    """Let the model write so many texts, and measure them: do they end, vary, repeat themselves or the training data?"""
    prompts: str | None = None
    """File with the beginning of a text on each line, for --samples. Default: texts begin from nothing."""
    sample_tokens: Count | None = None
    """Longest text of --samples, in tokens. Default: block_size."""
    temperature: NonNegative = 1.0
    """Of --samples. 1: the model's own probabilities."""
    seed: Seed = 0
    """Of --samples."""
    judge: str | None = None
    """Another checkpoint, for --samples: how well does it predict the texts?"""
    train_data: tuple[str, ...] = ()
    """Data directories in which --samples looks for what was learned by heart. Default: those that the model was trained on."""
    verify_data: bool = False
    """Compare token files above 2 GB too with the SHA-256 in meta.json; smaller ones always are."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    output: str | None = None
    """JSON file for the results. Default: evaluation.json beside the checkpoint. A picture and each document's scores lie beside it."""

    def problems(self) -> list[str]:
        problems = [] if self.split else ["--split needs a value: train, val or test"]
        if not self.samples and (self.prompts or self.judge or self.train_data):
            problems.append("--prompts, --judge and --train_data belong to --samples; say how many, e.g. --samples 100")
        return problems


def read_text(name: str, form: Format, tokenizer: TextTokenizer) -> HeldOut:
    """A text file, or several, as held-out documents. Raises ValueError where there is no text."""
    texts = map(tokenizer.normalize, itertools.chain.from_iterable(find_files([name], form)))
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{name} holds no text; give a file with some")
    return from_texts(tokenizer, texts)


def read_directory(args: Arguments, tokenizer: TextTokenizer, name: str) -> dict[str, HeldOut]:
    """Each asked split of a data directory; one that isn't there is told.

    Raises ValueError if the directory was prepared with another tokenizer or has none of the splits.
    """
    data = DataDirectory(name, tokenizer, args.verify_data)
    data.check_tokenizer(tokenizer, "the model", "tokenizer.json (the model's run directory holds one)")
    asked = dict.fromkeys(args.split)
    if not asked.keys() & set(data.splits):
        raise FileNotFoundError(f"{name} has no {' or '.join(asked)} split, only {', '.join(data.splits)}; name one with --split")
    for split in asked:
        if split not in data.splits:
            notice(f"{name} has no {split} split; it is left out")
    return {split: from_directory(data, split) for split in asked if split in data.splits}


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def between(interval: list[float] | None) -> str:
    return "-" if interval is None else f"[{interval[0]:.4f}, {interval[1]:.4f}]"


def print_results(results: dict[str, dict[str, dict]]) -> bool:
    """Print the results; say where bits per byte are missing and why, and where a model is better than a perfect one. True if none is."""
    honest, notes, width = True, [], max(map(len, results))
    header = f"{'loss':>8} {'perplexity':>10} {'accuracy':>8} {'top 5':>6} {'bits/byte':>9} {'95% interval':>16} {'perfect':>8}"
    print(f"{'data':{width}}  split  {header} {'tokens':>12} {'documents':>9}")
    for name, split, r in ((name, split, r) for name, splits in results.items() for split, r in splits.items()):
        line = f"{r['loss']:8.4f} {r['perplexity']:10.3f} {r['accuracy']:8.4f} {r['top5_accuracy']:6.3f} {number(r['bits_per_byte'], 4):>9}"
        line += f" {between(r.get('bits_per_byte_interval')):>16} {number(r.get('entropy_bits_per_byte'), 4):>8}"
        print(f"{name:{width}}  {split:5}  {line} {r['tokens']:12,} {r['documents']:9,}")
        if "bits_per_byte_reason" in r:
            notes.append(f"{name} {split}: no bits per byte, {r['bits_per_byte_reason']}")
        elif r["bits_per_byte_interval"] is None:
            notes.append(f"{name} {split}: no interval, {r['documents']} documents are too few to tell how much they vary")
        above, error = r.get("above_entropy_bits_per_story"), r.get("above_entropy_standard_error")
        if error is not None and above < -LEAK_STANDARD_ERRORS * error:
            wrong = f"{-above:.3f} bits a story below a perfect model (standard error {error:.3f})"
            notes.append(f"error: {name} {split}: {wrong}: the model has seen these stories, or something is wrong")
            honest = False
    print("The intervals cover the luck of these documents, not that of the training: for that train several seeds.")
    for note in notes:
        notice(note)
    return honest


def loss_by_position(positions: list[list[float]]) -> list[dict]:
    """Mean loss in ranges of positions that double: {"from", "to", "loss", "tokens"}, empty ranges left out."""
    rows, start = [], 0
    while start < len(positions):
        end = min(len(positions), max(1, 2 * start))
        tokens, nats = map(sum, zip(*positions[start:end]))
        rows += [{"from": start + 1, "to": end, "loss": nats / tokens, "tokens": int(tokens)}] if tokens else []
        start = end
    return rows


def print_positions(results: dict[str, dict[str, dict]]) -> None:
    for name, split, r in ((name, split, r) for name, splits in results.items() for split, r in splits.items()):
        print(f"\n{name} {split}: loss by position in the context\n{'position':>11} {'loss':>8} {'tokens':>12}")
        for row in r["loss_by_position"]:
            print(f"{row['from']:5}-{row['to']:<5} {row['loss']:8.4f} {row['tokens']:12,}")


def training_data(args: Arguments, tokenizer: TextTokenizer, content: dict) -> list[DataDirectory]:
    """The directories in which to look for what was learned by heart: --train_data, or what the checkpoint names, as far as it is there."""
    names = args.train_data or tuple(parse_weighted(name)[0] for name in content.get("train_config", {}).get("data_dir", ()))
    found = []
    for name in names:
        try:
            data = DataDirectory(name, tokenizer)
            data.check_tokenizer(tokenizer, "the model", "tokenizer.json (the model's run directory holds one)")
            found.append(data)
        except (ValueError, FileNotFoundError) as error:
            if args.train_data:
                raise
            notice(f"what was learned by heart isn't looked for in {name}: {error}")
    return found


def evaluate_samples(args: Arguments, model: GPT, tokenizer: TextTokenizer, content: dict, path: Path) -> dict:
    """Let the model write, measure it, keep the texts at `path`. Raises ValueError, FileNotFoundError."""
    prompts = [""]
    if args.prompts is not None:
        prompts = [line for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line]
        if not prompts:
            raise ValueError(f"{args.prompts} holds no prompts; write one on each line")
    judge = None if args.judge is None else load_model(args.judge, str(model.device))
    directories = training_data(args, tokenizer, content)
    longest = args.sample_tokens or model.config.block_size
    drawn = samples.draw_samples(model, tokenizer, prompts, args.samples, longest, args.temperature, args.seed)
    result = samples.measure_samples(drawn)
    if directories:
        result["in_training"] = samples.shared_with_training([sample.ids for sample in drawn], directories)
    if judge is not None:
        result["judge"] = samples.judged(drawn, *judge[:2])
    grammar = hashlib.sha256(GRAMMAR_PATH.read_bytes()).hexdigest()
    if any(((data.meta or {}).get("sample") or {}).get("grammar_sha256") == grammar for data in directories):
        result["grammar"] = samples.from_the_grammar(drawn, load_grammar().log2_probability)
    heading = f"{len(drawn)} texts by {args.checkpoint}, temperature {args.temperature:g}, seed {args.seed} (evaluate.py --samples)"
    samples.write_samples(path, drawn, heading)
    return result


def print_samples(r: dict) -> None:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.1f}%"

    print(f"samples: {r['texts']} texts, {r['tokens']:.0f} tokens ({r['bytes']:.0f} bytes) on average")
    print(f"  end by themselves          {percent(r['ended'])}")
    print(f"  differ from each other     {percent(r['different'])}")
    print("  distinct 1-, 2-, 3-grams   " + ", ".join(map(percent, r["distinct"].values())))
    print(f"  4-grams repeated in a text {percent(r['repeated'])}")
    for n, shares in r.get("in_training", {}).items():
        real = f"(held-out texts: {percent(shares['held_out'])})"
        print(f"  {n:>2} tokens in a row also stand in the training data: {percent(shares['samples'])} {real}")
    if "judge" in r:
        print(f"  perplexity by the judge    {r['judge']['perplexity']:.3f}, {number(r['judge']['bits_per_byte'], 4)} bits/byte")
    if "grammar" in r:
        bits = number(r["grammar"]["bits_per_story"], 1)
        print(f"  could be the grammar's     {percent(r['grammar']['share'])}, {bits} bits a story under it")


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__, aliases={"model_path": "checkpoint"})
    path, texts = find_checkpoint(args.checkpoint), [file.path for file in find_files(args.text, args.form)]
    name = str(path.parent / EVALUATION) if args.output is None else args.output
    read = [path, *texts, *map(Path, filter(None, [args.prompts]))]
    output = output_file(name, "evaluation", read)
    beside = {".png": "evaluation picture", ".npz": "table of scores", ".samples.txt": "list of samples"}
    picture, scores_path, texts_path = (output_file(str(output.with_suffix(suffix)), kind, read) for suffix, kind in beside.items())
    model, tokenizer, _, content = load_model(str(path), choose_device(args.device))
    known = read_known(scores_path)
    scorer = Scorer(model, tokenizer, args.checkpoint, known.values(), args.batch_size, args.stride, args.stream)
    sets: dict[tuple[str, str], ItemScores] = {}
    for name in args.data_dir or (() if args.text or args.samples else ("./data",)):
        sets |= {(name, split): scorer.score(held_out) for split, held_out in read_directory(args, tokenizer, name).items()}
    sets |= {(name, "text"): scorer.score(read_text(name, args.form, tokenizer)) for name in args.text}
    results: dict[str, dict[str, dict]] = {}
    for (name, split), scores in sets.items():
        shown = {key: value for key, value in scores.summary.items() if key not in DETAILS}
        shown |= {"loss_by_position": loss_by_position(scores.summary["positions"])} if args.positions else {}
        results.setdefault(name, {})[split] = shown
    written = {"samples": {args.checkpoint: evaluate_samples(args, model, tokenizer, content, texts_path)}} if args.samples else {}
    write_json(output, results | written)  # first: who reads what is printed may have gone
    if sets:
        kept = {name: scores for name, scores in known.items() if scores.model == scorer.hash}
        write_scores(scores_path, kept | {" ".join(name): scores for name, scores in sets.items()})
        draw_evaluation(picture, {" ".join(name): scores.summary for name, scores in sets.items()})
    honest = print_results(results) if results else True
    if args.positions:
        print_positions(results)
    for result in written.get("samples", {}).values():
        print_samples(result)
    companions = [picture.name, scores_path.name] * bool(sets) + [texts_path.name] * bool(written)
    notice(f"written to {output}, with {', '.join(companions)} beside it")
    return 0 if honest else 1


if __name__ == "__main__":
    run_script(main)
