"""Variational best-of-N: the policy is fitted to the law of the best of N samples of the reference.

    L = E_{y ~ π} [ −log F̂(y) / β ] + KL(π || π_ref),    β = 1 / (N − 1)

    F̂(y) = (#{reference rewards < r(y)} + 1) / (K + 1)

which is KL(π || π_ref F̂^(N−1) / Z) less a constant (Amini et al. 2024, arXiv 2407.06057). Its minimum is π ∝ π_ref
F̂^(N−1): without ties and of many references N u^(N−1) in ranks u, of KL log N − (N − 1) / N. Where a share t of the
reference's responses ties at rank F, that has F^(N−1) and best-of-N itself more, ((F + t)^N − F^N) / (N t).

CTRL with Φ = log has the same optimum at this β. It differs in that β is held, so that N and not a budget sets the KL,
and in F̂, which counts ties as losses and never is 0, where CTRL counts them as ½ and clips Φ.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.ctrl import Ctrl
from ctrl_jax.steps import calibration


@dataclass(frozen=True)
class Vbon(Ctrl):
    def rewards(self, raw: jax.Array, calibrated: jax.Array, reference_rewards: jax.Array) -> jax.Array:
        below, _ = calibration.ranks(raw, reference_rewards)
        return jnp.log((below + 1) / (reference_rewards.shape[-1] + 1))
