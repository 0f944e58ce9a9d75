"""GRPO: rewards in standard deviations of their group, a mean over tokens, and k3 in the loss.

    L = E_y [ 1/|y| Σ_t ( k3_t − min( ρ_t A, clip(ρ_t, 1 − ε, 1 + ε) A ) / β ) ]

    A = (R − mean) / std  over the group's N responses
    k3 = π_ref/π − log(π_ref/π) − 1  of the token that was sampled; ρ as in PPO-clip

(Shao et al. 2024, arXiv 2402.03300; here divided by β, so that one learning rate serves any). R is the raw reward in
the paper, and here whatever the transform makes of it. By default a batch gets one update, as in the paper; ρ is then
1, and the clip does nothing.

What differs from CTRL, besides the clip: A has the same size whether the group's rewards are far apart or nearly equal,
so that all prompts count alike. The mean over tokens makes a token of a short response count more. And the gradient of
k3, which is taken at the tokens as they are, is not that of KL(π || π_ref) but, in the mean, of KL(π_ref || π), blind
to what a token does to the KL of later ones. So its optimum is no exponential tilt: of responses of one token it is

    π = π_ref β / (λ − Ā),    λ such that it sums to 1,    Ā the mean of A over the groups that a response is in.

The controller steers β for the same exact KL as CTRL's; the paper holds it.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.ctrl import Targets
from ctrl_jax.algorithms.own_advantage import OwnAdvantage
from ctrl_jax.algorithms.ppo_clip import Auxiliary, PpoClip
from ctrl_jax.algorithms.protocol import loss_in
from ctrl_jax.steps import kl
from ctrl_jax.steps.kl_budget import State as Controller
from ctrl_jax.steps.masked import Mean, length_mask
from ctrl_jax.types import Experience, Metric, Params


@dataclasses.dataclass(frozen=True)
class Grpo(OwnAdvantage, PpoClip):
    metrics: ClassVar[tuple[Metric, ...]] = tuple(
        loss_in("nats per token") if metric.name == "loss" else metric for metric in PpoClip.metrics
    )

    def advantages(self, rewards: jax.Array) -> jax.Array:
        # Of equal rewards the mean may be off by rounding, which a division by their spread would blow up.
        differ = rewards.max(axis=1, keepdims=True) > rewards.min(axis=1, keepdims=True)
        spread = jnp.where(differ, rewards.std(axis=1, keepdims=True), 1.0)
        return jnp.where(differ, (rewards - rewards.mean(axis=1, keepdims=True)) / spread, 0.0)

    def loss(
        self, params: Params, frozen: Params, batch: Experience, targets: Targets, extra: Controller
    ) -> tuple[Mean, Any]:
        comparison, responses = self.compare(params, frozen, batch), batch.rollouts.responses
        mask = length_mask(responses.lengths, responses.tokens.shape[-1])
        advantages = jnp.broadcast_to(self.pull(targets, extra)[..., None], mask.shape)
        gain, ratio = self.clipped(comparison, batch, advantages, mask)
        log_probs, reference = (jnp.where(mask, x, 0.0) for x in (comparison.log_probs, comparison.reference_log_probs))
        by_token = kl.k3(log_probs, reference) - gain
        loss = by_token.sum(-1) / responses.lengths
        return Mean(loss.sum(), jnp.ones_like(loss).sum()), Auxiliary(comparison, ratio)
