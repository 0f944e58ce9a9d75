"""An ensemble of reward models on one trunk, each by the likelihood of its own bootstrap sample of the preferences.

    L = Σ_i Σ_m w_im softplus(−(r_m(chosen_i) − r_m(rejected_i))) / Σ_i Σ_m w_im,    w_im ~ Poisson(1)

as in bradley_terry.py for each member; the accuracy is that of their mean. The heads start alike, at 0: what tells the
members apart is their pairs.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from ctrl_jax.algorithms.bradley_terry import BradleyTerry
from ctrl_jax.algorithms.protocol import Algorithm, Source
from ctrl_jax.steps import ensemble, preference
from ctrl_jax.steps.masked import Mean, StandardError
from ctrl_jax.types import Metric, Params, PreferencePairs, RewardApply


@dataclass(frozen=True)
class BradleyTerryEnsemble(Algorithm):
    reward: RewardApply
    """To [B, 2, M]."""
    members: int
    seed: int
    """Of the bootstrap samples."""

    source = Source.PREFERENCES
    metrics: ClassVar[tuple[Metric, ...]] = BradleyTerry.metrics

    def targets(self, batch: PreferencePairs) -> jax.Array:
        return ensemble.bootstrap_weights(batch.prompts.ids, jax.random.key(self.seed), self.members)

    def loss(
        self, params: Params, frozen: Params, batch: PreferencePairs, targets: jax.Array, extra: None
    ) -> tuple[Mean, jax.Array]:
        rewards = self.reward(params, batch.prompts, batch.responses)
        return preference.weighted_bradley_terry(rewards[:, 0], rewards[:, 1], targets), rewards

    def measure(self, batch: PreferencePairs, targets: Any, auxiliary: jax.Array) -> dict[str, Mean | StandardError]:
        rewards = ensemble.mean(auxiliary)
        return {"accuracy": preference.accuracy(rewards[:, 0], rewards[:, 1])}
