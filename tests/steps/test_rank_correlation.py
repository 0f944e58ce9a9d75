import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import PartitionSpec as P

from ctrl_jax.steps.rank_correlation import spearman

measured = jax.jit(spearman)
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(8, 12)).astype(np.float32)
TIED = RANDOM.integers(0, 4, size=(8, 12)).astype(np.float32)


@pytest.mark.parametrize(("x", "y"), [(X, X[::-1]), (X, TIED), (TIED, TIED[::-1])])
def test_it_is_scipys_with_ties_and_without(x, y):
    expected = [scipy.stats.spearmanr(*row).statistic for row in zip(x, y, strict=True)]
    np.testing.assert_allclose(measured(x, y), expected, atol=1e-6)


def test_of_increasing_and_falling_maps_it_is_one_and_minus_one():
    np.testing.assert_allclose(measured(X, np.exp(3 * X)), 1, atol=1e-6)
    np.testing.assert_allclose(measured(X, -(X**3)), -1, atol=1e-6)


def test_the_order_of_a_prompts_responses_does_not_count():
    order = RANDOM.permutation(12)
    np.testing.assert_allclose(measured(X[:, order], TIED[:, order]), measured(X, TIED), atol=1e-6)


def test_where_all_are_equal_or_one_is_no_number_it_has_no_value_and_harms_no_other_row():
    x, y = X.copy(), TIED.copy()
    x[1], y[3] = 2.0, 5.0
    x[5, 2] = np.nan
    found = np.asarray(measured(x, y))
    assert np.isnan(found[[1, 3, 5]]).all()
    others = [0, 2, 4, 6, 7]
    np.testing.assert_array_equal(found[others], np.asarray(measured(X, TIED))[others])


def test_shards_are_the_whole(mesh):
    sharded = jax.jit(jax.shard_map(spearman, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    np.testing.assert_array_equal(sharded(jnp.asarray(X), jnp.asarray(TIED)), measured(X, TIED))
