"""How often compare.py is wrong: its intervals and verdicts on simulated runs whose true differences are 0, beside other methods."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats
from tqdm import tqdm

from evaluation.statistics import LEVEL, Difference, difference

VARIANTS, TEXTS, TASKS = 3, 2, 2  # 3 pairs of variants on 4 sets: 12 comparisons, corrected together
BATCH, RESAMPLES = 100, 400
TYPICAL_BYTES, LATENT = 180.0, 50.0


@dataclass(frozen=True)
class Scenario:
    """What chance does to a metric of about 1 bit per byte. Standard deviations of

    runs: a run's whole metric. variant_items: a variant on an item. run_items: a run on an item. unequal: factor of `runs` for the last
    variant. jumps: a run either learns something (70%) or not, instead of a normal distribution. items: in each set.
    """

    runs: float
    variant_items: float
    run_items: float
    items: int = 300
    unequal: float = 1.0
    jumps: bool = False


SCENARIOS = {
    "seeds dominate": Scenario(0.004, 0.005, 0.005),
    "items dominate": Scenario(0.0002, 0.03, 0.01),
    "items dominate, differently for each run": Scenario(0.0, 0.0, 0.03),
    "seeds and items alike": Scenario(0.002, 0.03, 0.01),
    "seeds dominate, 3 times as much in one variant": Scenario(0.004, 0.005, 0.005, unequal=3.0),
    "seeds dominate, as jumps": Scenario(0.004, 0.005, 0.005, jumps=True),
    "items dominate, 40 items": Scenario(0.0002, 0.03, 0.01, items=40),
}


def draw(rng: np.random.Generator, scenario: Scenario, n: int, n_runs: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The sets of n simulated studies without any true difference: (values (n, VARIANTS, n_runs, items), weights (n, items)).

    A document's bits are bytes x (1 + run) + noise that grows with the root of its length, from the item, variant x item and run x item;
    lengths are log-normal, the noise Student's t with 4 degrees, so as heavy-tailed as real text. An item of a task is right where a
    latent number, made in the same way, is above 0. A run's quality is half its own on each set, half common to all.
    """
    shape = (n, VARIANTS, n_runs)
    factors = np.array([1.0] * (VARIANTS - 1) + [scenario.unequal])[:, None]

    def quality() -> np.ndarray:
        return (rng.random(shape) - 0.3 < 0) / 0.4583 - 0.6547 if scenario.jumps else rng.normal(size=shape)

    def heavy(*size: int) -> np.ndarray:
        return rng.standard_t(4, size) / np.sqrt(2)

    common, m = quality(), scenario.items
    for kind in ["text"] * TEXTS + ["task"] * TASKS:
        run = scenario.runs * factors * np.sqrt(0.5) * (common + quality())
        noise = scenario.variant_items * heavy(n, VARIANTS, 1, m) + scenario.run_items * heavy(*shape, m)
        if kind == "text":
            weights = TYPICAL_BYTES * np.exp(rng.normal(0, 0.6, (n, m)))
            lengths = weights[:, None, None]
            yield lengths * (1 + run[..., None]) + np.sqrt(lengths * TYPICAL_BYTES) * (noise + 0.1 * heavy(n, 1, 1, m)), weights
        else:
            yield (0.5 + 1.5 * heavy(n, 1, 1, m) + LATENT * (noise + run[..., None]) > 0).astype(float), np.ones((n, m))


def welch(found: Difference) -> np.ndarray:
    """Welch's t test on the runs' metrics: items don't count as chance."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(2 * stats.t.sf(abs(found.value) / np.sqrt(found.seeds), found.degrees), nan=1.0)


def satterthwaite(found: Difference) -> np.ndarray:
    """The same variances as ours, but one t distribution with Satterthwaite's degrees of freedom."""
    variance = found.seeds + found.items
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = np.minimum(found.degrees * (variance / found.seeds) ** 2, 1e9)
        return np.nan_to_num(2 * stats.t.sf(abs(found.value) / np.sqrt(variance), degrees), nan=1.0)


def items_only(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The means over runs as if they were two models: the training's luck doesn't count."""
    return difference(a.mean(-2, keepdims=True), b.mean(-2, keepdims=True), weights).p


def bootstrap_covers(rng: np.random.Generator, a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Whether the percentile interval of a bootstrap that draws runs, then items, holds 0, (n,)."""
    n_runs, m = a.shape[-2], a.shape[-1]
    covers = []
    counts = rng.multinomial(m, np.full(m, 1 / m), RESAMPLES).astype(float)  # how often each item is drawn; the same in all studies
    for one, other, weight in zip(a, b, weights):
        total = (counts @ weight)[:, None]
        means = [np.take_along_axis(counts @ y.T / total, rng.integers(n_runs, size=(RESAMPLES, n_runs)), 1).mean(1) for y in (one, other)]
        low, high = np.quantile(means[0] - means[1], [LEVEL / 2, 1 - LEVEL / 2])
        covers.append(low <= 0 <= high)
    return np.array(covers)


METHODS: dict[str, Callable] = {
    "ours": lambda found, *_: found.p,
    "one t, Satterthwaite": lambda found, *_: satterthwaite(found),
    "Welch's t over runs": lambda found, *_: welch(found),
    "items only": lambda _, *scores: items_only(*scores),
}


@dataclass(frozen=True)
class Rates:
    """coverage: share of intervals that hold the true difference. false: share of studies with a difference that isn't there, among all
    their comparisons after Holm's correction; None where it wasn't counted."""

    coverage: float
    false: float | None


def simulate(scenario: Scenario, n_runs: int, simulations: int, seed: int, methods: list[str], bootstrap: bool = False) -> dict[str, Rates]:
    """The error rates of methods, by their names in METHODS, over so many studies."""
    rng = np.random.default_rng(seed)
    p_values: dict[str, list] = {method: [] for method in methods}
    covered = []
    for start in range(0, simulations, BATCH):
        batch: dict[str, list] = {method: [] for method in methods}
        for values, weights in draw(rng, scenario, min(BATCH, simulations - start), n_runs):
            for i, j in itertools.combinations(range(VARIANTS), 2):
                scores = values[:, i], values[:, j], weights
                found = difference(*scores)
                for method in methods:
                    batch[method].append(METHODS[method](found, *scores))
            if bootstrap and len(covered) * BATCH <= start:  # on the first set only: it takes long
                covered.append(bootstrap_covers(rng, values[:, 0], values[:, 1], weights))
        for method, columns in batch.items():
            p_values[method].append(np.stack(columns, 1))
    rates = {}
    for method, parts in p_values.items():
        p = np.concatenate(parts)  # (simulations, comparisons)
        # Holm finds something exactly where the smallest p-value is below the level shared out among all
        rates[method] = Rates(float(np.mean(p > LEVEL)), float(np.mean(p.min(1) <= LEVEL / p.shape[1])))
    if bootstrap:
        rates["bootstrap of runs and items"] = Rates(float(np.mean(np.concatenate(covered))), None)
    return rates


def measure(simulations: int) -> None:
    """Print the error rates of every method in every scenario, at 3 and at 5 seeds."""
    comparisons = VARIANTS * (VARIANTS - 1) // 2 * (TEXTS + TASKS)
    print(f"{simulations:,} studies a row, {VARIANTS} variants on {TEXTS} texts and {TASKS} tasks; {comparisons} comparisons, none real.")
    print("coverage: of the 95% intervals; false positives: studies in which Holm's correction at 5% leaves any difference")
    with tqdm(total=2 * len(SCENARIOS), unit="scenario", disable=None, leave=False) as bar:
        for n_runs in (3, 5):
            for i, (name, scenario) in enumerate(SCENARIOS.items()):
                rates = simulate(scenario, n_runs, simulations, 10 * n_runs + i, [*METHODS], bootstrap=True)
                bar.update()
                print(f"\n{n_runs} seeds, {name}")
                for method, rate in rates.items():
                    false = "" if rate.false is None else f"   false positives {rate.false:6.1%}"
                    print(f"  {method:28} coverage {rate.coverage:6.1%}{false}", flush=True)
