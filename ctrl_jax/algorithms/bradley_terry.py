"""A reward model by the likelihood of preferences: P(chosen over rejected) = σ(r(chosen) − r(rejected)).

Bradley and Terry 1952; for language models Stiennon et al. 2020, arXiv 2009.01325, equation 1.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from ctrl_jax.algorithms.protocol import GRADIENT, Algorithm, Source, loss_in
from ctrl_jax.steps import preference
from ctrl_jax.steps.masked import Mean, StandardError
from ctrl_jax.types import Metric, Params, PreferencePairs, RewardApply


@dataclass(frozen=True)
class BradleyTerry(Algorithm):
    reward: RewardApply

    source = Source.PREFERENCES
    metrics: ClassVar[tuple[Metric, ...]] = (
        loss_in("nats per pair", shown=True),
        GRADIENT,
        Metric("accuracy", "share of pairs", shown=True),
    )

    def loss(
        self, params: Params, frozen: Params, batch: PreferencePairs, targets: Any, extra: None
    ) -> tuple[Mean, jax.Array]:
        rewards = self.reward(params, batch.prompts, batch.responses)
        return preference.bradley_terry(rewards[:, 0], rewards[:, 1]), rewards

    def measure(self, batch: PreferencePairs, targets: Any, auxiliary: jax.Array) -> dict[str, Mean | StandardError]:
        return {"accuracy": preference.accuracy(auxiliary[:, 0], auxiliary[:, 1])}
