"""The best of k samples, as an objective of its own: a response earns what it adds to the best of k.

    maximise     V / β − KL(π || π_ref),    V = E_{y_1, ..., y_k ~ π} [ max(R_1, ..., R_k) ]

    A_i = k · mean over the sets S of k − 1 other responses of its group of [ max(R_i, R_S) − max R_S ]

(Tang et al. 2025, arXiv 2503.19595: f of k samples less f without one of them, here for f = max and averaged over all
k-subsets of the group's N). max R_S does not depend on y_i, so that it is a baseline, and E[A ∇log π] = ∇V. Where R is
0 or 1, V is pass@k. The optimum is the policy π ∝ π_ref exp(Ψ / β) with Ψ(y) = k E max(R(y), R_S) of its own.

What differs from CTRL: no theory chooses Φ for the procedure; the group itself says what a response is worth beside the
others. A is never negative and 0 for the group's k − 1 lowest, so that it has more variance than a reward less a mean;
to subtract the group's mean of A would be biased. The reference's rewards are not used unless Φ calibrates by them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.own_advantage import OwnAdvantage
from ctrl_jax.theory.procedures import BestOfN


@dataclass(frozen=True)
class KSample(OwnAdvantage):
    def advantages(self, rewards: jax.Array) -> jax.Array:
        samples, k = rewards.shape[1], self.procedure.num_samples
        # The chance of each place in the order to have the highest of the k − 1. Only places below y_i count, which are
        # the same among the others; the highest of all is below none.
        chances = jnp.asarray([*BestOfN(k - 1).order_weights(samples - 1), 0.0])
        ascending = jnp.sort(rewards, axis=-1)
        gains = jnp.maximum(rewards[:, :, None] - ascending[:, None, :], 0.0)
        return k * jnp.sum(gains * chances[None, None, :], axis=-1)
