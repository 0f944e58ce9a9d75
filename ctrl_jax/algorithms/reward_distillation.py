"""Reward model distillation: gaps of the implicit reward, β log π/π_ref, are fitted to those of the explicit reward.

    L = E [ log π/π_ref(y) − log π/π_ref(y′) − (r(y) − r(y′)) / β ]²    over the pairs (y, y′) of a group

(Fisch et al. 2024, arXiv 2405.19316, here divided by β², so that one learning rate serves every β). With the raw
reward, as in the paper, its minimum is that of RLHF, ∝ π_ref exp(r / β); with a transform of the calibrated reward in
its place it is that of CTRL. Z cancels, as in group projection. The mean over all pairs is twice the variance within
the group, Σ (d − d̄)² / (N − 1) of d = log π/π_ref − r / β, where `regression`, which knows Z, has the mean square of
d + log Z. Equal rewards are a gap of 0, and teach equal log-ratios.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.stored_responses import Tilted
from ctrl_jax.steps.masked import Mean, masked_mean


@dataclass(frozen=True)
class RewardDistillation(Tilted):
    def of_log_ratios(self, log_ratio: jax.Array, log_weights: jax.Array) -> Mean:
        return masked_mean(2 * jnp.var(log_ratio - log_weights, axis=-1, ddof=1), None)
