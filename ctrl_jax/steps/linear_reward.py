"""A reward that is linear in features of a response, by the likelihood of preferences, fitted to its optimum.

    L(w) = Σ_i c_i softplus(−w·x_i) / Σ_i c_i + (λ/2) |w|²,    x_i = (φ(chosen_i) − φ(rejected_i)) / σ

the Bradley-Terry model (Bradley and Terry 1952) of a reward w·φ/σ, with c_i = 1 or as often as a bootstrap sample has
the pair, and σ the spread of each feature over all responses: logistic regression without an intercept, convex.
λ is the one of STRENGTHS under which pairs that were not fitted on are the most likely. Float64 on the host.
"""

from typing import NamedTuple

import chex
import numpy as np
from scipy import optimize

FOLDS = 5
"""Parts of the pairs, by their prompts: λ is judged by each as the others fit it."""
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-6, 5))
LEAST = 2 * FOLDS
"""Prompts, whose pairs a fit needs at least."""


class Chosen(NamedTuple):
    strength: float
    """λ, one of STRENGTHS."""
    loss: float
    """Nats a pair, on pairs that were not fitted on."""
    accuracy: float
    """The share of these that the reward ranks as their label does."""


def spread(features: np.ndarray) -> np.ndarray:
    """σ [D] of features [n, 2, D] of pairs; 1 for one that never changes, whose weight is 0 then."""
    found = np.std(np.asarray(features, np.float64), axis=(0, 1))
    return np.where(found > 0, found, 1.0)


def fit(
    differences: np.ndarray, strength: float, counts: np.ndarray | None = None, start: np.ndarray | None = None
) -> np.ndarray:
    """The w [D] of least L.

    Args:
      differences: x [n, D].
      strength: λ > 0.
      counts: c [n], of 0 or more; None for 1 each.
      start: where the search starts.
    """
    x = np.asarray(differences, np.float64)
    chex.assert_rank(x, 2)
    share = np.full(len(x), 1 / len(x)) if counts is None else np.asarray(counts, np.float64) / np.sum(counts)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = x @ w
        wrong = np.exp(-np.logaddexp(0, margin))  # σ(−margin)
        value = share @ np.logaddexp(0, -margin) + strength / 2 * (w @ w)
        return value, strength * w - x.T @ (share * wrong)

    found = optimize.minimize(
        loss, np.zeros(x.shape[1]) if start is None else start,
        jac=True, method="L-BFGS-B", options={"ftol": 1e-12, "gtol": 1e-7, "maxiter": 10_000},
    )  # fmt: skip
    weights: np.ndarray = found.x
    return weights


def choose(differences: np.ndarray, prompt_ids: np.ndarray) -> Chosen:
    """The λ of the least loss by cross-validation over FOLDS, which keep the pairs of one prompt together.

    Args:
      differences: x [n, D].
      prompt_ids: [n], of the pairs' prompts.

    Raises:
      ValueError: for fewer than LEAST different prompts.
    """
    distinct, position = np.unique(prompt_ids, return_inverse=True)
    if len(distinct) < LEAST:
        raise ValueError(f"Pairs of {len(distinct)} prompts were given; cross-validation needs {LEAST}.")
    fold, margins = position % FOLDS, np.empty((len(STRENGTHS), len(differences)))
    for held_out in range(FOLDS):
        others, weights = fold != held_out, None
        for row in reversed(range(len(STRENGTHS))):  # from the strongest: each starts where the one before ended
            weights = fit(differences[others], STRENGTHS[row], start=weights)
            margins[row, ~others] = differences[~others] @ weights
    losses = np.logaddexp(0, -margins).mean(axis=1)
    best = int(np.argmin(losses))
    return Chosen(STRENGTHS[best], float(losses[best]), float(np.mean((1 + np.sign(margins[best])) / 2)))
