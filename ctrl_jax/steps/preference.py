"""The Bradley-Terry model of preferences, P(chosen over rejected) = σ(r(chosen) − r(rejected)): loss and quality."""

from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.steps.masked import Mean, masked_mean


def bradley_terry(chosen: jax.Array, rejected: jax.Array, mask: jax.Array | None = None) -> Mean:
    """Mean of −log σ(Δ), Δ = chosen − rejected raw rewards [...], in nats a pair; mask [...] is true for real pairs.

    Bradley and Terry 1952. For large −Δ it is −Δ, for large Δ it is 0, both exactly, and so are the slopes.
    """
    return masked_mean(jax.nn.softplus(-_margin(chosen, rejected, mask)), mask)


def weighted_bradley_terry(chosen: jax.Array, rejected: jax.Array, weights: jax.Array) -> Mean:
    """As `bradley_terry`, each pair with a weight [...] of 0 or more."""
    losses = jax.nn.softplus(-_margin(chosen, rejected, weights > 0))
    return Mean(jnp.sum(weights * losses), jnp.sum(weights))


def accuracy(chosen: jax.Array, rejected: jax.Array, mask: jax.Array | None = None) -> Mean:
    """Mean of 1{chosen > rejected} + ½ 1{chosen = rejected} over pairs [...].

    >>> float(accuracy(jnp.array([2.0, 1.0, 0.0]), jnp.array([1.0, 1.0, 1.0])).value)
    0.5
    """
    return masked_mean((1 + jnp.sign(_margin(chosen, rejected, mask))) / 2, mask)


def brier(probabilities: jax.Array, outcomes: jax.Array, mask: jax.Array | None = None) -> Mean:
    """Mean of (p − o)² over probabilities p and what happened o (0 or 1), both [...]; mask is true for real ones.

    Brier 1950. ¼ for who always says ½, 0 for who knows. Of a pair both orders give the same.
    """
    chex.assert_equal_shape([probabilities, outcomes])
    error = probabilities - outcomes
    return masked_mean(jnp.square(error if mask is None else jnp.where(mask, error, 0)), mask)


def wilson(share: Any, count: Any) -> tuple[Any, Any]:
    """Wilson's 95 % interval of a share of `count`: right also near 0 and 1, where the normal one leaves [0, 1].

    >>> [round(float(end), 3) for end in wilson(0.6, 100)]
    [0.502, 0.691]
    """
    z = 1.96
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return center - half, center + half


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reliability:
    """A reliability diagram over equal bins of [0, 1], each Mean of shape [bins]; it merges as they do."""

    predicted: Mean
    """The mean probability in each bin."""
    observed: Mean
    """How often it came true."""

    def __add__(self, other: "Reliability") -> "Reliability":
        return Reliability(self.predicted + other.predicted, self.observed + other.observed)

    def across(self, axis_name: str | None) -> "Reliability":
        return Reliability(self.predicted.across(axis_name), self.observed.across(axis_name))


def reliability(
    probabilities: jax.Array, outcomes: jax.Array, mask: jax.Array | None = None, *, bins: int
) -> Reliability:
    """Probabilities [B] and what happened [B] (0, 1, or between) by bin: [i/bins, (i+1)/bins), the last one with 1.

    Pairs in the order (chosen, rejected) all have outcome 1, which says nothing: give each pair in both orders,
    (σ(Δ), 1) and (σ(−Δ), 0).
    """
    chex.assert_rank([probabilities, outcomes], 1)
    chex.assert_equal_shape([probabilities, outcomes])
    index = jnp.clip(jnp.floor(probabilities * bins), 0, bins - 1)
    index = jnp.where(jnp.isnan(index), 0, index)  # a nan belongs to no bin: it must show, not vanish
    member = index[:, None] == jnp.arange(bins)[None, :]
    member = member if mask is None else member & mask[:, None]

    def by_bin(x: jax.Array) -> Mean:
        return masked_mean(jnp.broadcast_to(x[:, None], member.shape), member, axis=0)

    return Reliability(by_bin(probabilities), by_bin(outcomes))


def expected_calibration_error(reliability: Reliability) -> jax.Array:
    """Σ_bins (share of the bin) |predicted − observed|, in [0, 1]; 0 without entries.

    Guo et al. 2017, arXiv 1706.04599, eq. 3. The noise of a bin's mean only adds to it, so few entries a bin read high.
    """
    gap = jnp.abs(reliability.predicted.sum - reliability.observed.sum)
    return Mean(jnp.sum(gap), jnp.sum(reliability.predicted.weight)).value


def _margin(chosen: jax.Array, rejected: jax.Array, mask: jax.Array | None) -> jax.Array:
    chex.assert_equal_shape([chosen, rejected])
    margin = chosen - rejected
    # Masked before any function of it, so that a nan in the padding cannot reach the gradient.
    return margin if mask is None else jnp.where(mask, margin, 0)
