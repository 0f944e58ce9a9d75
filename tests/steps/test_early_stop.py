"""Calibrated early stopping, by enumeration of all orders in which responses may come, and by its law in theory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.steps import early_stop

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


@pytest.mark.parametrize(("place", "references"), [(2, 8), (1, 8), (16, 128)])
def test_of_the_reference_itself_it_wins_as_the_theory_says_whatever_there_is_of_it(place, references):
    """To stop at a response as good as the a-th highest of M' − 1 others wins 1 − a / (2 M') in the mean."""
    ours, theirs = (
        jax.random.uniform(jax.random.key(seed), (20_000, size)) for seed, size in ((0, 256), (1, references))
    )
    (won,), draws = early_stop.against_one(ours, theirs, place, [(ours, theirs)])
    assert float(won.mean()) == pytest.approx(1 - place / (2 * references), abs=0.004)
    if place > 1:
        # Of a share of Beta(a, M' − a) above the threshold; with an end at M, somewhat fewer.
        assert float(draws.mean()) == pytest.approx((references - 1) / (place - 1), rel=0.12)


def test_it_is_the_same_on_several_devices(mesh):
    ours, theirs = (jax.random.normal(jax.random.key(seed), (16, 9)) for seed in (0, 1))
    threshold = jnp.sort(theirs, axis=1)[:, -2]
    spec = jax.sharding.PartitionSpec("data")
    for function in (early_stop.draws, early_stop.pick_probabilities):
        mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(spec, spec), out_specs=spec))
        np.testing.assert_allclose(mapped(ours, threshold), function(ours, threshold), rtol=1e-6)

    def against(ours, theirs):
        (won,), draws = early_stop.against_one(ours, theirs, 2, [(ours, theirs)])
        return won, draws

    mapped = jax.jit(jax.shard_map(against, mesh=mesh, in_specs=(spec, spec), out_specs=spec))
    for found, expected in zip(mapped(ours, theirs), against(ours, theirs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
