"""The win rate under the procedure itself as the objective: what a response changes in its unbiased estimate.

    maximise     W / β − KL(π || π_ref),    W = the chance that the procedure's pick of n samples of π beats its pick of
                 n samples of the reference, ties counting ½
    A_i = N ( Ŵ − Ŵ without response i )

Ŵ is the estimate of W from the prompt's group of N responses and its K reference rewards (steps/win_rate.py), a mean
over all subsets of n. It is unbiased, and without response i it is a baseline, so that E[A ∇log π] = ∇W without bias. A
is the functional derivative δW/δπ at the group's empirical law: with w and w' the weights of the order statistics of N
and of N − 1 responses under the procedure, and h the chance of each to beat the reference's pick, A_i = N Σ_b (w_b −
w'_b) h_(b), w'_b counted without i. It is f of a group less f without one of them (Tang et al. 2025, arXiv 2503.19595)
for f = Ŵ. For n = 1 it is CTRL with Φ = identity.

What differs from CTRL: the optimum is that of Φ*, the optimal transform, which is the derivative δW/δp at the ideal
policy of the budget (InfAlign, Balashankar et al. 2024, arXiv 2412.19792); CTRL computes it once from theory, for
rewards without ties. Here it is taken at the policy as it is, ties included, at the cost of the group's noise.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.algorithms.ctrl import Ctrl
from ctrl_jax.steps import win_rate
from ctrl_jax.theory.objective import Objective
from ctrl_jax.theory.optimal import optimal_transform


@dataclass(frozen=True)
class FunctionalDerivative(Ctrl):
    def rewards(self, raw: jax.Array, calibrated: jax.Array, reference_rewards: jax.Array) -> jax.Array:
        """h: [B, N] how often each response beats the procedure's pick from the reference's."""
        return win_rate.wins_against_pick(raw, reference_rewards, self.procedure)

    def advantages(self, rewards: jax.Array) -> jax.Array:
        samples = rewards.shape[1]
        whole, without = (self.procedure.order_weights(size) for size in (samples, samples - 1))
        change = np.stack([whole - np.insert(without, place, 0.0) for place in range(samples)])
        by_place = samples * jnp.sum(jnp.sort(rewards, axis=-1)[:, None, :] * jnp.asarray(change)[None], axis=-1)
        # A response's place in the order; of equal ones any will do.
        places = jnp.argsort(jnp.argsort(rewards, axis=-1), axis=-1)
        return jnp.take_along_axis(by_place, places, axis=-1)

    def first_beta(self, objective: Objective, num_references: int, reference_rewards: Any) -> float:
        """The β of the ideal policy of Φ*, in win rate per nat."""
        return optimal_transform(self.procedure, kl=objective.kl_budget).policy.beta
