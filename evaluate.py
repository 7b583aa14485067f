"""Checkpoint + held-out text -> loss, perplexity, accuracy, bits per byte, each with how sure it is.

    python evaluate.py
    python evaluate.py --checkpoint checkpoints/stories --data_dir ./data_stories --split val test
    python evaluate.py --checkpoint best_model.pt --text story.txt --output metrics.json
    python evaluate.py --tasks sample
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
from evaluation.report import print_positions, print_results, print_samples
from evaluation.task_scores import run_tasks, task_table
from evaluation.tasks import DATA, Task, find_tasks
from formats.data_directory import DataDirectory
from formats.outputs import output_file, write_json
from formats.run_directory import EVALUATION, find_checkpoint
from formats.schemas import read_file
from formats.scores import ItemScores, read_known, set_name, write_scores
from formats.tokenizer import TextTokenizer
from generation.loading import Network, load_network
from preparation import sample_tasks
from preparation.sample_corpus import GRAMMAR_PATH, load_grammar
from preparation.sources import Format, find_files

DETAILS = ("positions", "calibration")  # of a set: for pictures
FURTHER = {"tasks", "samples"}  # parts of the results beside those of data directories and texts
KINDS = {".png": "evaluation picture", ".npz": "table of scores", ".samples.txt": "list of samples"}  # what lies beside them


@dataclass(frozen=True)
class Arguments(Checked):
    """Flags of evaluate.py."""

    checkpoint: str = "./checkpoints"
    """A .pt or .onnx file, HF folder, or run directory, also by its name below ./checkpoints. Default: the newest finished run there."""
    data_dir: tuple[str, ...] = ()
    """Data directories. Default: ./data, unless --text, --tasks or --samples is given."""
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
    tasks: tuple[str, ...] = ()
    """Tasks to score: sample (made from the sample corpus's grammar), names in tasks/, YAML files, or names in lm-evaluation-harness."""
    task_data: str = DATA
    """Where the files of tasks are."""
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
        of_samples = ("prompts", "sample_tokens", "temperature", "seed", "judge", "train_data")
        if given := [] if self.samples else [f"--{name}" for name in of_samples if getattr(self, name) != getattr(Arguments, name)]:
            problems.append(f"only --samples needs {', '.join(given)}; say how many, e.g. --samples 100")
        if self.output is not None and Path(self.output).suffix in KINDS:
            problems.append(f"--output={self.output} names what is written beside the results; give it another ending, e.g. .json")
        if named := FURTHER & {*self.data_dir, *self.text}:
            problems.append(f"the results have a part called {', '.join(named)} already; write ./{min(named)}")
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


def read_sets(args: Arguments, tokenizer: TextTokenizer) -> dict[tuple[str, str], HeldOut]:
    """What is to be scored, by (name, split). Raises ValueError, FileNotFoundError."""
    names = args.data_dir or (() if args.text or args.tasks or args.samples else ("./data",))
    sets = {(name, split): held_out for name in names for split, held_out in read_directory(args, tokenizer, name).items()}
    return sets | {(name, "text"): read_text(name, args.form, tokenizer) for name in args.text}


def tell_unused(args: Arguments, held_out: bool) -> None:
    """Name the flags that change nothing here. held_out: whether held-out text is scored."""
    kinds = {"--data_dir or --text": [] if held_out else ["positions", "stride", "stream"], "--tasks": [] if args.tasks else ["task_data"]}
    for owner, names in kinds.items():
        if given := [f"--{name}" for name in names if getattr(args, name) != getattr(Arguments, name)]:
            notice(f"{' and '.join(given)} changed nothing, for there is no {owner}")


def loss_by_position(positions: list[list[float]]) -> list[dict]:
    """Mean loss in ranges of positions that double: {"from", "to", "loss", "tokens"}, empty ranges left out."""
    rows, start = [], 0
    while start < len(positions):
        end = min(len(positions), max(1, 2 * start))
        tokens, nats = map(sum, zip(*positions[start:end]))
        rows += [{"from": start + 1, "to": end, "loss": nats / tokens, "tokens": int(tokens)}] if tokens else []
        start = end
    return rows


def training_data(args: Arguments, tokenizer: TextTokenizer, content: dict) -> list[DataDirectory]:
    """The directories in which to look for what was learned by heart: --train_data, or what the checkpoint names, as far as it is there."""
    names = args.train_data or tuple(parse_weighted(name)[0] for name in content.get("train_config", {}).get("data_dir", ()))
    found = []
    for name in names:
        try:
            data = DataDirectory(name, tokenizer)
            data.check_tokenizer(tokenizer, "the model", "tokenizer.json (the model's run directory holds one)")
            for split in ("train", *samples.beside(data)):
                data.tokens(split)
            found.append(data)
        except (ValueError, FileNotFoundError) as error:
            if args.train_data:
                raise
            notice(f"what was learned by heart isn't looked for in {name}: {error}")
    return found


def evaluate_tasks(
    args: Arguments, scorer: Scorer, known: dict[str, ItemScores], tasks: list[Task], foreign: list[str]
) -> dict[str, ItemScores]:
    """The scores of tasks, and of `foreign` ones that lm-evaluation-harness knows, by their names. Raises ValueError."""
    options, found = (scorer.hash, known, scorer.batch_size), {}
    if foreign:  # first: what it can't load or score is only known by trying
        from evaluation.lm_harness import run_harness_tasks  # an optional package

        found = run_harness_tasks(scorer.model, scorer.tokenizer, foreign, *options)
        if both := sorted(found.keys() & {task.name for task in tasks}):
            raise ValueError(f"{', '.join(both)} is a task here and in lm-evaluation-harness; score them in two calls, with two --output")
    return run_tasks(scorer.model, scorer.tokenizer, tasks, *options) | found


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that aren't empty. Raises FileNotFoundError, ValueError."""
    try:
        prompts = [line for line in read_file(path).decode().splitlines() if line]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} has bytes that are not UTF-8 ({error}); convert it first") from None
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one on each line")
    return prompts


def evaluate_samples(args: Arguments, model: Network, tokenizer: TextTokenizer, content: dict) -> tuple[dict, list[samples.Sample]]:
    """Let the model write, and measure it: the measures and the texts. Raises ValueError, FileNotFoundError."""
    prompts = [""] if args.prompts is None else read_prompts(Path(args.prompts))
    judge = None if args.judge is None else load_network(args.judge, choose_device(args.device))
    directories = training_data(args, tokenizer, content)
    longest = args.sample_tokens or model.config.block_size
    drawn = samples.draw_samples(model, tokenizer, prompts, args.samples, longest, args.temperature, args.seed)
    result = samples.measure_samples(drawn)
    if directories:
        result["in_training"] = samples.shared_with_training([sample.ids for sample in drawn], directories)
    if judge is not None:
        result["judge"] = samples.judged(drawn, *judge[:3])
    grammar = hashlib.sha256(GRAMMAR_PATH.read_bytes()).hexdigest()
    if any(((data.meta or {}).get("sample") or {}).get("grammar_sha256") == grammar for data in directories):
        result["grammar"] = samples.from_the_grammar(drawn, load_grammar().log2_probability)
    return result, drawn


def main(argv: list[str] | None = None) -> int:
    args = read_command_line(Arguments, argv, __doc__, aliases={"model_path": "checkpoint"})
    path, texts = find_checkpoint(args.checkpoint), [file.path for file in find_files(args.text, args.form)]
    name = str(path.parent / EVALUATION) if args.output is None else args.output
    read = [path, *texts, *map(Path, filter(None, [args.prompts]))]
    output = output_file(name, "evaluation", read)
    picture, scores_path, texts_path = (output_file(str(output.with_suffix(suffix)), kind, read) for suffix, kind in KINDS.items())
    known = read_known(scores_path)
    tasks, foreign = find_tasks(args.tasks, Path(args.task_data), sample_tasks.MADE)
    model, tokenizer, _, content = load_network(str(path), choose_device(args.device))
    batch_size = min(args.batch_size, getattr(model, "windows", args.batch_size))
    scorer = Scorer(model, tokenizer, args.checkpoint, known.values(), batch_size, args.stride, args.stream)
    held_out = read_sets(args, tokenizer)  # all that can be wrong is read before the work begins
    measured, drawn = evaluate_samples(args, model, tokenizer, content) if args.samples else ({}, [])
    task_scores = evaluate_tasks(args, scorer, known, tasks, foreign)
    sets = {key: scorer.score(documents) for key, documents in held_out.items()}
    results: dict[str, dict[str, dict]] = {}
    for (name, split), scores in sets.items():
        shown = {key: value for key, value in scores.summary.items() if key not in DETAILS}
        shown |= {"loss_by_position": loss_by_position(scores.summary["positions"])} if args.positions else {}
        results.setdefault(name, {})[split] = shown
    further = {"tasks": {name: scores.summary for name, scores in task_scores.items()}} if task_scores else {}
    further |= {"samples": {args.checkpoint: measured}} if drawn else {}
    write_json(output, results | further)  # first: who reads what is printed may have gone
    beside = []
    if drawn:
        heading = f"{len(drawn)} texts by {args.checkpoint}, temperature {args.temperature:g}, seed {args.seed} (evaluate.py --samples)"
        samples.write_samples(texts_path, drawn, heading)
        beside.append(texts_path.name)
    if sets or task_scores:
        kept = {name: scores for name, scores in known.items() if scores.model == scorer.hash}
        named = {set_name(*key, args.stride, args.stream): scores for key, scores in sets.items()}
        write_scores(scores_path, kept | named | task_scores)
        beside.append(scores_path.name)
    if sets:
        draw_evaluation(picture, {" ".join(key): scores.summary for key, scores in sets.items()})
        beside.append(picture.name)
    honest = print_results(results) if results else True
    if args.positions:
        print_positions(results)
    if task_scores:
        print("\n".join(task_table(task_scores)))
    if drawn:
        print_samples(measured)
    tell_unused(args, bool(sets))
    notice(f"written to {output}, with {' and '.join(beside)} beside it")
    return 0 if honest else 1


if __name__ == "__main__":
    run_script(main)
