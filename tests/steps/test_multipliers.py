"""The multipliers of constraints: by their definition, and on a plant that follows them with a lag."""

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.steps import multipliers


def steps(floors, plant, count=150, **gains):
    """The multipliers and mean ranks of a policy whose ranks follow `plant(λ)` with a lag of 12 steps."""
    state, rank, found = multipliers.init(len(floors)), plant(np.zeros(len(floors))), []
    for _ in range(count):
        state = multipliers.update(state, jnp.asarray(rank), jnp.asarray(floors), **gains)
        rank = rank + (plant(np.asarray(state.values)) - rank) / 12
        found.append((np.asarray(state.values), rank))
    return map(np.array, zip(*found, strict=True))


def test_a_step_is_that_of_the_definition():
    floors = jnp.array([0.5, 0.5, 0.6])
    state = multipliers.State(jnp.array([9.0, 9.0, 9.0]), jnp.array([1.0, 0.1, 0.0]))
    found = multipliers.update(state, jnp.array([0.4, 0.8, 0.5]), floors, proportional=6.0, integral=0.5)
    # base: 1 + .05, .1 − .15 and so 0, 0 + .05; λ: each plus 6 e, and not below 0.
    np.testing.assert_allclose(found.base, [1.05, 0.0, 0.05], atol=1e-6)
    np.testing.assert_allclose(found.values, [1.65, 0.0, 0.65], atol=1e-6)
    assert np.isnan(multipliers.update(state, jnp.array([jnp.nan] * 3), floors).values).all()


def test_a_policy_that_lags_comes_to_its_floor_without_swinging_and_a_floor_that_is_kept_costs_nothing():
    """One reward starts .15 below its floor, the other .1 above its own."""
    values, ranks = steps((0.5, 0.5), lambda multiplier: np.array([0.35, 0.6]) + multiplier / 12)
    np.testing.assert_allclose(ranks[-1], [0.5, 0.6], atol=0.005)
    np.testing.assert_allclose(values[-1], [12 * 0.15, 0.0], atol=0.05)
    assert values[:, 1].max() == 0
    assert ranks[:, 0].max() < 0.515, "a floor is passed by little"
    assert (ranks[60:, 0] > 0.49).all()


def test_a_multiplier_falls_again_when_its_floor_is_kept_without_it():
    state = multipliers.State(jnp.array([3.0]), jnp.array([3.0]))
    for _ in range(100):
        state = multipliers.update(state, jnp.array([0.6]), jnp.array([0.5]))
    assert float(state.values[0]) == float(state.base[0]) == 0


def test_it_is_compiled_to_the_same():
    state, given = multipliers.init(2), (jnp.array([0.2, 0.9]), jnp.array([0.5, 0.5]))
    plain, compiled = multipliers.update(state, *given), jax.jit(multipliers.update)(state, *given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, compiled)
