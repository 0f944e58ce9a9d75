"""Direct preference optimisation: the policy itself is the reward model of the pairs.

    L = −E log σ( β log π/π_ref(chosen) − β log π/π_ref(rejected) )

(Rafailov et al. 2023, arXiv 2305.18290, equation 7). Under the Bradley-Terry model its minimum is the policy
∝ π_ref exp(r / β), which maximises E[r] − β KL(π || π_ref).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from ctrl_jax.algorithms.protocol import GRADIENT, Algorithm, Source, loss_in
from ctrl_jax.steps import logprobs, preference
from ctrl_jax.steps.masked import Mean, StandardError, masked_mean
from ctrl_jax.types import Metric, Params, Policy, PreferencePairs, Trunk


@dataclass(frozen=True)
class Dpo(Algorithm):
    policy: Policy
    beta: float
    """The weight of the KL, in raw rewards per nat."""
    temperature: float
    """Of the law whose log-probs are compared."""
    chunk_size: int
    """Tokens whose logits exist at a time."""

    source = Source.PREFERENCES
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("chosen_log_ratio", "nats per response", "log-probs", guarded=True),
        Metric("rejected_log_ratio", "nats per response", guarded=True),
        loss_in("nats per pair", shown=True),
        GRADIENT,
        Metric("accuracy", "share of pairs", shown=True),
        Metric("margin", "raw reward", shown=True),
    )

    def loss(
        self, params: Params, frozen: Params, batch: PreferencePairs, targets: Any, extra: None
    ) -> tuple[Mean, jax.Array]:
        trunk = self.policy.below(frozen, batch.prompts, batch.responses)
        log_ratios = self._log_probs(params, trunk, batch) - self._log_probs(frozen, trunk, batch)
        rewards = self.beta * log_ratios
        return preference.bradley_terry(rewards[:, 0], rewards[:, 1]), log_ratios

    def measure(self, batch: PreferencePairs, targets: Any, auxiliary: jax.Array) -> dict[str, Mean | StandardError]:
        chosen, rejected = auxiliary[:, 0], auxiliary[:, 1]
        return {
            "chosen_log_ratio": masked_mean(chosen, None),
            "rejected_log_ratio": masked_mean(rejected, None),
            "accuracy": preference.accuracy(chosen, rejected),
            "margin": masked_mean(self.beta * (chosen - rejected), None),
        }

    def _log_probs(self, params: Params, trunk: Trunk, batch: PreferencePairs) -> jax.Array:
        """Log-probs of the responses, [B, 2] nats."""
        return logprobs.of_responses(
            self.policy, params, batch.prompts, batch.responses,
            temperature=self.temperature, chunk_size=self.chunk_size, trunk=trunk,
        )  # fmt: skip
