import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from ctrl_jax.steps import masked
from ctrl_jax.steps.masked import Mean, Moments, length_mask

# Jitted, as the jobs run them: far fewer compilations than operation by operation.
masked_mean = jax.jit(masked.masked_mean, static_argnums=2)
masked_moments = jax.jit(masked.masked_moments, static_argnums=2)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (16, 5, 7)).astype(np.float32)
    lengths = rng.integers(0, 8, (16, 5))
    lengths[:2] = 0  # a whole shard of eight without a real entry
    return x, np.arange(7) < lengths[..., None]


def test_length_mask_is_true_before_the_length():
    mask = length_mask(jnp.array([[0, 1], [3, 4]]), 3)
    expected = [[[0, 0, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 1]]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


def test_length_mask_of_one_length():
    np.testing.assert_array_equal(length_mask(jnp.array(2), 4), [True, True, False, False])


@pytest.mark.parametrize("axis", [None, -1, 1, (0, 2)])
def test_masked_mean_is_the_mean_of_what_is_real(batch, axis):
    x, mask = batch
    expected = np.ma.mean(np.ma.array(x, mask=~mask), axis).filled(0) if axis is not None else x[mask].mean()
    np.testing.assert_allclose(masked_mean(x, mask, axis).value, expected, rtol=1e-5)


@pytest.mark.parametrize("reduce", [masked_mean, masked_moments])
def test_what_lies_under_the_mask_does_not_matter(batch, reduce):
    x, mask = batch
    for garbage in (np.nan, np.inf, 1e30):
        jax.tree.map(np.testing.assert_array_equal, reduce(np.where(mask, x, garbage), mask), reduce(x, mask))


@pytest.mark.parametrize("reduce", [masked_mean, masked_moments])
def test_padding_does_not_matter(batch, reduce):
    x, mask = batch
    wider = [np.pad(a, ((0, 3), (0, 0), (0, 4))) for a in (x, mask)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), reduce(*wider), reduce(x, mask))


def test_no_mask_is_a_mask_of_all():
    x = jnp.arange(6.0)
    assert masked_mean(x, None).value == 2.5
    np.testing.assert_allclose(masked_moments(x, None).variance, np.var(np.arange(6), ddof=1))


def test_merging_counts_each_entry_once(batch):
    # A mean of means would be off: the parts have different numbers of real entries.
    x, mask = batch
    parts = [masked_mean(x[i : i + 3], mask[i : i + 3]) for i in range(0, 16, 3)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    np.testing.assert_allclose(merged.value, x[mask].mean(), rtol=1e-5)
    assert abs(np.mean([part.value for part in parts]) - x[mask].mean()) > 1e-3


def test_nothing_has_mean_zero_and_gradient_zero():
    mask = jnp.zeros(3, bool)
    value, gradient = jax.value_and_grad(lambda x: masked_mean(x, mask).value)(jnp.ones(3))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(3))


def test_gradient_under_a_mask_is_that_of_the_shorter_array():
    x, mask = jnp.array([1.0, 2, 3, jnp.nan]), jnp.array([True, True, True, False])
    gradient = jax.grad(lambda x: masked_mean(x**2, mask).value)(x)
    np.testing.assert_allclose(gradient[:3], jax.grad(lambda x: jnp.mean(x**2))(x[:3]), rtol=1e-6)
    check_grads(lambda x: masked_moments(x, mask[:3]).standard_error, (x[:3],), order=1, modes=["rev"])


def test_integers_booleans_and_halves_are_averaged_as_floats():
    assert masked_mean(jnp.array([1, 2]), None).value == 1.5
    assert masked_mean(jnp.array([True, False]), None).value == 0.5
    # bfloat16 cannot count beyond 256.
    assert masked_mean(jnp.ones(1000, jnp.bfloat16), None).weight == 1000


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        masked_mean(jnp.ones((2, 3)), jnp.ones((3,), bool))


@pytest.mark.parametrize("axis", [None, -1, (0, 2)])
def test_moments_are_numpys(batch, axis):
    x, mask = batch
    oracle = np.ma.array(x.astype(np.float64), mask=~mask)
    moments = masked_moments(x, mask, axis)
    count = oracle.count(axis)
    variance = np.asarray(np.ma.filled(oracle.var(axis, ddof=1), 0)) * (count >= 2)
    np.testing.assert_array_equal(moments.weight, count)
    np.testing.assert_allclose(moments.mean, np.ma.filled(oracle.mean(axis), 0), rtol=1e-5)
    np.testing.assert_allclose(moments.variance, variance, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(moments.standard_error, np.sqrt(variance / np.maximum(count, 1)), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("count", [0, 1])
def test_the_variance_of_fewer_than_two_is_zero_and_so_is_its_gradient(count):
    mask = jnp.arange(3) < count
    for name in ("variance", "standard_error"):
        value, gradient = jax.value_and_grad(lambda x, name=name: getattr(masked_moments(x, mask), name))(jnp.ones(3))
        assert value == 0
        np.testing.assert_array_equal(gradient, np.zeros(3))


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(np.float32, 24, elements=st.floats(-100, 100, width=32)),
    hnp.arrays(bool, 24),
    st.sampled_from([0, 1, 9, 24]),
)
def test_moments_of_two_parts_merge_to_those_of_the_whole(x, mask, cut):
    merged = masked_moments(x[:cut], mask[:cut]) + masked_moments(x[cut:], mask[cut:])
    whole = x[mask].astype(np.float64)
    assert merged.weight == len(whole)
    np.testing.assert_allclose(merged.mean, whole.mean() if len(whole) else 0, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(merged.variance, whole.var(ddof=1) if len(whole) > 1 else 0, rtol=1e-4, atol=1e-4)


def test_moments_survive_a_mean_far_from_zero(mesh):
    # Spread 1 around a million: in float32, Σx² − (Σx)²/n has not one right digit.
    x = (1e6 + np.random.default_rng(0).normal(size=(64, 64))).astype(np.float32)
    expected = x.astype(np.float64).var(ddof=1)
    np.testing.assert_allclose(masked_moments(x, None).variance, expected, rtol=1e-4)
    merged = masked_moments(x[:7], None) + masked_moments(x[7:], None)
    np.testing.assert_allclose(merged.variance, expected, rtol=1e-3)
    step = jax.shard_map(lambda x: masked_moments(x, None).across("data"), mesh=mesh, in_specs=P("data"), out_specs=P())
    np.testing.assert_allclose(jax.jit(step)(x).variance, expected, rtol=1e-3)


@pytest.mark.parametrize("reduce", [masked_mean, masked_moments])
@pytest.mark.parametrize("axis", [None, 0])
def test_sharded_equals_single_device(mesh, batch, reduce, axis):
    x, mask = batch
    step = jax.shard_map(
        lambda x, mask: reduce(x, mask, axis).across("data"), mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.jit(step)(x, mask),
        reduce(x, mask, axis),
    )


def test_across_no_axis_changes_nothing():
    mean = Mean(jnp.array(3.0), jnp.array(2.0))
    moments = Moments(jnp.array(3.0), jnp.array(1.0), jnp.array(2.0))
    assert mean.across(None) is mean
    assert moments.across(None) is moments


def test_the_gradient_across_devices_is_that_of_the_whole_batch(mesh, batch):
    x, mask = batch

    def loss(scale, x, mask, axis_name=None):
        return masked_mean((scale * x) ** 2, mask).across(axis_name).value

    step = jax.shard_map(
        lambda scale, x, mask: jax.value_and_grad(loss)(scale, x, mask, "data"),
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    scale = jnp.array(1.5)
    np.testing.assert_allclose(jax.jit(step)(scale, x, mask), jax.value_and_grad(loss)(scale, x, mask), rtol=1e-5)
