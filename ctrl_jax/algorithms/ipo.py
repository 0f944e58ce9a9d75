"""Identity preference optimisation: the margin of a pair is fitted to a constant.

    L = E (h − 1 / (2β))²,    h = log π/π_ref(chosen) − log π/π_ref(rejected)

(Azar et al. 2023, arXiv 2310.12036, whose τ is β here). No model of preferences is assumed. Of pairs whose responses
are both drawn from a law μ, its minimum is the policy ∝ π_ref exp(p(y ≻ μ) / β), where p(y ≻ μ) is how often y is
preferred to a response of μ. So where μ is the reference and the higher reward is preferred (of equal ones either, as
often), p(y ≻ μ) is the calibrated reward C(y), and the minimum that of CTRL with the identity, at the same β. Unlike in
DPO, the margin of responses of which one is always preferred stays finite.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ctrl_jax.algorithms.preference_pairs import FromPairs, Pairs
from ctrl_jax.steps.masked import Mean, StandardError, masked_mean
from ctrl_jax.types import Metric, PreferencePairs


@dataclass(frozen=True)
class Ipo(FromPairs):
    beta: float
    """The weight of the KL, in probabilities of being preferred per nat."""

    metrics: ClassVar[tuple[Metric, ...]] = (*FromPairs.metrics, Metric("margin", "nats per pair", shown=True))

    def of_pairs(self, pairs: Pairs) -> Mean:
        return masked_mean((pairs.margin - 1 / (2 * self.beta)) ** 2, None)

    def measure(self, batch: PreferencePairs, targets: Any, auxiliary: Pairs) -> dict[str, Mean | StandardError]:
        return super().measure(batch, targets, auxiliary) | {"margin": masked_mean(auxiliary.margin, None)}
