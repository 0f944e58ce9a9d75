"""Spearman's rank correlation within a prompt, such as that of rewards and the lengths of their responses."""

import chex
import jax
import jax.numpy as jnp

from ctrl_jax.steps.calibration import ranks


def spearman(x: jax.Array, y: jax.Array) -> jax.Array:
    """ρ of x [B, N] and y [B, N] along the last axis: [B], from -1 to 1.

    Spearman 1904: the correlation of the ranks, where equal values share the mean of theirs. It is the same for every
    increasing map of x or of y, and nan where all of one are equal, or not all are numbers: there it has no meaning.

    >>> spearman(jnp.array([[1.0, 2.0, 9.0]]), jnp.array([[10.0, 20.0, 30.0]]))
    Array([1.], dtype=float32)
    """
    chex.assert_rank([x, y], 2)
    chex.assert_equal_shape([x, y])
    x, y = _centred_ranks(x), _centred_ranks(y)
    squares = jnp.sum(x * x, axis=-1) * jnp.sum(y * y, axis=-1)
    known = squares > 0
    correlation = jnp.sum(x * y, axis=-1) / jnp.sqrt(jnp.where(known, squares, 1.0))
    return jnp.where(known, jnp.clip(correlation, -1, 1), jnp.nan)


def _centred_ranks(x: jax.Array) -> jax.Array:
    below, not_above = ranks(x, jnp.sort(x, axis=-1))
    centred = (below + not_above).astype(jnp.float32) / 2 - x.shape[-1] / 2
    # A binary search takes nan for the largest number.
    return jnp.where(jnp.isnan(x).any(axis=-1, keepdims=True), jnp.nan, centred)
