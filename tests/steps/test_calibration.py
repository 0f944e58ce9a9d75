import re

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

from ctrl_jax.errors import InputError
from ctrl_jax.steps import calibration

# Jitted, as the jobs run them: far fewer compilations than operation by operation.
calibrate = jax.jit(calibration.calibrate)
leave_one_out = jax.jit(calibration.leave_one_out)

# A coarse grid, so that many rewards tie.
grid = st.integers(-4, 4).map(lambda i: i / 2)


def normal(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def uniform(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).uniform(size=shape), jnp.float32)


def brute_force(rewards: np.ndarray, references: np.ndarray) -> np.ndarray:
    r, z = rewards[..., :, None], references[..., None, :]
    return ((r > z) + 0.5 * (r == z)).mean(-1)


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float32, (3, 5), elements=grid), hnp.arrays(np.float32, (3, 8), elements=grid))
def test_calibrate_is_the_mean_over_all_pairs(rewards, references):
    np.testing.assert_allclose(calibrate(rewards, references), brute_force(rewards, references), rtol=1e-6)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3)])
def test_any_leading_shape(leading):
    rng = np.random.default_rng(0)
    rewards, references = rng.normal(size=(*leading, 6)), rng.normal(size=(*leading, 11))
    actual = calibrate(jnp.array(rewards), jnp.array(references))
    np.testing.assert_allclose(actual, brute_force(rewards, references), rtol=1e-6)


def test_leading_shapes_must_agree():
    with pytest.raises(AssertionError):
        calibrate(jnp.ones((2, 3)), jnp.ones((4, 3)))


def test_sorted_references_give_the_same():
    rng = np.random.default_rng(0)
    rewards, references = jnp.array(rng.normal(size=(4, 6))), jnp.array(rng.normal(size=(4, 32)))
    np.testing.assert_array_equal(
        calibration.calibrate_sorted(rewards, jnp.sort(references)), calibrate(rewards, references)
    )


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 5), elements=grid),
    hnp.arrays(np.float32, (2, 8), elements=grid),
    hnp.arrays(np.float32, (2, 1), elements=st.sampled_from([0.25, 1.0, 8.0])),
    hnp.arrays(np.float32, (2, 1), elements=st.integers(-100, 100)),
)
def test_increasing_maps_of_a_prompts_rewards_do_not_matter(rewards, references, scale, shift):
    def increase(r):
        return np.exp(r) * scale + shift

    np.testing.assert_array_equal(calibrate(increase(rewards), increase(references)), calibrate(rewards, references))


def test_the_order_of_the_references_does_not_matter():
    rng = np.random.default_rng(0)
    rewards, references = rng.normal(size=(3, 4)), rng.normal(size=(3, 9))
    np.testing.assert_array_equal(
        calibrate(jnp.array(rewards), jnp.array(references[:, ::-1])),
        calibrate(jnp.array(rewards), jnp.array(references)),
    )


def test_all_tied_is_one_half():
    np.testing.assert_array_equal(calibrate(jnp.ones((2, 3)), jnp.ones((2, 7))), 0.5)
    np.testing.assert_array_equal(leave_one_out(jnp.ones((2, 7))), 0.5)


def test_the_ends_and_one_reference():
    np.testing.assert_array_equal(calibrate(jnp.array([-1.0, 5, 9]), jnp.array([5.0])), [0, 0.5, 1])


def test_minus_zero_ties_with_zero():
    np.testing.assert_array_equal(calibrate(jnp.array([-0.0, 0.0]), jnp.array([0.0, -0.0])), 0.5)


def test_infinite_rewards_rank_at_the_ends_and_tie_with_their_like():
    references = jnp.array([-jnp.inf, 0.0, 1.0, jnp.inf])
    actual = calibrate(jnp.array([-jnp.inf, 0.5, jnp.inf]), references)
    np.testing.assert_array_equal(actual, [0.125, 0.5, 0.875])


def test_nan_has_no_rank():
    references = jnp.array([[0.0, 1.0], [jnp.nan, 1.0]])
    actual = calibrate(jnp.array([[0.5, jnp.nan], [0.5, 2.0]]), references)
    np.testing.assert_array_equal(actual, [[0.5, np.nan], [np.nan, np.nan]])


def test_the_gradient_is_zero():
    gradient = jax.grad(lambda r: jnp.sum(calibrate(r, jnp.arange(5.0))))(jnp.array([1.0, 2.5]))
    np.testing.assert_array_equal(gradient, 0)


def test_no_references_are_refused():
    with pytest.raises(InputError, match="0 reference rewards"):
        calibrate(jnp.ones((2, 3)), jnp.ones((2, 0)))
    with pytest.raises(InputError, match="K is 1"):
        leave_one_out(jnp.ones((2, 1)))


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float32, (2, 6), elements=grid))
def test_leave_one_out_calibrates_against_the_others(references):
    actual = leave_one_out(references)
    for k in range(6):
        others = np.delete(references, k, axis=1)
        np.testing.assert_allclose(actual[:, [k]], brute_force(references[:, [k]], others), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.mean(actual, -1), 0.5, rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("size", "count"), [(32, 32), (32, 16), (32, 5), (33, 8), (128, 1), (7, 2), (1000, 64)])
def test_quantiles_move_a_calibrated_reward_by_at_most_half_a_quantile(size, count, tied):
    rng = np.random.default_rng(size + count)
    references = np.sort(rng.integers(0, 9, (50, size)) / 2 if tied else rng.normal(size=(50, size)), axis=-1)
    # Also the references themselves, what lies between them, and beyond both ends.
    between = (references[:, 1:] + references[:, :-1]) / 2
    rewards = np.concatenate([rng.normal(size=(50, 100)), references, between, [[-99.0, 99.0]] * 50], axis=-1)
    kept = calibration.quantiles(references, count)
    assert kept.shape == (50, count) and (np.diff(kept) >= 0).all()
    error = brute_force(rewards, kept) - brute_force(rewards, references)
    assert np.abs(error).max() <= 0.5 / count + 1e-9
    if count == size:
        np.testing.assert_array_equal(kept, references)
    elif not tied:
        # Symmetric, and no better than the bound.
        np.testing.assert_allclose(calibration.quantiles(-references[:, ::-1], count), -kept[:, ::-1])
        assert np.abs(error).max() > 0.5 / count - 1.001 / size


@pytest.mark.parametrize("count", [0, 9])
def test_more_quantiles_than_rewards_are_refused(count):
    with pytest.raises(InputError, match=f"{count} quantiles .* K = 8"):
        calibration.quantiles(jnp.zeros((2, 8)), count)


def test_calibration_never_compares_all_pairs():
    """N × K booleans alone would be more than all that the compiled binary search needs for its N searches of K."""
    prompts, samples, size = 16, 64, 2048
    arguments = jnp.zeros((prompts, samples)), jnp.zeros((prompts, size))
    compiled = jax.jit(calibration.calibrate_sorted).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < prompts * samples * size / 4
    assert not re.search(rf"\[(\d+,)*({samples},{size}|{size},{samples})\b", compiled.as_text())


def test_leave_one_out_without_ties_is_evenly_spread():
    references = normal(3, 17)
    np.testing.assert_allclose(np.sort(leave_one_out(references)), np.tile(np.arange(17) / 16, (3, 1)), atol=1e-6)


def test_the_standard_error_is_the_spread_over_reference_samples():
    np.testing.assert_allclose(calibration.standard_error(jnp.array(0.5), 100), 0.05)
    # Reference rewards are uniform, so the calibrated reward of r is r.
    references = uniform(20_000, 25)
    rewards = jnp.broadcast_to(jnp.array([0.1, 0.5, 0.8]), (20_000, 3))
    spread = np.std(calibrate(rewards, references), axis=0)
    np.testing.assert_allclose(calibration.standard_error(rewards[0], 25), spread, rtol=0.03)


def test_uniformity_is_the_kolmogorov_smirnov_distance():
    rng = np.random.default_rng(0)
    for sample in (rng.uniform(size=(2, 40)), rng.uniform(size=(2, 40)) ** 3, np.round(rng.uniform(size=(2, 40)), 1)):
        expected = [scipy.stats.kstest(row, "uniform").statistic for row in sample]
        np.testing.assert_allclose(calibration.uniformity(jnp.array(sample)), expected, rtol=1e-5)


def test_the_distances_of_known_samples():
    evenly = (jnp.arange(10) + 0.5) / 10
    np.testing.assert_allclose(calibration.uniformity(evenly), 0.05, atol=1e-6)
    np.testing.assert_allclose(calibration.calibration_error(evenly), 0, atol=1e-6)
    for constant, uniformity, error in ((0.5, 0.5, 0.25), (0.0, 1.0, 0.5), (1.0, 1.0, 0.5)):
        same = jnp.full((3, 100), constant)
        np.testing.assert_allclose(calibration.uniformity(same), uniformity, atol=1e-6)
        np.testing.assert_allclose(calibration.calibration_error(same), error, atol=1e-6)


def test_the_calibration_error_is_the_wasserstein_distance_of_many():
    sample = np.random.default_rng(0).uniform(size=2000) ** 2
    uniform = (np.arange(200_000) + 0.5) / 200_000
    expected = scipy.stats.wasserstein_distance(sample, uniform)
    np.testing.assert_allclose(calibration.calibration_error(jnp.array(sample)), expected, atol=1 / 2000)


def test_sharded_equals_single_device(mesh):
    rewards = normal(16, 4)
    references = normal(16, 32, seed=1)
    step = jax.shard_map(calibrate, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(step)(rewards, references), calibrate(rewards, references))
    step = jax.shard_map(leave_one_out, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(step)(references), leave_one_out(references), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e30, 1e20, 1e-20, 1e-30])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_ranks_are_the_same_on_any_scale_that_float32_holds(scale, shift):
    rewards, references = normal(3, 5).round(1) + shift, normal(3, 40, seed=1).round(1) + shift
    scaled = calibrate(rewards * jnp.float32(scale), references * jnp.float32(scale))
    np.testing.assert_array_equal(scaled, calibrate(rewards, references))


def test_neighbours_in_float32_are_told_apart_and_nothing_nearer_is():
    large = np.float32(1e20)
    above = np.nextafter(large, np.float32(np.inf))
    np.testing.assert_array_equal(calibrate(jnp.asarray([[above, large]]), jnp.asarray([[large]])), [[1, 0.5]])
    assert np.float32(1e20 + 1) == large


def test_minus_zero_is_zero_in_ranks_and_in_ties():
    zeros = jnp.asarray([[-0.0, 0.0]])
    np.testing.assert_array_equal(calibrate(zeros, zeros), [[0.5, 0.5]])
    np.testing.assert_array_equal(calibrate(jnp.asarray([[-1.0, 0.0, -0.0, 1.0]]), zeros), [[0, 0.5, 0.5, 1]])


def test_what_is_out_of_range():
    rewards = np.array([0.0, -1e30, 1.1e30, np.inf, -np.inf, np.nan, 1e300])
    np.testing.assert_array_equal(calibration.out_of_range(rewards), [False, False, True, True, True, True, True])
