"""Reductions over the real entries of padded arrays, kept apart until everything has been added.

A mean of the means of shards, of micro-batches or of batches is not the mean. So a reduction here is a pytree that
merges, by `+` over batches and by `across` over devices, and is divided once, when it is read.
"""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A sum and the weight to divide it by, both of one shape."""

    sum: jax.Array
    weight: jax.Array

    @property
    def value(self) -> jax.Array:
        """sum / weight; 0 where the weight is 0, with gradient 0."""
        return _divide(self.sum, self.weight)

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.sum + other.sum, self.weight + other.weight)

    def across(self, axis_name: str | tuple[str, ...] | None) -> "Mean":
        """The mean over all devices of a mapped axis, or of several; unchanged for none."""
        return jax.lax.psum(self, axis_name) if axis_name else self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """A mean with the spread around it, all of one shape.

    Kept as deviations from the mean and merged by the formula of Chan, Golub and LeVeque (1979), because the difference
    of two large sums, Σx² − (Σx)²/n, loses every digit in float32 once the mean is some thousand times the spread.
    """

    mean: jax.Array
    squares: jax.Array
    """Σ (x − mean)²."""
    weight: jax.Array
    """How many entries."""

    @property
    def variance(self) -> jax.Array:
        """Unbiased: Σ (x − mean)² / (n − 1); 0 for fewer than 2 entries."""
        return _divide(self.squares, jnp.maximum(self.weight - 1, 0))

    @property
    def standard_error(self) -> jax.Array:
        """Of the mean: √(variance / n); 0 for fewer than 2 entries, which then says nothing."""
        return _sqrt(_divide(self.variance, self.weight))

    def __add__(self, other: "Moments") -> "Moments":
        weight = self.weight + other.weight
        share = _divide(other.weight, weight)
        difference = other.mean - self.mean
        return Moments(
            self.mean + share * difference,
            self.squares + other.squares + self.weight * share * difference**2,
            weight,
        )

    def across(self, axis_name: str | tuple[str, ...] | None) -> "Moments":
        """The moments over all devices of a mapped axis, or of several; unchanged for none."""
        if not axis_name:
            return self
        mean = Mean(self.weight * self.mean, self.weight).across(axis_name)
        squares = self.squares + self.weight * (self.mean - mean.value) ** 2
        return Moments(mean.value, jax.lax.psum(squares, axis_name), mean.weight)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StandardError:
    """That of a mean, as a reduction of its own."""

    moments: Moments

    @property
    def value(self) -> jax.Array:
        return self.moments.standard_error

    def across(self, axis_name: str | tuple[str, ...] | None) -> "StandardError":
        return StandardError(self.moments.across(axis_name))


Axis = int | tuple[int, ...] | None


def length_mask(lengths: jax.Array, size: int) -> jax.Array:
    """[...] lengths to a mask [..., size] that is true at the first `lengths` positions."""
    positions = jnp.arange(size).reshape((1,) * lengths.ndim + (size,))
    return positions < lengths[..., None]


def masked_mean(x: jax.Array, mask: jax.Array | None, axis: Axis = None) -> Mean:
    """The mean of x over `axis` (all axes for None) where the mask is true; None masks nothing.

    What x holds under a false mask does not matter, not even nan. Raises AssertionError if the shapes differ.
    """
    x, mask = _real(x, mask)
    return Mean(jnp.sum(x, axis), jnp.sum(mask, axis, dtype=x.dtype))


def masked_moments(x: jax.Array, mask: jax.Array | None, axis: Axis = None) -> Moments:
    """Mean and spread of x over `axis` (all axes for None) where the mask is true; None masks nothing."""
    x, mask = _real(x, mask)
    weight = jnp.sum(mask, axis, dtype=x.dtype)
    guess = _divide(jnp.sum(x, axis, keepdims=True), jnp.sum(mask, axis, keepdims=True, dtype=x.dtype))
    deviations = jnp.where(mask, x - guess, 0)
    # The float32 sum behind the guess is off by some units of rounding; the mean deviation is how far.
    correction = _divide(jnp.sum(deviations, axis), weight)
    squares = jnp.sum(deviations**2, axis) - weight * correction**2
    return Moments(jnp.reshape(guess, weight.shape) + correction, jnp.maximum(squares, 0), weight)


def _real(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    # At least float32: a count in bfloat16 stops at 256.
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if mask is None:
        return x, jnp.ones_like(x, dtype=bool)
    chex.assert_equal_shape([x, mask])
    return jnp.where(mask, x, 0), mask


def _divide(sum_: jax.Array, weight: jax.Array) -> jax.Array:
    # The denominator is made safe before dividing: a where after it would leave nan in the gradient.
    some = weight > 0
    return jnp.where(some, sum_, 0) / jnp.where(some, weight, 1)


def _sqrt(x: jax.Array) -> jax.Array:
    # The slope of √ at 0 is infinite, and infinity times a gradient of 0 is nan.
    some = x > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, x, 1)), 0)
