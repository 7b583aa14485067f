"""The method behind compare.py: parity with scipy and statsmodels where it is one of their tests, and error rates by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate, stats

import benchmark
from benchmarks.statistics import SCENARIOS, simulate
from evaluation.statistics import Difference, difference, holm, items_needed, seeds_needed

RNG = np.random.default_rng(0)


def test_where_items_are_all_alike_it_is_welchs_test():
    one, other = np.array([0.1, 0.3, 0.25]), np.array([0.4, 0.5, 0.1, 0.6])
    found = difference(*(np.repeat(values[:, None], 100_000, 1) for values in (one, other)), np.ones(100_000))
    expected = stats.ttest_ind(one, other, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-4)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval()), rel=1e-4)


def test_with_one_run_of_each_it_is_the_paired_test():
    one, other = RNG.normal(size=(2, 1, 40))
    found, expected = difference(one, other, np.ones(40)), stats.ttest_rel(one[0], other[0])
    assert found.p == pytest.approx(expected.pvalue) and found.interval() == pytest.approx(tuple(expected.confidence_interval()))


def test_standard_error_of_a_ratio_against_a_simulation():
    """One run of each: the spread of bits per byte over many drawn sets of documents is what the formula says for one set."""

    def draw():
        n_bytes = RNG.integers(50, 500, 200).astype(float)
        a = n_bytes * 0.5 + RNG.normal(0, 20, 200)
        return difference((a + 0.01 * n_bytes + RNG.normal(0, 5, 200))[None], a[None], n_bytes)

    found = [draw() for _ in range(400)]
    assert np.mean([one.value for one in found]) == pytest.approx(0.01, abs=1e-3)
    assert np.std([one.value for one in found]) == pytest.approx(np.mean([math.sqrt(one.items) for one in found]), rel=0.12)


def test_variances_are_those_of_a_crossed_analysis_of_variance():
    """Mean squares of statsmodels: runs, items, and run x item as the residual."""
    import pandas as pd
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    n, m = 4, 9
    a, b = RNG.normal(size=(2, n, m)) + RNG.normal(size=(2, n, 1)) + 3 * RNG.normal(size=(2, 1, m))
    runs, interactions = [], []
    for values in (a, b):
        rows = pd.DataFrame([(s, i, values[s, i]) for s in range(n) for i in range(m)], columns=["run", "item", "y"])
        squares = anova_lm(ols("y ~ C(run) + C(item)", rows).fit())["mean_sq"]
        runs.append(squares["C(run)"] / m)
        interactions.append(squares["Residual"])
    found = difference(a, b, np.ones(m))
    assert found.runs == pytest.approx(runs)
    assert found.items == pytest.approx((a.mean(0) - b.mean(0)).var(ddof=1) / m - sum(interactions) / (n * m))


SCORES = arrays(float, (5, 12), elements=st.floats(-10, 10, width=32))
LENGTHS = arrays(float, 12, elements=st.floats(1, 100, width=32))


@settings(max_examples=40, deadline=None)
@given(SCORES, LENGTHS, arrays(float, 12, elements=st.floats(-10, 10, width=32)), st.floats(0.1, 10))
def test_what_must_not_matter(scores, weights, common, scale):
    """What an item adds to every run alike, units, and which variant comes first."""
    a, b = scores[:2], scores[2:]
    expected = difference(a, b, weights)
    for found, factor in (
        (difference(a + common, b + common, weights), 1),
        (difference(a * scale, b * scale, weights), scale),
        (difference(a, b, weights * scale), 1 / scale),
        (difference(b, a, weights), -1),
    ):
        near = {"rel": 1e-6, "abs": 1e-9 * factor**2}
        assert found.value == pytest.approx(factor * expected.value, **near)
        assert found.seeds == pytest.approx(factor**2 * expected.seeds, **near)
        assert found.items == pytest.approx(factor**2 * expected.items, **near)


@pytest.mark.parametrize(("seeds", "items", "degrees"), [(1.0, 0.0, 2), (1.0, 0.3, 2.5), (0.05, 1.0, 4), (1e-6, 1.0, 2), (2.0, 1.0, 300)])
def test_chance_against_numerical_integration(seeds, items, degrees):
    found = Difference(np.float64(0), np.array([seeds, 0.0]), np.float64(items), (1, 1), 10**7)
    found = type("Fixed", (Difference,), {"degrees": np.float64(degrees)})(**vars(found))
    t = np.sinh(np.linspace(-20, 20, 400_001))
    density = stats.t.pdf(t, degrees)
    for distance in (0.1, 1.0, 3.0, 8.0):
        beyond = sum(stats.norm.sf((sign * math.sqrt(seeds) * t + distance) / math.sqrt(max(items, 1e-12))) for sign in (1, -1))
        assert float(found.chance(distance)) == pytest.approx(integrate.trapezoid(density * beyond, t), rel=2e-3, abs=1e-9)


def test_nothing_differs_and_everything_agrees():
    same = np.ones((3, 10))
    found = difference(same, same, np.ones(10))
    assert found.p == pytest.approx(1) and found.interval() == (0, 0)
    right = np.zeros((3, 20))
    for run in range(3):  # the same share of right answers in every run, not on the same items
        right[run, run : run + 10] = 1
    found = difference(right, np.roll(right, 7, 1) * np.r_[0, np.ones(19)], np.ones(20))
    assert 0 < found.p < 1 and found.items > 0


def test_holm_is_holms():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@pytest.mark.parametrize(("variances", "items"), [([1.0, 1.0], 0.02), ([1.0, 0.2], 0.0)])
def test_as_many_seeds_as_it_says_find_the_difference(variances, items):
    """In simulated studies with so many seeds, a true difference is found in about 80%."""
    size = 1.5
    known = Difference(np.float64(0), np.array(variances), np.float64(items), (3, 3), 10_000)
    n = seeds_needed(known, size)
    runs = [RNG.normal(0, math.sqrt(variance), (3000, n)) for variance in variances]
    value = size + runs[0].mean(1) - runs[1].mean(1) + RNG.normal(0, math.sqrt(items), 3000)
    measured = np.stack([part.var(1, ddof=1) for part in runs], 1)
    power = np.mean(Difference(value, measured, np.full(3000, items), (n, n), 10_000).p < 0.05)
    assert 0.74 < power < 0.93, n


def test_no_number_of_seeds_makes_up_for_items():
    found = Difference(np.float64(0), np.array([1.0, 1.0]), np.float64(1.0), (3, 3), 100)
    assert seeds_needed(found, 1.0) is None and items_needed(found, 1.0) == pytest.approx((1.96 + 0.8416) ** 2, rel=1e-3)
    assert seeds_needed(found, 10.0) == 4  # more than there are: with those it wasn't found


@pytest.mark.parametrize(("scenario", "wrong"), [("seeds dominate", "items only"), ("items dominate", "Welch's t over runs")])
@pytest.mark.parametrize("n_runs", [3, 5])
def test_error_rates(scenario, wrong, n_runs):
    """The full simulation is `benchmark.py statistics`; thresholds here have room for chance. Methods for one kind of luck fail."""
    simulations = 150
    rates = simulate(SCENARIOS[scenario], n_runs, simulations, 1, ["ours", wrong])
    margin = 2.6 * math.sqrt(0.06 * 0.94 / simulations)  # 99%
    assert 0.93 - margin / 2 < rates["ours"].coverage < 0.97 + margin / 2
    assert rates["ours"].false < 0.06 + margin
    assert rates[wrong].coverage < 0.7 and rates[wrong].false > 0.5


def test_the_benchmark_prints_every_scenario(capsys):
    assert benchmark.main(["statistics", "--simulations", "1"]) == 0
    out = capsys.readouterr().out
    assert all(f"{seeds} seeds, {name}" in out for seeds in (3, 5) for name in SCENARIOS)
    assert out.count("coverage ") == 5 * 2 * len(SCENARIOS) and "nan" not in out


def test_a_few_items_that_all_agree_prove_little():
    """All seeds right on every item for one variant and wrong for the other: no variance is left that could tell how sure that is."""
    for items, p in ((2, 0.5), (5, 1 / 16), (40, 2.0**-39)):
        assert difference(np.ones((3, items)), np.zeros((3, items)), np.ones(items)).p == pytest.approx(p)
