"""BoN-RL: the chance that the best of N samples is a success, for rewards of 0 and 1.

    maximise     V / β − KL(π || π_ref),    V = 1 − p^N,    p = the chance of a failure
    ∇V = N p^(N−1) E_{y ~ π} [ R ∇log π ]

(Chow et al. 2024, arXiv 2412.15287, known here at second hand). The paper draws from best-of-N itself, and multiplies
∇log π of a success by N p^(N−1) / (1 − p^N) and that of a failure by N p / (1 − p): the sum of both is ∇V. Of responses
that are drawn singly, as here, these factors become N p^(N−1) / (1 − p) and N p^N / (1 − p). Beside a baseline only
their difference counts, N p^(N−1): it is the plain gradient, but prompts that N samples solve anyway count less.

Here p^(N−1) is the share of the (N − 1)-subsets of the group's other responses that have no success: without bias,
where a power of the group's p would have one, and finite for p = 1. So the expected gradient is that of pass@N in
k_sample.py; the difference is the baseline, the others' mean, so that failures are pushed down. A success is a response
whose calibrated reward is above a threshold. The optimum is the policy π ∝ π_ref exp(R N p^(N−1) / β) with its own p.

What differs from CTRL: all successes are alike, however good, and all failures.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.algorithms.own_advantage import OwnAdvantage
from ctrl_jax.steps import policy_gradient


@dataclass(frozen=True)
class BonRl(OwnAdvantage):
    success: float = dataclasses.field(kw_only=True)
    """The calibrated reward above which a response is a success."""

    def rewards(self, raw: jax.Array, calibrated: jax.Array, reference_rewards: jax.Array) -> jax.Array:
        return (calibrated > self.success).astype(jnp.float32)

    def advantages(self, rewards: jax.Array) -> jax.Array:
        samples, n = rewards.shape[1], self.procedure.num_samples
        subsets = [math.comb(failures, n - 1) / math.comb(samples - 1, n - 1) for failures in range(samples)]
        failures = jnp.sum(1 - rewards, axis=1, keepdims=True) - (1 - rewards)
        all_fail = jnp.asarray(np.array(subsets, np.float32))[failures.astype(jnp.int32)]
        return n * all_fail * policy_gradient.leave_one_out(rewards)
