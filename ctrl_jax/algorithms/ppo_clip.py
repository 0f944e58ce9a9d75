"""PPO-clip on CTRL's reward: several updates by the same responses, each kept near the policy that sampled them.

    L = E [ Σ_t KL_t − Σ_t min( ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t ) ],    ρ_t = π(y_t | y_<t) / π_sampler(y_t | y_<t)

(Schulman et al. 2017, arXiv 1707.06347, equation 7), with CTRL's advantage in place of a learned critic: A_t is the
prompt's leave-one-out of R / β − Σ_{s > t} KL_s. Where ρ = 1, at a batch's first update, its gradient is CTRL's.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms import own_responses
from ctrl_jax.algorithms.ctrl import Ctrl, Targets
from ctrl_jax.steps import policy_gradient
from ctrl_jax.steps.kl_budget import State as Controller
from ctrl_jax.steps.logprobs import Comparison
from ctrl_jax.steps.masked import Mean, StandardError, length_mask, masked_mean
from ctrl_jax.types import Experience, Metric, Params


class Auxiliary(NamedTuple):
    comparison: Comparison
    ratio: jax.Array
    """[B, N, T] ρ."""


@dataclass(frozen=True)
class PpoClip(Ctrl):
    clip: float = dataclasses.field(kw_only=True)
    """ε: an advantage moves a token's probability no farther than by this share."""
    epochs: int = dataclasses.field(kw_only=True)
    minibatches: int = dataclasses.field(kw_only=True)

    metrics: ClassVar[tuple[Metric, ...]] = (*own_responses.METRICS, Metric("clipped", "share of tokens", shown=True))

    def loss(
        self, params: Params, frozen: Params, batch: Experience, targets: Targets, extra: Controller
    ) -> tuple[Mean, Any]:
        comparison, responses = self.compare(params, frozen, batch), batch.rollouts.responses
        mask = length_mask(responses.lengths, responses.tokens.shape[-1])
        kl = jnp.where(mask, comparison.kl, 0.0)
        advantages = jax.lax.stop_gradient(policy_gradient.exact_kl_advantages(kl, self.pull(targets, extra)))
        gain, ratio = self.clipped(comparison, batch, advantages, mask)
        loss = kl.sum(-1) - gain.sum(-1)
        return Mean(loss.sum(), jnp.ones_like(loss).sum()), Auxiliary(comparison, ratio)

    def clipped(
        self, comparison: Comparison, batch: Experience, advantages: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(min(ρ A, clip(ρ) A), 0 behind a response, and ρ), each [B, N, T]: of A [B, N, T]."""
        ratio = jnp.exp(jnp.where(mask, comparison.log_probs - batch.rollouts.log_probs, 0.0))
        near = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        return jnp.where(mask, jnp.minimum(ratio * advantages, near * advantages), 0.0), ratio

    def measure(self, batch: Experience, targets: Targets, auxiliary: Any) -> dict[str, Mean | StandardError]:
        """CTRL's, of the policies of all updates on the batch's responses, and how many tokens are clipped."""
        responses = batch.rollouts.responses
        clipped = (jnp.abs(auxiliary.ratio - 1) > self.clip).astype(jnp.float32)
        mask = length_mask(responses.lengths, responses.tokens.shape[-1])
        return super().measure(batch, targets, auxiliary.comparison) | {"clipped": masked_mean(clipped, mask)}
