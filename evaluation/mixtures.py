"""In which shares should sources be mixed? Small trainings with different shares, a regression on them, and the predicted best one.

After RegMix (Liu et al. 2024, "RegMix: Data Mixture as Regression for Language Model Pre-training"). What is predicted is validated then:
models with the predicted shares, the natural ones and equal ones, trained with fresh seeds and compared as any variants are.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evaluation.plans import Cell, Planner
from formats.data_directory import DataDirectory
from formats.scores import SCORES, read_scores

LEAST = 0.05  # share of each source: towards 0 the loss on it grows without bound, which no simple regression follows
CANDIDATES = 20_000
TOP = 20  # predicted best candidates, whose mean is taken, so that one of them can't be the regression's lucky error
# A predicted gain above so many leave-one-out errors is more than noise. Where all mixtures are equally good, 0% to 7% of 200 simulated
# searches found such a gain (2 to 5 sources, 8 to 24 pilots); above one error 7% to 24% did, for it is the best of many predictions.
CLEAR = 2
RIDGES = (1e-6, 1e-4, 1e-2)
LAST_WEIGHTS = {"eval_interval": 10**9}  # unless the recipe says otherwise: a validation on the first source would favour it
BEST, NATURAL, UNIFORM = "best", "natural", "uniform"


def simplex_points(k: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random shares of k sources, each at least LEAST, uniform over what is left: (count, k), rows add up to 1."""
    return LEAST + (1 - k * LEAST) * rng.dirichlet(np.ones(k), count)


def design(k: int, count: int, seed: int) -> np.ndarray:
    """Shares for pilots that cover the simplex: equal ones first, then always the candidate farthest from all before: (count, k).

    Maximin distance design (Johnson, Moore, Ylvisaker 1990), in whole percents. Deterministic; a larger count only appends.
    """
    corners = np.full((k, k), LEAST) + (1 - k * LEAST) * np.eye(k)
    candidates = np.round(np.concatenate([corners, simplex_points(k, CANDIDATES // 10, np.random.default_rng(seed))]), 2)
    chosen = [np.full(k, 1 / k)]
    nearest = np.full(len(candidates), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, np.linalg.norm(candidates - chosen[-1], axis=1))
        chosen.append(candidates[nearest.argmax()])
    return np.array(chosen)


# ---------------------------------------------------------------- regression


def _quadratic(shares: np.ndarray) -> np.ndarray:
    pairs = [shares[:, i] * shares[:, j] for i, j in itertools.combinations(range(shares.shape[1]), 2)]
    return np.column_stack([shares, *pairs])


# What the loss is a linear function of: Scheffé's mixture polynomials (1958) of the first and second degree, and logarithms of the shares
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda shares: shares,
    "quadratic": _quadratic,
    "logarithmic": lambda shares: np.column_stack([np.ones(len(shares)), np.log(shares)]),
}


@dataclass(frozen=True)
class Fit:
    """A regression of a loss on shares. error: root mean square of the leave-one-out errors, in the loss's unit."""

    form: str
    mean: float
    coefficients: np.ndarray
    error: float

    def predict(self, shares: np.ndarray) -> np.ndarray:
        """Shares (n, k) -> losses (n,)."""
        return self.mean + FORMS[self.form](shares) @ self.coefficients


def fit(shares: np.ndarray, losses: np.ndarray) -> Fit:
    """The ridge regression of losses (n,) on shares (n, k) with the smallest leave-one-out error, among FORMS with fewer terms than n."""
    mean, found = float(losses.mean()), []
    for form, terms in FORMS.items():
        x = terms(shares)
        if x.shape[1] >= len(losses):
            continue
        for ridge in RIDGES:
            solve = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T)
            leverage = np.einsum("ij,ji->i", x, solve)
            coefficients = solve @ (losses - mean)
            left_out = (losses - mean - x @ coefficients) / (1 - leverage)  # exact for ridge regression (Golub, Heath, Wahba 1979)
            found.append(Fit(form, mean, coefficients, float(np.sqrt((left_out**2).mean()))))
    return min(found, key=lambda one: one.error)


def best_shares(model: Fit, k: int, seed: int) -> np.ndarray:
    """The shares with the lowest predicted loss, in whole percents: (k,)."""
    candidates = simplex_points(k, CANDIDATES, np.random.default_rng(seed))
    return np.round(candidates[np.argsort(model.predict(candidates))[:TOP]].mean(0), 2)


# ---------------------------------------------------------------- as cells of a study


@dataclass(frozen=True)
class Search:
    """The pilots of a recipe's [mixture], and the cells that validate what they predict."""

    planner: Planner

    @cached_property
    def data(self) -> list:
        """The prepared sources."""
        sources = self.planner.recipe.sources.items()
        return [self.planner.with_tokenizer(f"[mixture.sources.{name}]", name, flags) for name, flags in sources]

    @property
    def model(self) -> str:
        return next(iter(self.planner.recipe.models))

    @property
    def count(self) -> int:
        """Cells in all."""
        return self.planner.recipe.mixture.pilots + 3 * len(self.planner.recipe.options.seeds)

    @cached_property
    def shares(self) -> np.ndarray:
        """Shares of the pilots but for the first, which takes the sources as they are: (pilots - 1, k)."""
        mixture = self.planner.recipe.mixture
        return design(len(self.data), mixture.pilots - 1, mixture.seed)

    def cell(self, name: str, shares: np.ndarray | None, seed: int, more: dict | None = None) -> Cell:
        """shares: None for the natural ones, all sources one after the other."""
        weights = [None] * len(self.data) if shares is None else [round(float(share), 6) for share in shares]
        more = LAST_WEIGHTS | self.planner.recipe.training | self.planner.recipe.models[self.model] | (more or {})
        return self.planner.cell(name, self.model, seed, [*zip(self.data, weights)], more)

    @cached_property
    def pilots(self) -> list[Cell]:
        """The first one is natural, the second one uniform."""
        seed, more = self.planner.recipe.mixture.seed, self.planner.recipe.pilot_training
        return [self.cell(f"pilot{i}", shares, seed, more) for i, shares in enumerate([None, *self.shares])]

    def natural(self) -> np.ndarray:
        """The sources' shares of all training tokens, (k,)."""
        tokens = [DataDirectory(step.directory).meta["splits"]["train"]["tokens"] for step in self.data]
        return np.array(tokens) / sum(tokens)

    def loss(self, cell: Cell) -> float:
        """Mean bits per byte of a cell that is done over the target's held-out sets. Raises ValueError where one has no scores."""
        sets, found = read_scores(cell.evaluate.directory / SCORES), []
        labels = {known: label for label, known in self.planner.set_names.items()}
        for name in self.planner.recipe.mixture.target or self.planner.held_out:
            if labels[name] not in sets:
                raise ValueError(f"{cell.evaluate.directory / SCORES} has no scores of {name}; delete it, and start again")
            columns = sets[labels[name]].columns
            found.append(columns["nats"].sum() / math.log(2) / columns["bytes"].sum())
        return float(np.mean(found))

    def predict(self) -> "Prediction":
        """What the pilots that are done say. Raises ValueError if they are too few."""
        done = [(cell, shares) for cell, shares in zip(self.pilots, [None, *self.shares]) if cell.done]
        if len(done) < len(self.data) + 2:
            raise ValueError(f"{len(done)} of {len(self.pilots)} pilots are done, too few to predict a mixture of {len(self.data)} sources")
        natural = self.natural()
        shares = np.array([natural if one is None else one for _, one in done])
        model = fit(shares, np.array([self.loss(cell) for cell, _ in done]))
        best = best_shares(model, len(self.data), self.planner.recipe.mixture.seed)
        return Prediction([*self.planner.recipe.sources], model, len(done), best, natural)

    def validation(self, prediction: "Prediction") -> list[Cell]:
        """Models of the predicted, the natural and equal shares, seed after seed."""
        tried = {BEST: prediction.best, NATURAL: None, UNIFORM: np.full(len(self.data), 1 / len(self.data))}
        return [self.cell(name, shares, seed) for seed in self.planner.recipe.options.seeds for name, shares in tried.items()]


@dataclass(frozen=True)
class Prediction:
    """What pilots say about mixtures of sources."""

    sources: list[str]
    model: Fit
    pilots: int
    best: np.ndarray
    natural: np.ndarray

    def losses(self) -> dict[str, float]:
        """Predicted bits per byte of the three mixtures that are validated."""
        k = len(self.sources)
        return dict(zip((BEST, NATURAL, UNIFORM), self.model.predict(np.stack([self.best, self.natural, np.full(k, 1 / k)])).tolist()))

    def describe(self) -> list[str]:
        """Lines for people: the predicted shares, their loss beside the others', and whether that is more than the pilots' noise."""
        losses, error = self.losses(), self.model.error
        shares = zip(self.sources, self.best, self.natural)
        lines = ["predicted best mixture: " + ", ".join(f"{name} {share:.0%} (natural: {natural:.0%})" for name, share, natural in shares)]
        told = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        lines.append(f"predicted bits/byte of pilots: {told}; leave-one-out error {error:.4f} ({self.model.form}, {self.pilots} pilots)")
        if min(losses[NATURAL], losses[UNIFORM]) - losses[BEST] <= CLEAR * error:
            lines.append("the difference is within the error of the prediction: these pilots can't tell the mixtures apart")
        return lines

    def content(self) -> dict:
        """For mixture.json."""
        named = {BEST: self.best, NATURAL: self.natural}
        shares = {which: dict(zip(self.sources, map(float, values))) for which, values in named.items()}
        return {"shares": shares, "predicted": self.losses(), "error": self.model.error, "form": self.model.form, "pilots": self.pilots}
