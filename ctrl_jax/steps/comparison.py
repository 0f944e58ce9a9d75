"""Two policies on the same prompts: paired differences, and win rates at equal KL by interpolation along trainings.

Prompts differ in how much can be won on them, and both policies meet the same ones. So what is resampled is prompts,
with all that both policies measured on each: the interval of a difference is that of the per-prompt differences, and
what the two have in common cancels.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.steps.win_rate import Interval, bootstrap_t, check_interval, interval, resampled

CLEARLY = 3.0
"""Standard errors that the KL of a point must be below that of every later one, to be a point of the curve."""


class Curve(NamedTuple):
    """What a policy measured on the same B prompts at P points of its training, in the order of their KL.

    Between two points the win rate is a straight line in the KL.
    """

    kl: jax.Array
    """[P, B] nats per response."""
    win_rate: jax.Array
    """[P, B]"""


def difference(
    first: jax.Array,
    second: jax.Array,
    key: jax.Array,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """The mean of first − second over B prompts, [B] each of the same ones, with its paired interval: `interval` of the
    differences. Its variance is (Var(first) + Var(second) − 2 Cov(first, second)) / B.

    Raises InputError as `interval` does.
    """
    chex.assert_equal_shape([first, second])
    return interval(first - second, key, resamples=resamples, level=level, bounds=bounds)


def of_training(kl: np.ndarray, win_rate: np.ndarray) -> Curve:
    """The curve of points [P, B] of a training, in the order of its steps.

    A training may come back to a KL that it had before, with a better policy. Then the later point counts: one is left
    out unless its mean KL is below that of every later point that is kept, by CLEARLY paired standard errors. So a
    resample of prompts hardly ever brings two points of the curve into another order, and the last is always kept.
    """
    chex.assert_equal_shape([kl, win_rate])
    kept = [len(kl) - 1]
    for place in range(len(kl) - 2, -1, -1):
        ahead = kl[kept[0]] - kl[place]
        if ahead.mean() > CLEARLY * ahead.std() / math.sqrt(max(len(ahead) - 1, 1)):
            kept.insert(0, place)
    return Curve(jnp.asarray(kl[kept]), jnp.asarray(win_rate[kept]))


def kl_range(*curves: Curve) -> tuple[float, float] | None:
    """(lowest, highest) KL that every one of the curves has; None where there is none."""
    means = [np.asarray(jnp.mean(curve.kl, axis=-1)) for curve in curves]
    lowest, highest = max(float(mean[0]) for mean in means), min(float(mean[-1]) for mean in means)
    return (lowest, highest) if all(len(mean) > 1 for mean in means) and lowest <= highest else None


def at_kl(
    curve: Curve,
    kl: float,
    key: jax.Array,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Interval:
    """The win rate of a curve at a KL, with its interval over prompts.

    Each resample of prompts has its own KL and win rate at every point, and interpolates between those, beyond its ends
    along its last segment. So the interval has the KL's uncertainty in it: where the curve is steep, it is wide.

    Raises InputError as `interval` does, and for a KL outside the curve.
    """
    _check(curve, kl=kl)
    return _interpolated((curve,), kl, key, resamples=resamples, level=level, bounds=bounds)


def difference_at_kl(
    first: Curve,
    second: Curve,
    kl: float,
    key: jax.Array,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> Interval:
    """first − second at equal KL, with its paired interval: as `at_kl`, both curves on the same resamples of prompts.

    Raises InputError as `interval` does, and for a KL outside either curve.
    """
    _check(first, second, kl=kl)
    return _interpolated((first, second), kl, key, resamples=resamples, level=level, bounds=bounds)


def _check(*curves: Curve, kl: float) -> None:
    found = kl_range(*curves)
    if found is None or not found[0] <= kl <= found[1]:
        raise InputError(
            f"The KL to compare at is {kl:.4g} nats",
            field="kl",
            value=kl,
            remedy="nothing is extrapolated, and the curves have no KL in common."
            if found is None
            else f"it must be between {found[0]:.4g} and {found[1]:.4g}, which was measured.",
        )


def _interpolated(
    curves: tuple[Curve, ...], kl: float, key: jax.Array, *, resamples: int, level: float, bounds: tuple[float, float]
) -> Interval:
    """The first curve's win rate at a KL, less the second's if there are two."""
    size = curves[0].kl.shape[-1]
    chex.assert_shape([array for curve in curves for array in curve], (None, size))
    check_interval(size, resamples=resamples, level=level)

    def statistic(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, contribution = _on_curve(curves[0], kl, rows)
        for curve in curves[1:]:
            other, its = _on_curve(curve, kl, rows)
            value, contribution = value - other, contribution - its
        return value, jnp.std(contribution, ddof=1)

    estimate, spread = statistic(jnp.arange(size))
    drawn, drawn_spreads = jax.vmap(statistic)(resampled(key, size, resamples))
    spread = jnp.where(spread > 0, spread, jnp.nan)
    return bootstrap_t(estimate, spread, drawn, drawn_spreads, level=level, bounds=bounds, num_prompts=size)


def _on_curve(curve: Curve, kl: float, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(win rate [] at a KL, what each prompt contributes to it [B]) of the prompts at these places, [B].

    Between the means (K₀, W₀) and (K₁, W₁), with the share s = (kl − K₀) / (K₁ − K₀) and the slope a = (W₁ − W₀) /
    (K₁ − K₀), the win rate is (1 − s) W₀ + s W₁. Of a prompt with KLs k and win rates w the first-order contribution is
    (1 − s) (w₀ − a k₀) + s (w₁ − a k₁), up to a constant: a KL above the mean means less won at the KL asked for.
    """
    kls, win_rates = curve.kl[:, rows], curve.win_rate[:, rows]
    means = jnp.mean(kls, axis=-1)
    order = jnp.argsort(means)
    last = jnp.clip(jnp.searchsorted(means[order], kl), 1, len(means) - 1)
    ends = order[jnp.stack([last - 1, last])]
    (low, high), (lower, upper) = means[ends], jnp.mean(win_rates[ends], axis=-1)
    share, slope = (kl - low) / (high - low), (upper - lower) / (high - low)
    adjusted = win_rates[ends] - slope * kls[ends]
    return lower + share * (upper - lower), (1 - share) * adjusted[0] + share * adjusted[1]
