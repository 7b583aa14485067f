"""Which finished runs are one variant, being equal but for their seeds, and what each cost: tokens, steps, parameters, time."""

import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from evaluation.comparison import Variants, check_number
from formats import huggingface
from formats.checkpoint import load_checkpoint
from formats.metrics import METRICS, read_metrics
from formats.run_directory import find_checkpoint
from formats.scores import ItemScores

# fields of a training that say where and under which seed it ran, not what it was; the data counts by its content
PLACES = ("seed", "out_dir", "data_dir")
TOLERANCE = {"tokens seen": 0.01, "steps": 0.01, "parameters": 0.01, "block size": 0.0, "training seconds": 0.25}


@dataclass(frozen=True)
class Point:
    """An evaluation while a model was trained. seconds: of training until then, without evaluations."""

    tokens: int
    seconds: float
    bits_per_byte: float


@dataclass(frozen=True)
class Run:
    """A finished run without its weights. name: as the user gave it. recipe: equal for runs of one variant.

    budget: what it cost, by the names of TOLERANCE; what isn't known is left out. tokenizer: text of its tokenizer.json.
    curve: its evaluations while it was trained, none where they aren't known.
    """

    name: str
    path: Path
    recipe: str
    seed: int | None
    budget: dict[str, float]
    tokenizer: str
    curve: list[Point]


def read_run(name: str) -> Run:
    """The run that `--checkpoint NAME` means. Raises FileNotFoundError, ValueError."""
    path = find_checkpoint(name)
    content = huggingface.load_folder(path) if path.is_dir() else load_checkpoint(path)
    model, train = content["model_config"], content["train_config"]
    fixed = {field: value for field, value in train.items() if field not in PLACES}
    known = all("sha256" in split for data in content["data"] for name, split in data.items() if name != "share")
    places = () if known else train.get("data_dir")  # a directory without meta.json is known by its place only
    recipe = json.dumps([model, fixed, content["data"], places, content.get("init_from")], sort_keys=True)
    curve = learning_curve(path.parent / METRICS) if train else []
    budget = {"block size": model["block_size"], "parameters": sum(weight.numel() for weight in content["model"].values())}
    if train:  # the whole training, of which the best model may be an earlier moment
        per_step = train["batch_size"] * train["gradient_accumulation_steps"] * model["block_size"]
        tokens = curve[-1].tokens if curve else content["step"] * per_step
        budget |= {"steps": tokens / per_step, "tokens seen": tokens}
    if curve:
        budget["training seconds"] = curve[-1].seconds
    return Run(name, path, recipe, train.get("seed"), budget, content["tokenizer"], curve)


def learning_curve(metrics: Path) -> list[Point]:
    """The evaluations in a metrics.jsonl; those without bits per byte, or before the first line on tokens, are left out."""
    points, tokens, seconds = [], 0, 0.0
    for line in read_metrics(metrics):
        if rate := line.get("tokens_per_second"):
            seconds += (line.get("tokens", tokens) - tokens) / rate
        tokens = line.get("tokens", tokens)
        bits = line.get("val_bits_per_byte")
        if bits is not None and tokens:
            points.append(Point(tokens, seconds, bits))
    return points


def common_name(names: list[str]) -> str:
    """`checkpoints/stories_seed1`, `checkpoints/stories_seed2` -> `stories`; a single name stays as it is."""
    if len(names) == 1:
        return names[0]
    start = os.path.commonprefix([name.rstrip("/") for name in names])
    return Path(re.sub(r"([\W_]+(seed|s))?[\W_]*\d*$", "", start)).name


def _share_a_seed(runs: list[Run]) -> bool:
    """Whether two of these runs are known to have the same seed."""
    seeds = [run.seed for run in runs if run.seed is not None]
    return len(set(seeds)) < len(seeds)


def group_runs(words: list[str]) -> tuple[dict[str, list[Run]], list[str]]:
    """Runs, or NAME=RUN,RUN, as variants by their names, and notes on what a reader must know.

    Runs that are equal but for seed and place are one variant, unless two of them have the same seed: those are models to compare, such as
    two checkpoints of one run. So are HF folders, which tell no seed. Raises FileNotFoundError; ValueError for what is named twice.
    """
    variants, loose, notes = {}, {}, []
    for word in words:
        name, equals, members = word.partition("=")
        if equals and not Path(word).exists():
            if name in variants or not name or not all(members.split(",")):
                raise ValueError(f"{word}: give NAME=RUN,RUN, each name once")
            variants[name] = [read_run(member) for member in members.split(",")]
            if _share_a_seed(variants[name]):
                raise ValueError(f"two runs of {name} have the same seed, so they say nothing of the training's variance; name one of them")
        else:
            run = read_run(word)
            loose.setdefault(run.recipe, []).append(run)
    for runs in loose.values():
        if share := _share_a_seed(runs):
            notes.append(f"{' and '.join(run.name for run in runs)} share a seed, so each is taken for a variant of its own")
        for members in [[run] for run in runs] if share or runs[0].seed is None else [runs]:
            names = (common_name([run.name for run in members]), members[0].name, str(members[0].path))
            variants[next(name for name in names if name and name not in variants)] = members
    check_number(variants)
    _check_distinct([run for runs in variants.values() for run in runs])
    return variants, notes + budget_notes(variants)


def _check_distinct(runs: list[Run]) -> None:
    """Raise ValueError where two names mean the same model."""
    for a, b in itertools.combinations(runs, 2):
        if a.path.resolve() == b.path.resolve():
            raise ValueError(f"{a.name} and {b.name} mean the same model, {a.path}; name each run by its own directory")


def budget_notes(variants: dict[str, list[Run]]) -> list[str]:
    """Where variants differ in more than their data: unequal budgets, other tokenizers."""
    notes = []
    for name, tolerance in TOLERANCE.items():
        known = {variant: [run.budget[name] for run in runs if name in run.budget] for variant, runs in variants.items()}
        means = {variant: sum(values) / len(values) for variant, values in known.items() if values}
        if len(means) == len(variants) and max(means.values()) > (1 + tolerance) * min(means.values()):
            notes.append(f"the variants differ in {name}: " + ", ".join(f"{variant} {mean:,.0f}" for variant, mean in means.items()))
    if len({run.tokenizer for runs in variants.values() for run in runs}) > 1:
        notes.append("the tokenizers differ, so a difference may come from them as well")
    return notes


def by_variant(variants: dict[str, list[Run]], scores: dict[str, dict[str, ItemScores]]) -> Variants:
    """The scores of runs (run -> set -> scores) as evaluation/comparison.py takes them."""
    return {variant: {run.name: scores[run.name] for run in runs} for variant, runs in variants.items()}
