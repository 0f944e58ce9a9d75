import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.steps import ensemble

KEY = jax.random.key(3)


@pytest.fixture
def rewards():
    return np.random.default_rng(0).normal(size=(8, 5, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean", lambda r: r.mean(-1)),
        ("median", lambda r: np.sort(r, -1)[..., 1:3].mean(-1)),
        ("min", lambda r: np.sort(r, -1)[..., 0]),
        ("penalized(0.5)", lambda r: r.mean(-1) - 0.5 * (np.square(r).mean(-1) - r.mean(-1) ** 2)),
    ],
)
def test_it_is_its_definition_on_any_devices(name, expected, rewards):
    canonical, one = ensemble.parse(name)
    assert canonical == name
    np.testing.assert_allclose(jax.jit(one)(rewards), expected(rewards), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one(rewards[..., ::-1]), one(rewards), rtol=1e-5, atol=1e-6)  # members have no order
    split = jax.shard_map(one, mesh=make_mesh(8), in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(split)(rewards), jax.jit(one)(rewards))
    check_grads(one, (jnp.asarray(rewards),), order=1, modes=["rev"], eps=1e-3, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["mean", "median", "min", "penalized(2)"])
def test_members_that_agree_are_believed(name, rewards):
    alike = np.repeat(rewards[..., :1], 4, axis=-1)
    np.testing.assert_allclose(ensemble.parse(name)[1](alike), rewards[..., 0], rtol=1e-6)


@pytest.mark.parametrize("text", ["max", "min(3)", "penalized", "penalized(-1)", "penalized(inf)"])
def test_what_is_no_ensemble_is_refused(text):
    with pytest.raises(InputError, match="ensemble"):
        ensemble.parse(text)


def test_a_bootstrap_sample_has_a_pair_as_often_as_poisson_says():
    weights = np.asarray(ensemble.bootstrap_weights(jnp.arange(5000, dtype=jnp.uint32), KEY, 4))
    assert weights.shape == (5000, 4)
    for count, probability in enumerate(np.exp(-1.0) / np.array([1, 1, 2, 6])):
        # Of 20,000 draws: four standard errors.
        allowed = 4 * np.sqrt(probability * (1 - probability) / weights.size)
        assert abs(np.mean(weights == count) - probability) < allowed
    correlation = np.corrcoef(weights.T)[np.triu_indices(4, 1)]
    assert np.abs(correlation).max() < 4 / np.sqrt(5000), "members have samples of their own"


def test_a_pairs_weight_is_its_own_in_any_batch_and_by_any_key():
    ids = jnp.array([7, 3, 7, 4_000_000_000], jnp.uint32)
    weights = ensemble.bootstrap_weights(ids, KEY, 16)
    np.testing.assert_array_equal(weights[0], weights[2])
    np.testing.assert_array_equal(ensemble.bootstrap_weights(ids[::-1], KEY, 16), weights[::-1])
    assert (np.asarray(weights[0]) != np.asarray(weights[1])).any()
    assert (np.asarray(ensemble.bootstrap_weights(ids, jax.random.key(4), 16)) != np.asarray(weights)).any()
