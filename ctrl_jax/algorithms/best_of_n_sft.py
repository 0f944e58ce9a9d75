"""Best-of-N fine-tuning: the likelihood of the best response of each group of N.

    L = −E log π/π_ref(best)

whose gradient is that of the likelihood, −E ∇log π(best), for the reference's part is a constant. This is one iteration
of RAFT (Dong et al. 2023, arXiv 2304.06767), whose groups the reference draws, and the SFT part of BoNBoN (Gui et al.
2024, arXiv 2406.00832). Its minimum is the law of best-of-N itself, at the value −KL(π_N || π_ref). Unlike in CTRL
there is no β and no KL that is asked for: N alone decides. For N = 1 it is the reference.

Ties are broken by lot, as in best-of-N: a group in which all tie counts all of its responses in equal parts, and keeps
the policy at the reference as far as the reward does not decide. Without such groups the minimum would be another law.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.best_of_group import BestOfGroup
from ctrl_jax.steps.masked import Mean, masked_mean


@dataclass(frozen=True)
class BestOfNSft(BestOfGroup):
    def of_extremes(self, log_ratio: jax.Array, best: jax.Array, worst: jax.Array) -> Mean:
        return masked_mean(-jnp.sum(best * log_ratio, axis=-1), None)
