"""Calibrated early stopping, by enumeration of all orders in which responses may come, and by its law in theory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.steps import early_stop, win_rate

SCORES = np.array([[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 3.0, 4.0]])
THRESHOLDS = np.array([2.0, 3.0, 1.0, 4.0])
"""Which three of the responses reach, none, all, and one, that is equal to it."""


def by_definition(scores: np.ndarray, threshold: float) -> tuple[float, np.ndarray]:
    """(draws, [M] chances to be taken), over all orders."""
    draws, taken, orders = 0.0, np.zeros(len(scores)), [*itertools.permutations(range(len(scores)))]
    for order in orders:
        reached = [place for place, one in enumerate(order) if scores[one] >= threshold]
        if reached:
            draws += reached[0] + 1
            taken[order[reached[0]]] += 1
        else:
            best = np.flatnonzero(scores == scores.max())
            draws += len(scores)
            taken[best] += 1 / len(best)
    return draws / len(orders), taken / len(orders)


def test_draws_and_picks_are_those_of_all_orders():
    expected = [by_definition(*one) for one in zip(SCORES, THRESHOLDS, strict=True)]
    given = jnp.asarray(SCORES), jnp.asarray(THRESHOLDS)
    np.testing.assert_allclose(early_stop.draws(*given), [draws for draws, _ in expected], rtol=1e-6)
    np.testing.assert_allclose(early_stop.pick_probabilities(*given), [taken for _, taken in expected], atol=1e-6)


@pytest.mark.parametrize("place", [2, 16])
def test_of_the_reference_itself_it_is_as_the_theory_says(place):
    """To stop at rank τ takes 1 / (1 − τ) draws, and wins (1 + τ) / 2."""
    ours, theirs = (jax.random.uniform(jax.random.key(seed), (4000, 127)) for seed in (0, 1))
    threshold = jnp.sort(theirs, axis=1)[:, -place]
    tau = 1 - place / 128
    draws = early_stop.draws(ours, threshold)
    # With an end at M, (M + 1) / (c + 1) for c of Binomial(M, 1 − τ) and a τ that varies from prompt to prompt.
    assert float(draws.mean()) == pytest.approx(1 / (1 - tau), rel=0.08 if place == 16 else 0.6)
    picked = early_stop.pick_probabilities(ours, threshold)
    won = win_rate.wins_of_picks(picked, jnp.full(theirs.shape, 1 / 127), ours, theirs)
    assert float(won.mean()) == pytest.approx((1 + tau) / 2, abs=0.004)


def test_it_is_the_same_on_several_devices(mesh):
    ours, theirs = (jax.random.normal(jax.random.key(seed), (16, 9)) for seed in (0, 1))
    threshold = jnp.sort(theirs, axis=1)[:, -2]
    spec = jax.sharding.PartitionSpec("data")
    for function in (early_stop.draws, early_stop.pick_probabilities):
        mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(spec, spec), out_specs=spec))
        np.testing.assert_allclose(mapped(ours, threshold), function(ours, threshold), rtol=1e-6)
