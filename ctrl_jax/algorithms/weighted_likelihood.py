"""Weighted likelihood of the reference's responses, with a control variate.

    L = E [ w log(w / ρ) − w + ρ ],    ρ = π/π_ref,    w = exp(Φ(û) / β) / Z

Its value is an estimate of KL(π* || π) that is never negative, and its gradient is −Σ (w − ρ) ∇log π. The first part is
the gradient of the likelihood under π* = w π_ref. The second is 0 in expectation for any policy, E_ref [ρ ∇log π] =
E_π [∇log π] = 0, and takes off most of the variance: all of it at π*, where w = ρ. In the first step, where π = π_ref,
it is Σ (w − 1) ∇log π; a constant 1 would later push away from the reference without an end.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.stored_responses import Tilted
from ctrl_jax.steps.masked import Mean, masked_mean


@dataclass(frozen=True)
class WeightedLikelihood(Tilted):
    def of_log_ratios(self, log_ratio: jax.Array, log_weights: jax.Array) -> Mean:
        weights = jnp.exp(log_weights)
        return masked_mean(weights * (log_weights - log_ratio) - weights + jnp.exp(log_ratio), None)
