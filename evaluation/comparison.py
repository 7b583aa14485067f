"""Variants compared on everything that all their runs were scored on: differences with intervals, and what they mean in words. No torch.

A variant is {run: {set: ItemScores}}, its runs being equal but for their seeds. See evaluation/statistics.py for the method.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from evaluation.statistics import ENOUGH_SEEDS, FEWEST_ITEMS, LEVEL, MOST_SEEDS, Difference, difference, holm, items_needed, seeds_needed
from formats.scores import ItemScores

Variants = dict[str, dict[str, dict[str, ItemScores]]]


@dataclass(frozen=True)
class Metric:
    """What is measured on one set of items. runs: variant -> run -> value. items: how many there are; noun: what one of them is."""

    name: str
    unit: str
    lower_is_better: bool
    noun: str
    items: int
    runs: dict[str, dict[str, float]]

    @property
    def variants(self) -> dict[str, int]:
        """Variant -> number of its runs."""
        return {variant: len(runs) for variant, runs in self.runs.items()}

    def mean(self, variant: str) -> float:
        return float(np.mean([*self.runs[variant].values()]))

    def spread(self, variant: str) -> float | None:
        """Standard deviation over the runs of a variant; None for a single one."""
        values = [*self.runs[variant].values()]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Finding:
    """One comparison: by how much `first` is better than `second` on a metric; below 0 where it is worse.

    low, high: 95% interval. p: of this comparison alone; corrected_p: among all of the call (Holm). None for a single item, which says
    nothing about chance. clear: whether one is better, beyond doubt. verdict: the whole in a sentence.
    """

    metric: str
    first: str
    second: str
    difference: float
    low: float | None
    high: float | None
    p: float | None
    corrected_p: float | None
    clear: bool
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All metrics and findings of a call; notes: what a reader must know beside them."""

    metrics: list[Metric]
    findings: list[Finding]
    notes: list[str]


@dataclass(frozen=True)
class _Columns:
    """The items of a set in a form that can be compared. values: run -> (items,); weights: (items,)."""

    unit: str
    lower_is_better: bool
    noun: str
    values: dict[str, np.ndarray]
    weights: np.ndarray


def _columns(name: str, scores: dict[str, ItemScores]) -> _Columns:
    """scores: of each run on the set `name`. Raises ValueError where they are not of the same items, or not numbers."""
    if len({(s.items, s.kind, len(s)) for s in scores.values()}) > 1:
        raise ValueError(f"the runs were scored on different items of {name}; evaluate them on the same ones")
    one = next(iter(scores.values()))
    column = "nats" if one.kind == "text" else str(one.summary.get("metric", "correct"))
    for run, s in scores.items():
        if missing := {column, *(["bytes"] if s.kind == "text" else [])} - s.columns.keys():
            raise ValueError(f"the scores of {run} on {name} have no {missing.pop()}; evaluate it again")
        if not np.isfinite(s.columns[column]).all():
            raise ValueError(f"the scores of {run} on {name} hold numbers that are not finite; evaluate it again")
    values = {run: s.columns[column].astype(float) for run, s in scores.items()}
    weights = one.columns["bytes"].astype(float) if one.kind == "text" else np.ones(len(one))
    if weights.sum() == 0:
        raise ValueError(f"{name} holds nothing to compare on")
    if one.kind == "text":
        return _Columns("bits/byte", True, "document", {run: nats / math.log(2) for run, nats in values.items()}, weights)
    return _Columns({"correct": "accuracy", "correct_norm": "accuracy_norm"}.get(column, column), False, "item", values, weights)


def as_text(value: float, scale: float) -> str:
    """A number with as many digits as a difference of size `scale` needs to be told to about two."""
    digits = 4 if scale <= 0 else min(8, max(2, 1 - math.floor(math.log10(scale))))
    return f"{value:z.{digits}f}"  # z: no minus before zeros


def _amount(finding: Finding, unit: str) -> str:
    """How much the better of two is better, e.g. `0.031 bits/byte [0.022, 0.040]`."""
    if finding.low is None or finding.high is None:
        return f"{as_text(abs(finding.difference), abs(finding.difference))} {unit}"
    sign = -1 if finding.difference < 0 else 1
    low, high = sorted((sign * finding.low, sign * finding.high))
    value, low, high = (as_text(number, (high - low) / 2) for number in (abs(finding.difference), low, high))
    return f"{value} {unit} [{low}, {high}]"


def _advice(found: Difference, level: float) -> str:
    """What it would take to find a difference as large as the one that was seen."""
    size = abs(float(found.value))
    if size == 0:
        return "they came out alike"
    if found.n_items < FEWEST_ITEMS:
        return f"{found.n_items} items are too few to tell how much they vary"
    needed, target = seeds_needed(found, size, level), f"needed for a difference of {as_text(size, size)}"
    if needed is None:
        times = math.ceil(2 * items_needed(found, size, level))  # half of the error is left to the seeds
        items = f"at least {times} times as many items are {target}, with any number of seeds"
        return items if times > 1 else f"more than {MOST_SEEDS:,} seeds of each {target}"
    more = needed - found.n_runs[0]
    counted = f"{needed} seeds" if found.n_runs[0] != found.n_runs[1] else f"{more} more seed{'s' if more > 1 else ''}"
    return f"about {counted} of each {target}"


def _verdict(finding: Finding, unit: str, found: Difference | None, level: float) -> str:
    """The sentence of a finding whose numbers are there. level: at which p is judged, after Holm's correction."""
    better, worse = (finding.first, finding.second)[:: -1 if finding.difference < 0 else 1]
    by = _amount(finding, unit)
    came_out = f"{better} came out better than {worse} by {by}" if finding.difference else f"{better} and {worse} came out alike"
    if found is None:
        return f"{came_out} on the one item there is, which says nothing about chance"
    fewest = min(found.n_runs)
    if fewest == 1:
        better_model = f"the model of {better} is better than that of {worse} by {by}"
        alike = f"the models of {better} and {worse} are not distinguishable ({by})"
        only = f"one seed doesn't cover the training's variance, train {ENOUGH_SEEDS} of each"
        return f"{better_model if finding.corrected_p < LEVEL else alike}; {only}"
    if fewest < ENOUGH_SEEDS:
        counts = " and ".join(map(str, sorted(set(found.n_runs))))
        return f"{came_out}, but {counts} seeds are too few for a verdict; train {ENOUGH_SEEDS} of each"
    if finding.clear:
        return f"{better} is better than {worse} by {by}"
    alone = f"; p = {finding.p:.2g} before the correction" if finding.p < LEVEL else ""
    return f"{better} and {worse} are not distinguishable ({by}{alone}): {_advice(found, level)}"


def _findings(metrics: list[Metric], columns: dict[str, _Columns], variants: Variants) -> list[Finding]:
    """Each pair of variants on each metric, corrected for their number."""
    pairs = [(metric, *pair) for metric in metrics for pair in itertools.combinations(variants, 2)]
    found = []
    for metric, *pair in pairs:
        part = columns[metric.name]
        a, b = (np.stack([part.values[run] for run in variants[variant]]) for variant in pair)
        found.append(difference(a, b, part.weights) if metric.items > 1 else None)
    p_values = [float(one.p) for one in found if one is not None]
    corrected = iter(zip(p_values, holm(p_values)))
    findings = []
    for (metric, first, second), one in zip(pairs, found):
        sign = -1 if metric.lower_is_better else 1
        value = sign * (metric.mean(first) - metric.mean(second))
        low = high = p = corrected_p = None
        if one is not None:
            low, high = sorted(sign * end for end in one.interval())
            p, corrected_p = next(corrected)
        clear = corrected_p is not None and corrected_p < LEVEL and min(one.n_runs) >= ENOUGH_SEEDS
        finding = Finding(metric.name, first, second, value, low, high, p, corrected_p, clear, "")
        level = LEVEL / sum(other >= p for other in p_values) if one is not None else LEVEL  # Holm's, at this p-value's rank
        findings.append(dataclasses.replace(finding, verdict=_verdict(finding, metric.unit, one, level)))
    return findings


def check_number(variants: Collection[str]) -> None:
    """Raise ValueError for fewer than two variants."""
    if len(variants) < 2:
        raise ValueError(
            f"there is only one variant, {', '.join(variants)}; give runs that differ in more than their seeds, or NAME=RUN,RUN"
        )


def compare_variants(variants: Variants, notes: list[str] | None = None) -> Comparison:
    """Every pair of variants on every set that all runs have. notes: what is to be told with the results, e.g. unequal budgets.

    Raises ValueError for fewer than two variants, a run that is named twice, and sets that can't be compared.
    """
    check_number(variants)
    runs = [run for members in variants.values() for run in members]
    if twice := next((run for run in runs if runs.count(run) > 1), None):
        raise ValueError(f"{twice} is named twice; name each run once")
    scores = {run: sets for members in variants.values() for run, sets in members.items()}
    everywhere = [name for name in scores[runs[0]] if all(name in sets for sets in scores.values())]
    if not everywhere:
        raise ValueError("the runs have no documents and no tasks in common; evaluate all of them on the same ones")
    notes = [*(notes or [])]
    if partly := sorted({name for sets in scores.values() for name in sets} - {*everywhere}):
        notes.append(f"{', '.join(partly)}: not every run was scored there, so nothing is compared")
    columns = {name: _columns(name, {run: sets[name] for run, sets in scores.items()}) for name in everywhere}
    metrics = []
    for name, part in columns.items():
        values = {run: float(y.sum() / part.weights.sum()) for run, y in part.values.items()}
        by_variant = {variant: {run: values[run] for run in members} for variant, members in variants.items()}
        metrics.append(Metric(name, part.unit, part.lower_is_better, part.noun, len(part.weights), by_variant))
    return Comparison(metrics, _findings(metrics, columns, variants), notes)
