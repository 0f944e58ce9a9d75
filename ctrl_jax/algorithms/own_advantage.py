"""What algorithms share whose advantage is more than a reward less the mean of the others': the β to start with.

Where an objective V is no expectation of a reward, its advantages E[A ∇log π(y)] = ∇V change with the policy, and no
ideal policy says which β ends at a KL budget.
"""

import abc
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.ctrl import Ctrl
from ctrl_jax.steps import calibration
from ctrl_jax.theory.objective import Objective, empirical_beta

ROWS = 256
"""Prompts that the first β is computed from, at most: the controller trims it anyway."""
COMPARED = 2**26
"""Pairs of reference responses that are compared for it, at most: 256 MB in float32."""


def some_of(reference_rewards: Any) -> jax.Array:
    """Rows of [B, K], as many as there is room for to compare all responses of a prompt with one another."""
    rows = max(1, min(ROWS, COMPARED // reference_rewards.shape[1] ** 2))
    return jnp.asarray(reference_rewards[:: -(-len(reference_rewards) // rows)])


@dataclass(frozen=True)
class OwnAdvantage(Ctrl):
    """CTRL with advantages of its own, and the same exact KL, budget and controller."""

    @abc.abstractmethod
    def advantages(self, rewards: jax.Array) -> jax.Array:
        """[B, N] of `rewards` [B, N], for any N that the algorithm can learn from."""

    def first_beta(self, objective: Objective, num_references: int, reference_rewards: Any) -> float:
        """The β at which the reference's responses, tilted by exp(A / β), have the KL budget.

        A is what they have as a group of their own, so that this is the slope of V at the reference: right for small
        budgets, and a start for the controller otherwise.
        """
        raw = some_of(reference_rewards)
        calibrated = calibration.calibrate_sorted(raw, raw)
        return empirical_beta(self.advantages(self.rewards(raw, calibrated, raw)), objective.kl_budget)
