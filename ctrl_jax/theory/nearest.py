"""The mixture of order procedures that comes nearest to a decoder of which only runs are known.

A procedure's pick of the reference's samples has the rank CDF T[u] (theory/procedures.py), and its optimal transform
follows from T (theory/optimal.py). A decoder that is no choice by order, such as a tree search, has such a CDF too: the
law of the rank of what it returns where it decodes the reference. CTRL is derived for any such map of ranks (InfAlign,
Balashankar et al. 2024, arXiv 2412.19792); by it the decoder is treated as if it looked at nothing but ranks. A policy
changes what a search finds on its way in other manners as well, so that this is an approximation: how far the procedure
is from the decoder's law is measured here, and what is lost by it where the policy is evaluated.

What is seen of a rank u is how many of K reference responses are below. Of the pick of best-of-n, whose u has the law
Beta(n, 1), that is beta-binomial, and of worst-of-n, Beta(1, n). So that no rank has to be guessed from a count,

    minimise over weights w ≥ 0, Σ w = 1:    Σ_k ( F̂(k) − Σ_i w_i F_i(k) )²,    F(k) = P(at most k of the K are below)

over best-of-n and worst-of-n, n = 1, 2, 3, 4, 6, 8, ... 128: convex least squares.
"""

from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from ctrl_jax.theory.procedures import BestOfN, Mixture, Procedure, Sampling, WorstOfN

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
NEAR = 0.05
"""A distance up to which Φ* of the procedure is worth training with."""
LEAST = 0.01
"""A weight below that is left out."""
AS_NEAR = 1e-3
"""A single procedure that is farther from the decoder by no more is taken for a mixture."""
SUM_TO_ONE = 1e3
"""How much more than a point of the CDF their sum counts."""


class Nearest(NamedTuple):
    procedure: Procedure
    distance: float
    """max over k of |F̂(k) − F(k)|."""

    @property
    def is_near(self) -> bool:
        return self.distance <= NEAR


def nearest(below: np.ndarray, not_above: np.ndarray, num_references: int, *, most: int) -> Nearest:
    """The mixture nearest to a decoder, by its picks on the reference.

    Args:
      below: [...] how many of K of the reference's rewards are below each pick.
      not_above: [...] how many are not above. Where they tie with the pick, it could be anywhere among them, and counts
        for each place in equal parts.
      num_references: K, independent of the picks.
      most: the largest n to look at.
    """
    places = np.arange(num_references + 1)
    first, last = (np.ravel(one)[:, None] for one in (below, not_above))
    # P(at most k are below), of a pick that is evenly spread over first ... last.
    measured = np.clip((places - first + 1) / (last - first + 1), 0, 1).mean(axis=0)
    sizes = [n for n in SIZES if n <= min(most, num_references)]
    laws: dict[Procedure, tuple[int, int]] = {Sampling(): (1, 1)}
    laws |= {BestOfN(n): (n, 1) for n in sizes} | {WorstOfN(n): (1, n) for n in sizes}
    candidates = list(laws)
    columns = np.stack([stats.betabinom.cdf(places, num_references, *law) for law in laws.values()], axis=1)

    def fitted(columns: np.ndarray) -> np.ndarray:
        sums = np.full((1, columns.shape[1]), SUM_TO_ONE)
        weights, _ = optimize.nnls(np.vstack([columns, sums]), np.append(measured, SUM_TO_ONE))
        return weights / weights.sum()

    def distance(chosen: np.ndarray, weights: np.ndarray) -> float:
        return float(np.abs(columns[:, chosen] @ weights - measured).max())

    chosen = np.flatnonzero(fitted(columns) >= LEAST)
    weights = np.round(fitted(columns[:, chosen]), 3)
    chosen, weights = chosen[weights > 0], weights[weights > 0]
    weights[weights.argmax()] += 1 - weights.sum()
    mixed = distance(chosen, weights)
    # One alone may be the same: best-of-2 and worst-of-2 in equal parts are a single sample.
    alone = min(range(len(candidates)), key=lambda place: distance(np.array([place]), np.ones(1)))
    single = distance(np.array([alone]), np.ones(1))
    if len(chosen) == 1 or single <= mixed + AS_NEAR:
        return Nearest(candidates[alone], single)
    terms = tuple((round(float(weight), 3), candidates[place]) for weight, place in zip(weights, chosen, strict=True))
    return Nearest(Mixture(terms), mixed)
