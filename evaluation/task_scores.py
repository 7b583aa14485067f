"""What a model makes of tasks: which choice it finds most likely, by how much, and how sure the averages are."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from utils import notice

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from evaluation.likelihood import Request, log_likelihoods
from evaluation.tasks import Item, Task
from formats.scores import ItemScores, content_hash
from formats.tokenizer import TextTokenizer
from models import GPT

METHOD = "log-likelihoods 1"  # part of each key: another method gives other scores
CONFIDENCE = 0.95
Kind = Literal["share", "probability", "any"]  # of values: right or wrong, between 0 and 1, any number


def encode_pair(tokenizer: TextTokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context, an EOT before it, and of what follows it, by lm-evaluation-harness's rule (`TemplateLM._encode_pair`).

    Spaces at the context's end belong to the continuation; both are encoded together and parted where the context alone ends. Where that
    leaves nothing, the continuation is encoded alone. Raises ValueError for a continuation without tokens.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    ids = tokenizer.encode(context)
    following = tokenizer.encode(context + continuation)[len(ids) :] or tokenizer.encode(continuation)
    if not following:
        raise ValueError(f"the model's tokenizer has no token for {continuation!r}; take another task, or a model that can read it")
    return [tokenizer.eot_id, *ids], following


def requests_of(tokenizer: TextTokenizer, items: Iterable[Item]) -> list[Request]:
    """Every choice of every item, one after the other."""
    return [encode_pair(tokenizer, item.context, item.delimiter + choice) for item in items for choice in item.choices]


def share_of_best(values: np.ndarray, right: int) -> float:
    """1 if the right one's value is the largest, 0 if it isn't; of n equal largest ones it gets 1/n: who can't tell them apart guesses."""
    best = values == values.max()
    return float(best[right]) / best.sum()


def score_choices(items: tuple[Item, ...], nats: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of items with several choices. nats: the log-likelihoods of all choices, one after the other.

    accuracy_norm compares log-likelihoods per character, as lm-evaluation-harness's acc_norm; margin is in nats.
    """
    rows, start = [], 0
    for item in items:
        own = nats[start : start + len(item.choices)]
        start += len(item.choices)
        per_character = own / np.array([len(choice) for choice in item.choices])
        margin = own[item.right] - np.delete(own, item.right).max()
        probability = math.exp(own[item.right] - np.logaddexp.reduce(own))
        rows.append((share_of_best(own, item.right), share_of_best(per_character, item.right), margin, probability))
    return dict(zip(("correct", "correct_norm", "margin", "probability"), np.array(rows).T.copy(), strict=True))


def interval(values: np.ndarray, kind: Kind) -> tuple[float, float] | None:
    """The 95% interval of a mean over items: Wilson's for a share, else Student's t; None for a single item that isn't right or wrong.

    It covers which items were drawn, not the training's luck: another seed of the same training may lie outside.
    """
    if kind == "share":
        low, high = proportion_confint(values.sum(), len(values), alpha=1 - CONFIDENCE, method="wilson")
    elif len(values) < 2:
        return None
    else:
        error = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
        low, high = values.mean() - error, values.mean() + error
        if kind == "probability":
            low, high = max(0.0, low), min(1.0, high)
    return float(low), float(high)


def measure(values: np.ndarray, kind: Kind = "any", **beside: float) -> dict:
    """A mean over items with its interval, and what stands beside it: chance, perfect."""
    low, high = interval(values, kind) or (None, None)
    return {"value": float(values.mean()), "low": low, "high": high, **beside}


def perfect_choices(items: tuple[Item, ...]) -> dict[str, float]:
    """What somebody who knows the probabilities of all choices reaches; nothing where they aren't known."""
    if any(item.probabilities is None for item in items):
        return {}
    known = [np.array(item.probabilities) for item in items]
    accuracy = np.mean([share_of_best(values, item.right) for item, values in zip(items, known)])
    probability = np.mean([values[item.right] / values.sum() for item, values in zip(items, known)])
    return {"accuracy": float(accuracy), "probability": float(probability)}


def measures_of(task: Task, columns: dict[str, np.ndarray]) -> dict[str, dict]:
    """The averages over a task's items, by name."""
    if task.cloze:
        loss = measure(-columns["log_probability"])
        perplexity = {key: None if value is None else math.exp(min(value, 700.0)) for key, value in loss.items()}
        probability = measure(columns["probability"], "probability")
        return {"accuracy": measure(columns["correct"], "share"), "perplexity": perplexity, "probability": probability}
    chance = {"chance": float(np.mean([1 / len(item.choices) for item in task.items]))}
    measures = {
        "accuracy": measure(columns["correct"], "share", **chance),
        "accuracy_norm": measure(columns["correct_norm"], "share", **chance),
        "margin": measure(columns["margin"]),
        "probability": measure(columns["probability"], "probability", **chance),
    }
    for name, perfect in perfect_choices(task.items).items():
        measures[name]["perfect"] = perfect
    return measures


def summarize_task(task: Task, columns: dict[str, np.ndarray]) -> dict:
    """What evaluation.json says of a task: its measures, and of a group the accuracy of each part."""
    first = {"accuracy_norm": "correct_norm"}.get(task.metrics[0], "correct")  # the column that runs are compared by
    summary = {"items": len(task.items), "metric": first, "metrics": [*task.metrics], "measures": measures_of(task, columns)}
    if task.parts:
        ends = np.cumsum([*task.parts.values()])[:-1]
        parts = zip(task.parts, np.split(columns["correct"], ends))
        summary["parts"] = {name: {"items": len(values)} | measure(values, "share") for name, values in parts}
    return summary


def score_task(model: GPT, tokenizer: TextTokenizer, task: Task, key: str, model_hash: str, batch_size: int = 32) -> ItemScores:
    """Score every item of a task. key: of model, items and method; model_hash: of the model alone.

    Raises ValueError where the model or its tokenizer can't.
    """
    requests = requests_of(tokenizer, task.items)
    found = log_likelihoods(model, requests, batch_size, bar=task.name)
    if task.cloze:
        columns = {"correct": found.greedy.astype(float), "log_probability": found.nats, "probability": np.exp(found.nats)}
    else:
        columns = score_choices(task.items, found.nats)
    summary = summarize_task(task, columns)
    if unknown := sum(tokenizer.unknown_id in (*context, *rest) for context, rest in requests):
        summary["texts_with_unknown_tokens"] = unknown
        notice(f"warning: {task.name}: {unknown} of {len(requests)} texts have parts that the model's tokenizer doesn't know")
    return ItemScores(key, task.items_hash, "task", summary, columns, model_hash)


def run_tasks(
    model: GPT, tokenizer: TextTokenizer, tasks: list[Task], model_hash: str, known: dict[str, ItemScores], batch_size: int = 32
) -> dict[str, ItemScores]:
    """The scores of every task by its name. model_hash: of weights and tokenizer. known: earlier scores; what has the same key is taken.

    Raises ValueError as score_task does.
    """
    scores = {}
    for task in tasks:
        key = content_hash(METHOD, model_hash, task.items_hash)
        earlier = known.get(task.name)
        if earlier is not None and earlier.key == key:
            scores[task.name] = replace(earlier, summary=summarize_task(task, earlier.columns))
        else:
            scores[task.name] = score_task(model, tokenizer, task, key, model_hash, batch_size)
    return scores


def cells(measured: dict) -> list[str]:
    """A measure's value, interval, chance and perfect value, "-" for what isn't known."""
    shown = {key: "-" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}" for key, value in measured.items()}
    span = "-" if measured["low"] is None else f"{shown['low']} to {shown['high']}"
    return [shown["value"], span, shown.get("chance", "-"), shown.get("perfect", "-")]


def task_table(scores: dict[str, ItemScores]) -> list[str]:
    """The lines of a table for people: each task's metrics and its probability of the right answer, with chance and the perfect score."""
    rows = [("task", "measure", "value", "95% interval", "chance", "perfect", "items")]
    for name, score in scores.items():
        measures = score.summary["measures"]
        shown = dict.fromkeys((*score.summary["metrics"], *(["probability"] if "probability" in measures else [])))
        for i, title in enumerate(shown):
            m = measures[title]
            rows.append((name if i == 0 else "", title, *cells(m), f"{score.summary['items']:,}"))
        rows += [(f"  {part}", "accuracy", *cells(m), f"{m['items']:,}") for part, m in score.summary.get("parts", {}).items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{cell:{'<' if i < 2 else '>'}{w}}" for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows]
