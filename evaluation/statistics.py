"""Is one variant better than another? The difference of two groups of runs on the same items, its interval and p-value. No torch.

A variant is trained with several seeds; every run is scored on the same items (documents of held-out text, items of a task). A run's
metric is a ratio of sums, values / weights: bits per byte, or the share of right answers where every weight is 1. The model behind it:

    metric of run s of variant v on item i  =  variant v  +  run s  +  item i  +  variant x item  +  run x item

All but the first are random: other seeds and other items of the same kind would have come out otherwise. The item's own part is common to
all runs and falls out of differences. What is left is estimated from mean squares, as in a crossed design (Clark 1973, "The
language-as-fixed-effect fallacy"; Raaijmakers et al. 1999):

    seeds = variance of the runs' metrics / runs, summed over both variants     (run, and run x item)
    items = variance of the items' differences / items, less the part of run x item that `seeds` has already

Ratios are linearised (Cochran 1977, "Sampling Techniques", chapter 6). `seeds` rests on few runs, so its degrees of freedom are Welch's
(1947), and the error is distributed as sqrt(seeds) t + sqrt(items) normal, the sum that Behrens and Fisher took. A single t with
Satterthwaite's degrees for the sum would forget, where the few seeds happen to agree, how little that says: at 3 seeds, after Holm's
correction at 5%, it has 4 to 7% of false positives and this one 1 to 4% where seeds vary normally (MEASUREMENTS.md, section 10).
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special, stats
from scipy.optimize import brentq

LEVEL, POWER = 0.05, 0.8
ENOUGH_SEEDS = 3  # of each variant, for a verdict: with two, an interval is several times as wide as its data
FEWEST_ITEMS = 10  # to say what it would take to tell two variants apart
MOST_SEEDS = 100
# Nodes and weights for a mean over a variable that is uniform in (0, 1), dense at both ends: what is rare decides small p-values
UNIFORM = special.expit(np.linspace(-30, 30, 121))
WEIGHTS = UNIFORM * (1 - UNIFORM) / np.sum(UNIFORM * (1 - UNIFORM))


@dataclass(frozen=True)
class Difference:
    """The metric of one variant minus that of another; arrays (...) where the scores have leading dimensions.

    runs: variance of a single run's metric, of each variant (..., 2); 0 where a variant has one run, which tells nothing of it. items:
    variance of `value` that the choice of items makes. n_runs: of each variant. n_items: how many items all were scored on.
    """

    value: np.ndarray
    runs: np.ndarray
    items: np.ndarray
    n_runs: tuple[int, int]
    n_items: int

    @property
    def seeds(self) -> np.ndarray:
        """Variance of `value` that the training's luck makes, (...)."""
        return (self.runs / self.n_runs).sum(-1)

    @property
    def degrees(self) -> np.ndarray:
        """Welch's degrees of freedom of `seeds`, (...)."""
        parts, free = self.runs / self.n_runs, np.maximum(np.array(self.n_runs) - 1, 1)
        total = parts.sum(-1)
        return np.where(total > 0, total**2 / np.maximum((parts**2 / free).sum(-1), 1e-300), free.min())

    def chance(self, distance) -> np.ndarray:
        """Probability that chance alone makes a difference of at least this size, (...)."""
        # given what the seeds' variance really is (a scaled inverse chi-squared), the error is normal; t pays for few items
        degrees = self.degrees[..., None]
        seeds = self.seeds[..., None] * degrees / (2 * special.gammaincinv(degrees / 2, UNIFORM))
        spread = np.sqrt(seeds + np.asarray(self.items)[..., None])
        distance = np.abs(np.asarray(distance))[..., None]
        scaled = np.divide(distance, spread, out=np.where(distance > 0, np.inf, np.zeros_like(spread)), where=spread > 0)
        return 2 * (WEIGHTS * special.stdtr(self.n_items - 1, -scaled)).sum(-1)

    @property
    def p(self) -> np.ndarray:
        """p-value of no difference, two-sided, (...). Where nothing varies at all it is a sign test's on the items: a few prove little."""
        chance = self.chance(self.value)
        return np.where(self.seeds + self.items > 0, chance, np.maximum(chance, 2.0 ** (1 - min(self.n_items, 1000))))

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The interval that holds the true difference with probability 1 - level; for single values."""
        value, spread = float(self.value), math.sqrt(float(self.seeds + self.items))
        if spread == 0:
            return value, value
        far = spread
        while self.chance(far) > level:
            far *= 2
        half = brentq(lambda distance: float(self.chance(distance)) - level, 0, far, rtol=1e-6)
        return value - half, value + half


def _linearised(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The metric of each run (..., runs), and what each item adds to its difference from other sets of items (..., runs, items)."""
    total, mean = weights.sum(-1)[..., None], weights.mean(-1)[..., None, None]
    metric = values.sum(-1) / total
    return metric, (values - metric[..., None] * weights[..., None, :]) / mean


def difference(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> Difference:
    """The metric of variant a minus that of variant b. a, b: (..., runs, items); weights: (..., items). Needs two items."""
    n_items, n_runs = a.shape[-1], (a.shape[-2], b.shape[-2])
    (metric_a, items_a), (metric_b, items_b) = _linearised(a, weights), _linearised(b, weights)
    value = metric_a.mean(-1) - metric_b.mean(-1)
    items = (items_a.mean(-2) - items_b.mean(-2)).var(-1, ddof=1) / n_items
    if min(n_runs) < 2:
        return Difference(value, np.zeros((*value.shape, 2)), items, n_runs, n_items)
    runs = np.stack([metric_a.var(-1, ddof=1), metric_b.var(-1, ddof=1)], -1)
    twice = sum(part.var(-2, ddof=1).sum(-1) / ((n_items - 1) * n_items * part.shape[-2]) for part in (items_a, items_b))
    # runs that agree exactly, as shares of few items can, have nothing that could be in both parts
    agree = (np.ptp(metric_a, -1) == 0) & (np.ptp(metric_b, -1) == 0)
    items = np.where(agree, items, np.maximum(items - twice, 0))
    return Difference(value, runs, items, n_runs, n_items)


def holm(p_values: list[float]) -> list[float]:
    """p-values of several comparisons, corrected so that with probability 95% none below 0.05 is false (Holm 1979)."""
    from statsmodels.stats.multitest import multipletests

    return multipletests(p_values, method="holm")[1].tolist() if p_values else []


def _quantiles(found: Difference, n: np.ndarray | float, level: float) -> tuple[np.ndarray, np.ndarray]:
    """With n runs of each variant: the sum of t quantiles that a test of this level and POWER needs, and the standard error, (n,)."""
    runs = found.runs.sum() / n
    free = found.runs.sum() ** 2 / max((found.runs**2).sum(), 1e-300) * (n - 1)
    variance = runs + found.items
    degrees = np.where(runs > 0, free * (variance / np.maximum(runs, 1e-300)) ** 2, 1e9)
    return stats.t.isf(level / 2, degrees) + stats.t.ppf(POWER, degrees), np.sqrt(variance)


def seeds_needed(found: Difference, size: float, level: float = LEVEL) -> int | None:
    """About how many seeds each variant needs, so that a true difference of `size` is found with probability 80%.

    None for more than MOST_SEEDS, or where the items are too few for any number, see `items_needed`. Needs two runs of each variant.
    """
    n = np.arange(2, MOST_SEEDS + 1)
    quantiles, error = _quantiles(found, n, level)
    enough = (quantiles * error <= abs(size)) & (n > min(found.n_runs))
    return int(n[enough.argmax()]) if enough.any() else None


def items_needed(found: Difference, size: float, level: float = LEVEL) -> float:
    """How many times as many items it would take at least, with any number of seeds, to find a true difference of `size`."""
    quantiles = stats.norm.isf(level / 2) + stats.norm.ppf(POWER)
    return float(found.items) * (quantiles / size) ** 2
