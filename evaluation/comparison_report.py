"""A comparison for people: compare.md, which is printed too, compare.json, and compare.png with differences and learning curves."""

import dataclasses
import math
import os
import warnings
from pathlib import Path

import numpy as np

from evaluation.comparison import Comparison, Finding, Metric, as_text
from evaluation.statistics import ENOUGH_SEEDS
from evaluation.variants import Point
from formats.outputs import check_names, is_of_kind, write_atomically, write_json, write_text

JSON, REPORT, PICTURE = "compare.json", "compare.md", "compare.png"


def render(comparison: Comparison) -> str:
    """The comparison as Markdown that is as easy to read in a terminal: means of every variant, then the verdicts."""
    rows = [["", *(f"{name} ({count} seed{'s' if count > 1 else ''})" for name, count in comparison.metrics[0].variants.items())]]
    for metric in comparison.metrics:
        gaps = [abs(f.difference) for f in comparison.findings if f.metric == metric.name and f.difference]
        cells = []
        for variant in metric.variants:
            spread = metric.spread(variant)
            scale = spread or min(gaps, default=0)
            cells.append(as_text(metric.mean(variant), scale) + ("" if spread is None else f" ± {as_text(spread, scale)}"))
        rows.append([f"{metric.name}, {metric.unit}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for metric in comparison.metrics:
        better = "less" if metric.lower_is_better else "more"
        lines += [
            "",
            f"{metric.name}: {metric.items:,} {metric.noun}{'s' if metric.items > 1 else ''}, {metric.unit}, {better} is better",
            "",
        ]
        for finding in (f for f in comparison.findings if f.metric == metric.name):
            p = "" if finding.corrected_p is None else f" (p = {finding.corrected_p:.2g})"
            lines.append(f"- {finding.verdict}{p}")
    count = sum(finding.p is not None for finding in comparison.findings)
    corrected = f", corrected for {count} comparisons" if count > 1 else ""
    lines += ["", f"± is the standard deviation over seeds, [ , ] a 95% interval of a difference; p-values are two-sided{corrected}."]
    return "\n".join([*lines, *(f"\nNote: {note}" for note in comparison.notes)])


def comparison_directory(name: str) -> Path:
    """The directory that --output names, checked before the work begins. Raises ValueError where something else is in the way."""
    directory = Path(name)
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ValueError(f"{directory} is no directory; --output needs one for {JSON}, {REPORT} and {PICTURE}")
    if not directory.parent.is_dir():
        raise ValueError(f"{directory} can't be made: there is no directory {directory.parent}; choose another --output")
    if not os.access(directory if directory.exists() else directory.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{directory} is not writable; choose another --output")
    ours = (JSON, REPORT, PICTURE) if is_of_kind(directory / JSON, "comparison") else ()
    check_names(directory, (JSON, REPORT, PICTURE), ours, "output")
    return directory


def write_comparison(directory: Path, comparison: Comparison, curves: dict[str, list[list[Point]]] | None = None) -> None:
    """Write compare.json, compare.md and compare.png into a directory, made if it is missing. Raises OSError.

    curves: variant -> the learning curve of each of its runs, for the picture.
    """
    directory.mkdir(exist_ok=True)
    write_json(directory / JSON, dataclasses.asdict(comparison))  # first: it marks the others as ours
    write_text(directory / REPORT, f"# Comparison\n\n{render(comparison)}\n\n![differences and learning curves]({PICTURE})\n")
    draw_comparison(directory / PICTURE, comparison, curves or {})


# ---------------------------------------------------------------- picture

COLUMNS = 4  # metrics beside each other
KINDS = {"one is better (p < 0.05 among all)": "tab:green", "not distinguishable": "tab:gray", "too few seeds": "tab:orange"}


def _kind(finding: Finding, metric: Metric) -> str:
    few = min(metric.variants[variant] for variant in (finding.first, finding.second)) < ENOUGH_SEEDS
    return next(iter(KINDS)) if finding.clear else "too few seeds" if few else "not distinguishable"


def _short(name: str, length: int = 24) -> str:
    """A name that fits beside a plot: its end, which tells runs apart."""
    return name if len(name) <= length else "…" + name[-length + 1 :]


def _draw_forest(axes, metric: Metric, findings: list[Finding], named: bool) -> None:
    """The differences on one metric, a row each, the first comparison at the top. named: with the variants' names beside the rows."""
    for row, finding in enumerate(findings):
        ends = [end if end is not None else finding.difference for end in (finding.low, finding.high)]
        color = KINDS[_kind(finding, metric)]
        axes.plot(ends, [row, row], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(finding.difference, row, "o", color=color, markersize=6)
    axes.axvline(0, color="black", linewidth=0.8)
    pairs = [f"{_short(finding.first)} – {_short(finding.second)}" for finding in findings]
    axes.set_yticks(range(len(findings)), pairs if named else [""] * len(findings))
    axes.set_ylim(len(findings) - 0.4, -0.6)
    axes.set_title(_short(metric.name, 40), fontsize=10)
    axes.set_xlabel(f"{metric.unit}, {'saved' if metric.lower_is_better else 'gained'} by the first", fontsize=9)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(labelsize=9)
    axes.grid(axis="x", alpha=0.3)


def _mean_curve(runs: list[list[Point]]) -> list[Point]:
    """The mean over runs at each evaluation that all of them made."""
    at = [{point.tokens: point for point in run} for run in runs]
    shared = sorted(set.intersection(*map(set, at)))
    return [Point(t, *np.mean([(run[t].seconds, run[t].bits_per_byte) for run in at], axis=0).tolist()) for t in shared]


def _draw_curves(axes, curves: dict[str, list[list[Point]]], field: str, unit: float) -> None:
    """Bits per byte over tokens or seconds, in `unit`: each run thin, the mean of a variant thick."""
    for i, (variant, runs) in enumerate(curves.items()):
        lines = [(run, {"linewidth": 0.8, "alpha": 0.5}) for run in runs]
        for run, style in [*lines, (_mean_curve(runs), {"linewidth": 2, "marker": "o", "label": _short(variant)})]:
            values = [point.bits_per_byte for point in run]
            axes.plot([getattr(point, field) / unit for point in run], values, color=f"C{i}", markersize=4, **style)
    every = [run for runs in curves.values() for run in runs]
    low = min(point.bits_per_byte for run in every for point in run)
    high = max(run[len(run) // 4].bits_per_byte for run in every)  # the beginning would flatten the rest
    axes.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)


def draw_comparison(path: Path, comparison: Comparison, curves: dict[str, list[list[Point]]]) -> None:
    """The differences with their intervals (a panel for each metric), and below the learning curves of the runs that have any."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    curves = {variant: [run for run in runs if run] for variant, runs in curves.items() if any(runs)}
    metrics, findings = comparison.metrics, comparison.findings
    pairs, columns = len(findings) // len(metrics), min(COLUMNS, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    heights = [0.7 + rows * (1.1 + 0.28 * pairs), 3.6 if curves else 0.01]
    figure = Figure(figsize=(min(16, 7 + 2.6 * columns), sum(heights)), dpi=110, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    panels = top.subplots(rows, columns, squeeze=False).flatten()
    for i, axes in enumerate(panels):
        if i < len(metrics):
            _draw_forest(axes, metrics[i], [f for f in findings if f.metric == metrics[i].name], i % columns == 0)
        else:
            axes.set_visible(False)
    top.suptitle("Differences with 95% intervals: right of 0 the first variant is better", fontsize=11)
    there = {_kind(finding, metric) for metric in metrics for finding in findings if finding.metric == metric.name}
    handles = [Line2D([], [], color=color, marker="o", linewidth=2, label=kind) for kind, color in KINDS.items() if kind in there]
    top.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    if curves:
        longest = max(point.seconds for runs in curves.values() for run in runs for point in run)
        unit, name = (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 120 else (1, "seconds")
        over_tokens, over_time = bottom.subplots(1, 2, sharey=True)
        _draw_curves(over_tokens, curves, "tokens", 1e6)
        _draw_curves(over_time, curves, "seconds", unit)
        over_tokens.set_ylabel("bits/byte", fontsize=9)
        over_tokens.set_xlabel("million tokens", fontsize=9)
        over_time.set_xlabel(f"{name} of training", fontsize=9)
        over_time.legend(fontsize=9, loc="upper right")
        bottom.suptitle("While training, each on its own validation split: every seed, and the mean", fontsize=11)
    for text in figure.findobj(Text):  # a name such as $_$ is no formula
        text.set_parse_math(False)
    with warnings.catch_warnings(action="ignore"):  # a glyph that the font lacks
        write_atomically(path, lambda file: figure.savefig(file, format="png"))
