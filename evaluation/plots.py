"""Pictures of an evaluation."""

import warnings
from pathlib import Path

from formats.outputs import write_atomically

FEWEST, FEWEST_SHARE = 20, 0.0005  # predictions behind a point of the calibration: fewer would only show chance
MARK = {"Software": "evaluate.py"}  # formats.outputs knows the picture by it


def draw_evaluation(path: Path, summaries: dict[str, dict]) -> None:
    """Two panels, a line for each set of documents: how far stated probabilities can be trusted, and loss by position in the context.

    summaries: by names, with `positions` and `calibration` as `evaluation.measures.Score` has them. Raises OSError.
    """
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(11, 4.6), dpi=110)
    reliability, positions = figure.subplots(1, 2)
    reliability.plot([0, 1], [0, 1], color="gray", linestyle=":", linewidth=1, label="as stated")
    for name, summary in summaries.items():
        fewest = max(FEWEST, FEWEST_SHARE * sum(row[0] for row in summary["calibration"]))
        points = [(confidence / count, hits / count) for count, confidence, hits in summary["calibration"] if count >= fewest]
        reliability.plot(
            *(zip(*points) if points else ([], [])), marker="o", markersize=3, label=f"{name} (error {summary['calibration_error']:.3f})"
        )
        steps = [(i + 1, nats / count) for i, (count, nats) in enumerate(summary["positions"]) if count]
        positions.plot(*zip(*smoothed(steps)), linewidth=1.2, label=name)
    reliability.set(xlabel="probability of the most probable token", ylabel="how often it was right", title="calibration")
    positions.set(xlabel="position in the context (tokens)", ylabel="loss (nats per token)", title="loss by position", xscale="log")
    positions.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    for axes in (reliability, positions):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for text in figure.findobj(Text):  # a name such as $_$ is no formula
        text.set_parse_math(False)
    with warnings.catch_warnings(action="ignore"):  # a glyph that the font lacks in a name
        figure.tight_layout()
        write_atomically(path, lambda file: figure.savefig(file, format="png", metadata=MARK))


def smoothed(steps: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Points (position, loss) averaged in ranges that grow with the position, at most about 40 of them."""
    points, start = [], 0
    while start < len(steps):
        end = min(len(steps), max(start + 1, int(start * 1.15)))
        points.append(tuple(sum(values) / (end - start) for values in zip(*steps[start:end])))
        start = end
    return points
