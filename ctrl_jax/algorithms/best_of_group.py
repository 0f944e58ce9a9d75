"""What algorithms share that teach a policy to write what best-of-N would pick, N the size of a group.

Best-of-N draws N responses from the reference and picks one of the highest reward, by lot where several have it. Its
law π_N = w π_ref is known (F and F⁻ are the shares of the reference's responses with rewards up to r(y), and below it):

    w(y) = (F(y)^N − F⁻(y)^N) / (F(y) − F⁻(y)),    KL(π_N || π_ref) ≤ log N − (N − 1) / N

Without ties w = N u^(N−1), which is CTRL's optimum with the logarithm and β = 1 / (N − 1). The metrics compare with w
on the K responses of a prompt, of which the N are drawn without replacement; so it has no bias. What is learned from
are the extremes of a group: its best response and its worst, and where several tie for it, all of them in equal parts,
which is the mean over the lots.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.stored_responses import FromStored, Targets
from ctrl_jax.steps import calibration
from ctrl_jax.steps.masked import Mean
from ctrl_jax.types import Params, StoredResponses

SMALLEST = 1e-30
"""Stands for a weight of 0, which the N − 1 lowest have, so that its logarithm is finite."""


@dataclass(frozen=True)
class BestOfGroup(FromStored):
    """An algorithm whose loss is a function of log π/π_ref and of which responses are a group's best and its worst."""

    @abc.abstractmethod
    def of_extremes(self, log_ratio: jax.Array, best: jax.Array, worst: jax.Array) -> Mean:
        """The loss of log π/π_ref and of the parts of each response in its group's best and worst, each [B, N]."""

    def log_weights(self, batch: StoredResponses, calibrated: jax.Array) -> tuple[jax.Array, jax.Array]:
        every, size = batch.reference_rewards, batch.raw.shape[1]
        return log_weights(batch.raw, every, size), log_weights(every, every, size)

    def loss(
        self, params: Params, frozen: Params, batch: StoredResponses, targets: Targets, extra: None
    ) -> tuple[Mean, jax.Array]:
        log_ratio = self.log_ratios(params, batch)
        return self.of_extremes(log_ratio, parts(batch.raw, jnp.max), parts(batch.raw, jnp.min)), log_ratio


def parts(rewards: jax.Array, extreme: Callable[..., jax.Array]) -> jax.Array:
    """[B, N] raw rewards to the part that each response has in the group's `extreme`; those of a group add up to 1."""
    tied = (rewards == extreme(rewards, axis=1, keepdims=True)).astype(jnp.float32)
    return tied / tied.sum(axis=1, keepdims=True)


def log_weights(rewards: jax.Array, reference_rewards: jax.Array, n: int) -> jax.Array:
    """log w of responses with these rewards, [B, M], which are some of the K reference rewards, [B, K]: [B, M] nats.

    Of the C(K, n) ways to draw n of the K, w / K is the share in which the response is the best, ties in equal parts:
    (C(a, n) − C(b, n)) / C(K, n) / (a − b), where a of the K rewards are at most its own, and b below it.
    """
    below, not_above = calibration.ranks(rewards, jnp.sort(reference_rewards, axis=-1))
    size, drawn = reference_rewards.shape[-1], jnp.arange(n)[None, None]

    def all_among(count: jax.Array) -> jax.Array:
        """C(count, n) / C(K, n)."""
        return jnp.prod(jnp.maximum(count[..., None] - drawn, 0) / (size - drawn), axis=-1)

    weights = size * (all_among(not_above) - all_among(below)) / (not_above - below)
    return jnp.log(jnp.maximum(weights, SMALLEST))
