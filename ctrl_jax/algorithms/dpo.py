"""Direct preference optimisation: the policy itself is the reward model of the pairs.

    L = −E log σ( β log π/π_ref(chosen) − β log π/π_ref(rejected) )

(Rafailov et al. 2023, arXiv 2305.18290, equation 7). Under the Bradley-Terry model its minimum is the policy
∝ π_ref exp(r / β), which maximises E[r] − β KL(π || π_ref).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ctrl_jax.algorithms.preference_pairs import FromPairs, Pairs
from ctrl_jax.steps import preference
from ctrl_jax.steps.masked import Mean, StandardError, masked_mean
from ctrl_jax.types import Metric, PreferencePairs


@dataclass(frozen=True)
class Dpo(FromPairs):
    beta: float
    """The weight of the KL, in raw rewards per nat."""

    metrics: ClassVar[tuple[Metric, ...]] = (*FromPairs.metrics, Metric("margin", "raw reward", shown=True))

    def of_pairs(self, pairs: Pairs) -> Mean:
        rewards = self.beta * pairs.log_ratios
        return preference.bradley_terry(rewards[:, 0], rewards[:, 1])

    def measure(self, batch: PreferencePairs, targets: Any, auxiliary: Pairs) -> dict[str, Mean | StandardError]:
        margin = masked_mean(self.beta * auxiliary.margin, None)
        return super().measure(batch, targets, auxiliary) | {"margin": margin}
