"""Paired differences and curves, beside enumeration of all resamples, variances and laws of known curves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import stats

from ctrl_jax.errors import InputError
from ctrl_jax.steps import comparison
from ctrl_jax.steps.comparison import Curve, at_kl, difference, difference_at_kl, kl_range, of_training
from ctrl_jax.steps.win_rate import interval

KEY = jax.random.key(0)


def correlated(prompts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Win rates of two policies on the same prompts, which differ more between prompts than between policies."""
    random = np.random.default_rng(seed)
    easy = random.normal(0.6, 0.2, prompts)
    return easy + random.normal(0.05, 0.05, prompts), easy + random.normal(0, 0.05, prompts)


def curve(prompts: int, seed: int, lift: float = 0.3) -> Curve:
    """Win rates ½ + lift · KL at three points; a prompt's KL differs from the mean, and its win rate with it."""
    random = np.random.default_rng(seed)
    kls = np.array([0.2, 0.5, 0.8])[:, None] * random.gamma(16, 1 / 16, prompts)
    win_rates = 0.5 + lift * kls + random.normal(0, 0.05, (3, prompts))
    return Curve(jnp.asarray(kls, jnp.float32), jnp.asarray(win_rates, jnp.float32))


def enumerated(statistic, prompts: int) -> tuple[float, float, float]:
    """Bootstrap-t over *all* resamples; what a prompt contributes is the slope of the statistic in its weight."""

    def spread(weights: np.ndarray) -> float:
        step = 1e-6
        slopes = [
            (statistic((1 - step) * weights + step * np.eye(prompts)[b]) - statistic(weights)) / step
            for b in range(prompts)
        ]
        mean = np.average(slopes, weights=weights)
        return float(np.sqrt(np.average((slopes - mean) ** 2, weights=weights) * prompts / (prompts - 1)))

    own = np.full(prompts, 1 / prompts)
    value, width = statistic(own), spread(own)
    t = []
    for counts in itertools.product(range(prompts), repeat=prompts):
        weights = np.bincount(counts, minlength=prompts) / prompts
        t.append((statistic(weights) - value) / max(spread(weights), width / 4))
    lower, upper = np.quantile(t, [0.025, 0.975])
    return value, value - width * max(upper, 0), value - width * min(lower, 0)


def test_a_difference_is_that_of_all_resamples_of_the_same_prompts():
    first, second = correlated(5)
    found = difference(jnp.asarray(first), jnp.asarray(second), KEY, resamples=100_000)
    expected = enumerated(lambda weights: float(np.dot(weights, first - second)), 5)
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_its_width_is_that_of_the_variance_of_a_difference():
    first, second = correlated(400)
    mean, low, high = difference(jnp.asarray(first), jnp.asarray(second), KEY, resamples=20_000)
    cov = np.cov(first, second)
    variance = (cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]) / 400
    assert mean == pytest.approx(first.mean() - second.mean(), rel=1e-3)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.05)
    assert (cov[0, 0] + cov[1, 1]) / 400 > 5 * variance, "what they have in common is most of it"


def test_equal_policies_have_no_interval_and_no_difference():
    first, _ = correlated(20)
    mean, low, high = difference(jnp.asarray(first), jnp.asarray(first), KEY)
    assert mean == 0 and np.isnan(low) and np.isnan(high)
    one = curve(20, 0)
    mean, low, high = difference_at_kl(one, one, 0.6, KEY)
    assert mean == 0 and np.isnan(low) and np.isnan(high)


def test_prompts_must_be_the_same():
    with pytest.raises(AssertionError):
        difference(jnp.ones(5), jnp.ones(6), KEY)
    with pytest.raises(AssertionError):
        difference_at_kl(curve(5, 0), curve(6, 1), 0.5, KEY)


def on_curve(one: Curve, kl: float):
    """The statistic of weights over prompts, in NumPy."""
    kls, win_rates = np.asarray(one.kl, float), np.asarray(one.win_rate, float)

    def statistic(weights: np.ndarray) -> float:
        k, w = kls @ weights, win_rates @ weights
        segment = 0 if kl < k[1] else 1
        slope = (w[segment + 1] - w[segment]) / (k[segment + 1] - k[segment])
        return float(w[segment] + slope * (kl - k[segment]))

    return statistic


@pytest.mark.parametrize("kl", [0.3, 0.6])
def test_the_interval_at_a_kl_is_that_of_all_resamples(kl):
    one, other = curve(5, 0), curve(5, 1, lift=0.2)
    expected = enumerated(on_curve(one, kl), 5)
    np.testing.assert_allclose(at_kl(one, kl, KEY, resamples=100_000, bounds=(-np.inf, np.inf)), expected, rtol=0.02)
    ours, theirs = on_curve(one, kl), on_curve(other, kl)
    expected = enumerated(lambda weights: ours(weights) - theirs(weights), 5)
    found = difference_at_kl(one, other, kl, KEY, resamples=100_000)
    np.testing.assert_allclose(found, expected, atol=0.03 * (expected[2] - expected[1]))


def test_where_all_prompts_have_one_kl_a_point_has_its_own_interval():
    win_rates = np.clip(np.random.default_rng(0).normal([[0.6], [0.7], [0.8]], 0.1, (3, 40)), 0, 1)
    kls = np.array([0.25, 0.5, 1.0])
    one = Curve(jnp.broadcast_to(jnp.asarray(kls)[:, None], (3, 40)), jnp.asarray(win_rates))
    for kl, row in zip(kls, win_rates, strict=True):
        np.testing.assert_allclose(
            at_kl(one, float(kl), KEY), interval(jnp.asarray(row), KEY, bounds=(0, 1)), rtol=1e-5
        )
    half = interval(jnp.asarray(0.5 * win_rates[1] + 0.5 * win_rates[2]), KEY, bounds=(0, 1))
    np.testing.assert_allclose(at_kl(one, 0.75, KEY), half, rtol=1e-5)


def test_the_kls_own_uncertainty_is_in_the_interval():
    """On a steep curve of exact win rates, all there is to know wrongly is the KL: W = K at every point."""
    prompts, kl = 200, 0.5
    level = np.random.default_rng(0).normal(0, 0.1, prompts)
    kls = np.array([0.3, 0.7])[:, None] + level
    steady = np.broadcast_to(np.array([0.3, 0.7])[:, None], kls.shape)
    one = Curve(jnp.asarray(kls), jnp.asarray(steady))
    mean, low, high = at_kl(one, kl, KEY, resamples=4000)
    assert mean == pytest.approx(kl - level.mean(), abs=1e-4)
    assert high - low == pytest.approx(2 * 1.96 * level.std(ddof=1) / np.sqrt(prompts), rel=0.1)
    # Where the win rate follows the KL of a prompt, nothing is uncertain.
    followed = at_kl(Curve(one.kl, one.kl), kl, KEY)
    assert followed.mean == pytest.approx(kl, abs=1e-5)
    assert np.isnan(followed.low) or followed.high - followed.low < 1e-5


def test_the_interval_of_a_difference_at_equal_kl_covers_the_true_one():
    """First wins .3 a nat, second .2, on prompts that move both; their KLs are measured on 60 prompts."""
    trials, prompts, kl = 300, 60, 0.6

    def covered(key):
        noise, ours, theirs, draw = jax.random.split(key, 4)
        common = 0.15 * jax.random.normal(noise, (1, prompts))
        curves = []
        for seed, lift in ((ours, 0.3), (theirs, 0.2)):
            one, two = jax.random.split(seed)
            means = jnp.array([0.2, 0.5, 0.8])[:, None]
            kls = means * (1 + 0.3 * jax.random.normal(one, (1, prompts)))
            curves.append(Curve(kls, 0.5 + lift * means + common + 0.1 * jax.random.normal(two, (3, prompts))))
        found = comparison._interpolated(tuple(curves), kl, draw, resamples=200, level=0.95, bounds=(-1, 1))
        return (found.low <= 0.1 * kl) & (0.1 * kl <= found.high)

    hits = int(jax.jit(lambda keys: jax.lax.map(covered, keys))(jax.random.split(KEY, trials)).sum())
    assert stats.binom.ppf(1e-3, trials, 0.93) <= hits <= stats.binom.ppf(1 - 1e-3, trials, 0.965)


def test_a_point_that_a_later_one_undercuts_is_left_out():
    means = np.array([0.1, 0.4, 0.8, 0.6, 0.601])
    kls = means[:, None] + np.random.default_rng(0).normal(0, 0.01, (5, 50))
    win_rates = np.arange(5.0)[:, None] * np.ones((5, 50))
    kept = of_training(kls, win_rates)
    # The third went beyond the last; the fourth is not clearly below it.
    np.testing.assert_array_equal(kept.win_rate[:, 0], [0, 1, 4])
    np.testing.assert_allclose(kept.kl, kls[[0, 1, 4]], rtol=1e-6)
    np.testing.assert_array_equal(of_training(kls[-1:], win_rates[-1:]).win_rate[:, 0], [4])


def test_nothing_is_extrapolated():
    one, other = curve(20, 0), curve(20, 1)
    low, high = kl_range(one, other)
    assert low == pytest.approx(max(float(c.kl.mean(axis=1)[0]) for c in (one, other)))
    assert high == pytest.approx(min(float(c.kl.mean(axis=1)[-1]) for c in (one, other)))
    for kl in (low, high):
        assert np.isfinite(difference_at_kl(one, other, kl, KEY)).all()
    with pytest.raises(InputError, match=r"KL to compare at is 2 nats; it must be between 0\.\d+ and 0\.\d+") as caught:
        difference_at_kl(one, other, 2.0, KEY)
    assert (caught.value.field, caught.value.value) == ("kl", 2.0)
    far = Curve(other.kl + 5, other.win_rate)
    assert kl_range(one, far) is None and kl_range(Curve(one.kl[:1], one.win_rate[:1])) is None
    with pytest.raises(InputError, match="the curves have no KL in common"):
        difference_at_kl(one, far, 0.5, KEY)


def test_sharded_equals_single_device(mesh):
    one, other = curve(16, 0), curve(16, 1)
    spread = jax.device_put((one, other), NamedSharding(mesh, P(None, "data")))
    np.testing.assert_allclose(difference_at_kl(*spread, 0.5, KEY), difference_at_kl(one, other, 0.5, KEY), atol=1e-6)
    paired = difference(spread[0].win_rate[1], spread[1].win_rate[1], KEY)
    np.testing.assert_allclose(paired, difference(one.win_rate[1], other.win_rate[1], KEY), atol=1e-6)
