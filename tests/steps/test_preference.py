import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from scipy import stats

from ctrl_jax.steps import preference


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return (np.round(rng.normal(size=(2, 16, 3)), 1) + np.array([[[0.5]], [[0.0]]])).astype(np.float32)


def test_bradley_terry_is_minus_log_sigmoid(pairs):
    chosen, rejected = pairs.astype(np.float64)
    expected = -np.log(1 / (1 + np.exp(rejected - chosen)))
    loss = preference.bradley_terry(*pairs)
    np.testing.assert_allclose(loss.value, expected.mean(), rtol=1e-5)
    assert loss.weight == chosen.size


def test_bradley_terry_of_equals_is_log_two():
    np.testing.assert_allclose(preference.bradley_terry(jnp.ones(3), jnp.ones(3)).value, np.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("margin", "value", "slope"), [(1e4, 0, 0), (-1e4, 1e4, -1), (30.0, np.exp(-30), -np.exp(-30))]
)
def test_bradley_terry_of_large_margins(margin, value, slope):
    loss = jax.value_and_grad(lambda r: preference.bradley_terry(r, jnp.float32(0)).value)
    actual, gradient = loss(jnp.float32(margin))
    np.testing.assert_allclose(actual, value, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5)


def test_gradient_of_bradley_terry(pairs):
    check_grads(
        lambda c, r: preference.bradley_terry(c, r).value,
        tuple(map(jnp.array, pairs)),
        order=1,
        modes=["rev"],
        rtol=1e-2,
    )


def test_accuracy_counts_ties_as_one_half():
    chosen, rejected = jnp.array([1.0, 0, 2, 3]), jnp.array([0.0, 1, 2, 3])
    np.testing.assert_allclose(preference.accuracy(chosen, rejected).value, (1 + 0 + 0.5 + 0.5) / 4)
    assert np.isnan(preference.accuracy(chosen.at[0].set(jnp.nan), rejected).value)


@pytest.mark.parametrize("name", ["bradley_terry", "accuracy"])
def test_padding_pairs_do_not_matter(pairs, name):
    step = getattr(preference, name)
    padded = np.concatenate([pairs, np.full((2, 4, 3), np.nan, np.float32)], axis=1)
    mask = np.arange(20)[:, None] < np.full((1, 3), 16)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), step(*padded, mask), step(*pairs))
    if name == "bradley_terry":
        gradient = jax.grad(lambda chosen: step(chosen, padded[1], mask).value)(padded[0])
        np.testing.assert_array_equal(gradient[16:], 0)
        np.testing.assert_allclose(gradient[:16], jax.grad(lambda c: step(c, pairs[1]).value)(pairs[0]), rtol=1e-5)


def uniform(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).uniform(size=shape), jnp.float32)


def reliability_oracle(probabilities, outcomes, bins):
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    return [(probabilities[index == b], outcomes[index == b]) for b in range(bins)]


def test_reliability_by_bin():
    rng = np.random.default_rng(0)
    probabilities = np.append(rng.uniform(0.2, 1, 200), [0.0, 1.0]).astype(np.float32)
    outcomes = (rng.uniform(size=202) < probabilities**2).astype(np.float32)
    diagram = preference.reliability(jnp.array(probabilities), jnp.array(outcomes), bins=10)
    expected_error = 0
    for b, (predicted, observed) in enumerate(reliability_oracle(probabilities, outcomes, 10)):
        assert diagram.predicted.weight[b] == diagram.observed.weight[b] == len(predicted)
        np.testing.assert_allclose(diagram.predicted.value[b], predicted.mean() if len(predicted) else 0, rtol=1e-5)
        np.testing.assert_allclose(diagram.observed.value[b], observed.mean() if len(observed) else 0, rtol=1e-5)
        if len(predicted):
            expected_error += len(predicted) / 202 * abs(predicted.mean() - observed.mean())
    assert diagram.predicted.weight[1] == 0  # an empty bin is among those tested
    np.testing.assert_allclose(preference.expected_calibration_error(diagram), expected_error, rtol=1e-4)


def test_calibration_error_at_its_ends():
    probabilities = jnp.array([0.25, 0.25, 0.25, 0.25, 1.0])
    perfect = preference.reliability(probabilities, jnp.array([0.0, 0, 0, 1, 1]), bins=4)
    np.testing.assert_allclose(preference.expected_calibration_error(perfect), 0, atol=1e-7)
    opposite = preference.reliability(jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0]), bins=4)
    np.testing.assert_allclose(preference.expected_calibration_error(opposite), 1)
    nothing = preference.reliability(jnp.zeros(0), jnp.zeros(0), bins=4)
    assert preference.expected_calibration_error(nothing) == 0


def test_a_nan_probability_shows():
    diagram = preference.reliability(jnp.array([0.5, jnp.nan]), jnp.array([1.0, 1.0]), bins=4)
    assert np.isnan(preference.expected_calibration_error(diagram))


def test_reliability_merges_and_ignores_padding():
    probabilities = uniform(40)
    outcomes = jnp.round(uniform(40, seed=1))
    whole = preference.reliability(probabilities, outcomes, bins=5)
    merged = preference.reliability(probabilities[:11], outcomes[:11], bins=5) + preference.reliability(
        jnp.append(probabilities[11:], jnp.nan), jnp.append(outcomes[11:], 1.0), jnp.arange(30) < 29, bins=5
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), merged, whole)


def test_the_brier_score_is_the_mean_squared_error_of_real_pairs():
    probabilities, outcomes = jnp.array([0.9, 0.5, 0.2, jnp.nan]), jnp.array([1.0, 0.0, 0.0, 1.0])
    found = preference.brier(probabilities, outcomes, jnp.array([True, True, True, False]))
    assert float(found.value) == pytest.approx((0.1**2 + 0.5**2 + 0.2**2) / 3)
    assert float(preference.brier(jnp.full(7, 0.5), jnp.arange(7) % 2).value) == 0.25
    both = preference.brier(jnp.array([0.9, 0.1]), jnp.array([1.0, 0.0]))
    assert float(both.value) == pytest.approx(0.01)


def test_sharded_equals_single_device(mesh, pairs):
    def step(chosen, rejected, axis_name=None):
        probabilities = jax.nn.sigmoid(chosen - rejected).reshape(-1)
        return (
            preference.bradley_terry(chosen, rejected).across(axis_name),
            preference.accuracy(chosen, rejected).across(axis_name),
            preference.reliability(probabilities, jnp.ones_like(probabilities), bins=5).across(axis_name),
            preference.brier(probabilities, jnp.ones_like(probabilities)).across(axis_name),
        )

    sharded = jax.shard_map(lambda *a: step(*a, "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), jax.jit(sharded)(*pairs), step(*pairs))


def test_the_gradient_across_devices_is_that_of_the_whole_batch(mesh, pairs):
    def loss(scale, chosen, rejected, axis_name=None):
        return preference.bradley_terry(scale * chosen, scale * rejected).across(axis_name).value

    sharded = jax.shard_map(
        lambda scale, *a: jax.grad(loss)(scale, *a, "data"),
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    scale = jnp.float32(0.7)
    np.testing.assert_allclose(jax.jit(sharded)(scale, *pairs), jax.grad(loss)(scale, *pairs), rtol=1e-5)


def test_wilson_interval_matches_scipy():
    wins, count = np.array([0.0, 3.0, 50.0, 99.0]), np.array([5.0, 10.0, 80.0, 100.0])
    low, high = preference.wilson(wins / count, count)
    for index in range(len(wins)):
        interval = stats.binomtest(int(wins[index]), int(count[index])).proportion_ci(0.95, method="wilson")
        assert (low[index], high[index]) == pytest.approx((interval.low, interval.high), abs=1e-4)


def test_pairs_count_by_their_weight_and_those_of_none_not_at_all(pairs):
    weights = np.array([0.0, 1.0, 3.0], np.float32) * np.ones(pairs.shape[1:], np.float32)
    chosen, rejected = (side.copy() for side in pairs)
    chosen[:, 0] = np.nan  # has the weight 0
    losses = np.log1p(np.exp(rejected - chosen))[:, 1:]
    found = preference.weighted_bradley_terry(chosen, rejected, weights)
    assert found.value == pytest.approx((losses * [1, 3]).sum() / 64, rel=1e-5)
    gradient = jax.grad(lambda c: preference.weighted_bradley_terry(c, rejected, weights).value)(jnp.asarray(chosen))
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[:, 0].any()
    ones = preference.weighted_bradley_terry(*pairs, jnp.ones(pairs.shape[1:]))
    assert ones.value == pytest.approx(float(preference.bradley_terry(*pairs).value), rel=1e-6)
