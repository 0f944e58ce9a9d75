"""Calibrated rewards: the rank of a raw reward among the reference policy's rewards on the same prompt.

    C(x, y) = E_{z ~ π_ref(·|x)} [1{r(x, y) > r(x, z)} + ½ 1{r(x, y) = r(x, z)}]

(InfAlign, Balashankar et al. 2024, arXiv 2412.19792). It lies in [0, 1], is the same for every increasing map of a
prompt's rewards, and is uniform under π_ref when r has no ties. It is piecewise constant: its gradient is 0.

Infinite rewards rank as the largest and the smallest, and tie with their like. A nan has no rank: a nan reward makes
its own calibrated reward nan, and a nan among the reference rewards makes the whole prompt's nan.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError

MOST_REWARD = 1e30
"""A raw reward's largest size. Its ranks would stand more, but not a mean over a batch in float32."""


def out_of_range(rewards: np.ndarray) -> np.ndarray:
    """Which of the raw rewards [...] are not finite, or larger than MOST_REWARD: [...] bool."""
    return ~(np.abs(rewards) <= MOST_REWARD)


def calibrate(rewards: jax.Array, reference_rewards: jax.Array) -> jax.Array:
    """Ĉ = (1/K) Σ_k (1{r > r_k} + ½ 1{r = r_k}): rewards [..., N] and reference rewards [..., K] to [..., N].

    The leading shapes are equal. Raises InputError without reference rewards.

    >>> calibrate(jnp.array([0.0, 2.0, 9.0]), jnp.array([1.0, 2.0, 3.0, 4.0]))
    Array([0.   , 0.375, 1.   ], dtype=float32)
    """
    return calibrate_sorted(rewards, jnp.sort(reference_rewards, axis=-1))


def calibrate_sorted(rewards: jax.Array, reference_rewards: jax.Array) -> jax.Array:
    """As `calibrate`, for reference rewards that ascend along the last axis, as in a CalibrationTable."""
    num_references = reference_rewards.shape[-1]
    if num_references < 1:
        raise InputError(
            "Calibration got 0 reference rewards a prompt",
            field="reference_rewards",
            value=reference_rewards.shape,
            remedy="it needs at least 1, and some 100 to be precise.",
        )
    below, not_above = ranks(rewards, reference_rewards)
    dtype = jnp.promote_types(rewards.dtype, jnp.float32)
    calibrated = (below + not_above).astype(dtype) / (2 * num_references)
    # A binary search takes nan for the largest number, which would make a broken reward the best one.
    nan = jnp.isnan(rewards) | jnp.isnan(reference_rewards[..., -1:])
    return jnp.where(nan, jnp.nan, calibrated)


def quantiles(ascending: jax.Array, count: int) -> jax.Array:
    """Q mid-quantiles of K ascending rewards: [..., K] to [..., Q], at the levels (j − ½) / Q for j = 1..Q.

    `calibrate_sorted` against them is within 1/(2Q) of what it is against all K, with ties or without; and equal for
    Q = K. For at a quantile q of level p, at most a share p of the K rewards is below q, and at least a share p is not
    above it. So of the levels, Q F ± ½ fall where a share F of the rewards does, below any r and up to it.

    Where a level falls between two rewards, their mean is taken: neither end is favoured. Raises InputError unless
    1 <= Q <= K.

    >>> quantiles(jnp.arange(8.0), 4)
    Array([0.5, 2.5, 4.5, 6.5], dtype=float32)
    """
    size = ascending.shape[-1]
    if not 1 <= count <= size:
        raise InputError(
            f"{count} quantiles are asked for of K = {size} rewards",
            field="count",
            value=count,
            remedy=f"ask for 1 to {size}.",
        )
    # In whole numbers: K (2j − 1) / (2Q) rewards lie below the level, of which rounding must make no other.
    twice = size * (2 * np.arange(1, count + 1) - 1)
    low, high = -(-twice // (2 * count)) - 1, twice // (2 * count)
    return 0.5 * ascending[..., low] + 0.5 * ascending[..., high]


def leave_one_out(reference_rewards: jax.Array) -> jax.Array:
    """Each of a prompt's reference rewards calibrated against the K − 1 others: [..., K] to [..., K].

    What the reference policy's own calibrated rewards look like: their mean is ½, whatever the ties, and without ties
    they are 0, 1/(K − 1), ..., 1 in some order. Raises InputError for K < 2.

    >>> leave_one_out(jnp.array([3.0, 1.0, 2.0]))
    Array([1. , 0. , 0.5], dtype=float32)
    """
    num_references = reference_rewards.shape[-1]
    if num_references < 2:
        raise InputError(
            f"K is {num_references} reference rewards a prompt",
            field="reference_rewards",
            value=num_references,
            remedy="leaving one out needs at least 2.",
        )
    return without_themselves(reference_rewards, reference_rewards)


def without_themselves(rewards: jax.Array, reference_rewards: jax.Array) -> jax.Array:
    """Some of a prompt's K reference rewards, [..., N] of [..., K], each calibrated against the K − 1 others: [..., N].

    K is at least 2.
    """
    num_references = reference_rewards.shape[-1]
    # A reward ties with itself once: that ½ of 1/K comes off before the scale goes from K to K − 1.
    against_all = calibrate(rewards, reference_rewards)
    return (against_all * num_references - 0.5) / (num_references - 1)


def standard_error(calibrated: jax.Array, num_references: int) -> jax.Array:
    """√(C (1 − C) / K) of a calibrated reward from K independent reference rewards: [...] to [...].

    At most ½/√K. It is the binomial error, an upper bound where there are ties, and 0 at the estimates 0 and 1, where
    it only says that no reference reward fell on the other side.
    """
    return jnp.sqrt(calibrated * (1 - calibrated) / num_references)


def uniformity(calibrated: jax.Array) -> jax.Array:
    """Kolmogorov-Smirnov distance of calibrated rewards [..., n] to the uniform law: sup_u |F_n(u) − u|, [...].

    0 to 1; about .87/√n on average for n uniform draws, ½ when all are ½.
    """
    size = calibrated.shape[-1]
    ordered = jnp.sort(calibrated, axis=-1)
    # F_n jumps at each point: the largest gap is just before a jump or on it.
    steps = jnp.broadcast_to(jnp.arange(size) / size, ordered.shape)
    return jnp.max(jnp.maximum(ordered - steps, steps + 1 / size - ordered), axis=-1)


def calibration_error(calibrated: jax.Array) -> jax.Array:
    """Mean distance of calibrated rewards [..., n] to the uniform law's quantiles, [...].

    (1/n) Σ_i |u_(i) − (i − ½)/n|: how far off a calibrated reward is on average, in ranks (the Wasserstein-1 distance
    to the uniform law, up to 1/n). 0 for evenly spread rewards, ¼ when all are ½, ½ when all are 0 or all are 1.
    """
    size = calibrated.shape[-1]
    ordered = jnp.sort(calibrated, axis=-1)
    quantiles = jnp.broadcast_to((jnp.arange(size) + 0.5) / size, ordered.shape)
    return jnp.mean(jnp.abs(ordered - quantiles), axis=-1)


def ranks(values: jax.Array, ascending: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many of `ascending` [..., K] are below each of `values` [..., N], and how many are not above it.

    Both [..., N]. Their difference is the number of ties. By binary search, so that the N × K comparisons never exist.
    """
    chex.assert_equal_rank([values, ascending])
    chex.assert_equal_shape_prefix([values, ascending], values.ndim - 1)

    def row(ascending: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.searchsorted(ascending, values, side="left"), jnp.searchsorted(ascending, values, side="right")

    for _ in range(values.ndim - 1):
        row = jax.vmap(row)
    return row(ascending, values)
