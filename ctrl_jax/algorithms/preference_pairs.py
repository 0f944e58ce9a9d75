"""What algorithms share that learn from preference pairs: log-probs of policy and reference, and metrics.

A pair is a chosen response before a rejected one, of the data. Nothing is sampled, and no reward is needed. The margin
of a pair is h = log π/π_ref(chosen) − log π/π_ref(rejected), nats, of whole responses.
"""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax

from ctrl_jax.algorithms.protocol import GRADIENT, Algorithm, Source, loss_in
from ctrl_jax.steps import logprobs, preference
from ctrl_jax.steps.masked import Mean, StandardError, masked_mean
from ctrl_jax.types import Metric, Params, Policy, PreferencePairs, Trunk


class Pairs(NamedTuple):
    """Of each pair the chosen response, and then the rejected one."""

    log_probs: jax.Array
    """[B, 2] log π, nats per response."""
    log_ratios: jax.Array
    """[B, 2] log π/π_ref, nats per response."""

    @property
    def margin(self) -> jax.Array:
        """[B] h, nats."""
        return self.log_ratios[:, 0] - self.log_ratios[:, 1]


@dataclass(frozen=True)
class FromPairs(Algorithm):
    """An algorithm whose loss is a function of the log-probs and log-ratios of pairs."""

    policy: Policy
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
    )

    @abc.abstractmethod
    def of_pairs(self, pairs: Pairs) -> Mean:
        """The loss of pairs."""

    def loss(
        self, params: Params, frozen: Params, batch: PreferencePairs, targets: Any, extra: None
    ) -> tuple[Mean, Pairs]:
        trunk = self.policy.below(frozen, batch.prompts, batch.responses)
        log_probs = self._log_probs(params, trunk, batch)
        pairs = Pairs(log_probs, log_probs - self._log_probs(frozen, trunk, batch))
        return self.of_pairs(pairs), pairs

    def measure(self, batch: PreferencePairs, targets: Any, auxiliary: Pairs) -> dict[str, Mean | StandardError]:
        """Accuracy is the share of pairs whose margin is above 0, those at 0 counted by half."""
        chosen, rejected = auxiliary.log_ratios[:, 0], auxiliary.log_ratios[:, 1]
        return {
            "chosen_log_ratio": masked_mean(chosen, None),
            "rejected_log_ratio": masked_mean(rejected, None),
            "accuracy": preference.accuracy(chosen, rejected),
        }

    def _log_probs(self, params: Params, trunk: Trunk, batch: PreferencePairs) -> jax.Array:
        """Log-probs of the responses, [B, 2] nats."""
        return logprobs.of_responses(
            self.policy, params, batch.prompts, batch.responses,
            temperature=self.temperature, chunk_size=self.chunk_size, trunk=trunk,
        )  # fmt: skip
