"""The search for a mixture: pilots cover the simplex, the regression is right, the prediction is near the best, noise is told."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from evaluation import mixtures
from evaluation.mixtures import FORMS, LEAST, RIDGES, Prediction, Search, best_shares, design, fit
from tests.test_studies import MIXTURE, diary, study

__all__ = ["study"]  # a fixture


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_pilots_cover_the_simplex(k):
    shares = design(k, 12, seed=0)
    assert shares.shape == (12, k) and np.allclose(shares.sum(1), 1, atol=0.02) and (shares >= LEAST - 1e-9).all()
    assert np.allclose(shares[0], 1 / k) and np.array_equal(design(k, 20, seed=0)[:12], shares)
    random = [pdist(np.random.default_rng(seed).dirichlet(np.ones(k), 12)).min() for seed in range(50)]
    assert pdist(shares).min() > np.quantile(random, 0.95)


@pytest.mark.parametrize("form", FORMS)
def test_the_leave_one_out_error_is_that_of_leaving_one_out(form, monkeypatch):
    rng = np.random.default_rng(1)
    shares, losses = rng.dirichlet(np.ones(3), 9), rng.normal(1.5, 0.1, 9)
    monkeypatch.setattr(mixtures, "FORMS", {form: FORMS[form]})
    monkeypatch.setattr(mixtures, "RIDGES", RIDGES[1:2])
    x, y, errors = FORMS[form](shares), losses - losses.mean(), []
    for i in range(9):
        rest = np.arange(9) != i
        coefficients = np.linalg.solve(x[rest].T @ x[rest] + RIDGES[1] * np.eye(x.shape[1]), x[rest].T @ y[rest])
        errors.append(y[i] - x[i] @ coefficients)
    assert fit(shares, losses).error == pytest.approx(np.sqrt(np.mean(np.square(errors))))


def loss(shares: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Mean over sets, on each of which the loss falls with the share of its own source as a power law: a typical mixture's."""
    return 1 + (scale * shares**-0.3).mean(-1)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_predicted_mixture_is_nearly_the_best(k):
    scale = np.linspace(0.1, 0.4, k)
    shares, rng = design(k, 6 + 3 * k, seed=0), np.random.default_rng(0)
    model = fit(shares, loss(shares, scale) + rng.normal(0, 0.002, len(shares)))
    best = best_shares(model, k, seed=0)
    lowest = loss(rng.dirichlet(np.ones(k), 50_000) * (1 - k * LEAST) + LEAST, scale).min()
    natural = loss(np.array([0.9, *[0.1 / (k - 1)] * (k - 1)]), scale)
    assert loss(best, scale) - lowest < 0.1 * (natural - lowest)
    assert best.sum() == pytest.approx(1, abs=0.02) and best[-1] > best[0]


def test_differences_within_noise_are_said():
    shares, rng = design(3, 12, seed=0), np.random.default_rng(0)

    def noise_is_told(slope: float) -> bool:
        model = fit(shares, 1.5 + slope * shares[:, 0] + rng.normal(0, 0.01, len(shares)))
        told = Prediction(list("abc"), model, 12, best_shares(model, 3, 0), np.array([0.8, 0.1, 0.1])).describe()
        return "can't tell the mixtures apart" in told[-1]

    assert sum(noise_is_told(0.0) for _ in range(60)) >= 55 and sum(noise_is_told(0.5) for _ in range(20)) == 0


def test_a_search_runs_pilots_and_then_tests_what_they_predict(study, monkeypatch, mistake, tmp_path):
    for name in "ab":
        Path(f"{name}.txt").write_text(f"text {name}")
    Path("r.toml").write_text(MIXTURE.replace("[mixture]", "[study]\nseeds = [1, 2]\n[mixture]"))

    def of_flags(self, cell) -> float:
        shares = [float(name.rpartition(":")[2]) if ":" in name else 0.5 for name in cell.train.flags["data_dir"]]
        return 1.5 + 0.5 * (shares[0] - 0.7) ** 2

    monkeypatch.setattr(Search, "loss", of_flags)
    code, out, _ = study("--dry_run")
    assert code == 0 and out.startswith("# 6 cells, 0 done") and "# and 6 cells more, for mixtures that these pilots decide" in out
    assert study("--cells")[1] == "12\n"
    assert "run cells 0 to 5 first" in mistake("compare.py", "--recipe", "r.toml", "--cell", 6, cwd=tmp_path)
    code, out, _ = study()
    assert code == 0 and "predicted best mixture: a 70% (natural: 50%), b 30% (natural: 50%)" in out
    assert json.loads(Path("studies/r/mixture.json").read_text())["shares"]["best"] == {"a": 0.7, "b": 0.3}
    calls = [line.split() for line in diary(study, "train")]
    assert [call[call.index("--max_steps") + 1] for call in calls] == ["1"] * 6 + ["2"] * 6
    assert [call[call.index("--seed") + 1] for call in calls] == ["0"] * 6 + ["1"] * 3 + ["2"] * 3
    weights = [[word.rpartition(":")[2] if ":" in word else "" for word in call[2 : call.index("--preset")]] for call in calls[6:9]]
    assert weights == [["0.7", "0.3"], ["", ""], ["0.5", "0.5"]]  # best, natural, uniform
    assert "best, a: 1.5000" in out
    assert study("--cell", 11)[0] == 0 and study()[0] == 0 and not diary(study)


def test_too_few_pilots_predict_nothing(study, mistake, tmp_path):
    for name in "ab":
        Path(f"{name}.txt").write_text(f"text {name}")
    Path("r.toml").write_text(MIXTURE)
    (study.home / "broken").write_text("pilot")
    assert "0 of 6 pilots are done, too few to predict a mixture of 2 sources" in mistake("compare.py", "--recipe", "r.toml", cwd=tmp_path)
