"""Sequence likelihood calibration: a margin between the likelihoods of a pair, and the likelihood of the chosen one.

    L = E [ max(0, δ − log π(chosen) + log π(rejected)) − λ log π(chosen) ]

(SLiC-HF, Zhao et al. 2023, arXiv 2305.10425: the rank calibration loss with a cross-entropy to a target response; here
the target is the chosen one, and log π that of the whole response). No reference is in it: what holds the policy is the
cross-entropy, so that for a large λ the minimum is the law of the chosen responses, whatever the reference. For a small
λ the likelihoods of two responses, of which one is preferred more often, differ by exactly δ, however sure the
preference is. The reference is read for the metrics alone, which are those of the other algorithms on pairs.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.preference_pairs import FromPairs, Pairs
from ctrl_jax.steps.masked import Mean, StandardError, masked_mean
from ctrl_jax.types import Metric, PreferencePairs


@dataclass(frozen=True)
class Slic(FromPairs):
    margin: float
    """δ, nats: a pair whose likelihoods differ by more teaches no ranking."""
    regularization: float
    """λ, the weight of the chosen response's likelihood."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        *FromPairs.metrics,
        Metric("margin", "nats per pair", shown=True),
        Metric("within_margin", "share of pairs"),
    )

    def of_pairs(self, pairs: Pairs) -> Mean:
        ranking = jax.nn.relu(self.margin - _difference(pairs))
        return masked_mean(ranking - self.regularization * pairs.log_probs[:, 0], None)

    def measure(self, batch: PreferencePairs, targets: Any, auxiliary: Pairs) -> dict[str, Mean | StandardError]:
        difference = _difference(auxiliary)
        return super().measure(batch, targets, auxiliary) | {
            "margin": masked_mean(difference, None),
            "within_margin": masked_mean((difference < self.margin).astype(jnp.float32), None),
        }


def _difference(pairs: Pairs) -> jax.Array:
    """[B] log π(chosen) − log π(rejected), nats."""
    return pairs.log_probs[:, 0] - pairs.log_probs[:, 1]
