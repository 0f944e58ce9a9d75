"""Group projection: within a group of stored responses, the policy's shares are fitted to those of the target.

    L = E KL(q || p),    q = softmax(Φ(û) / β),    p = softmax(log π/π_ref)    over a group of N responses

whose gradient is Σ (p − q) ∇log π: zero where π = π*, on every group, so that it stops by itself at the KL that was
asked for. Z cancels, and with it any error of it; but a group says nothing of the probability of all its responses
together, so groups should not be small. Relatives: InfoNCA (Chen et al. 2024, arXiv 2402.05369); EXO (Ji et al. 2024,
arXiv 2402.00856), which takes KL(p || q); TPO (arXiv 2604.06159), on the policy's own responses.
"""

from dataclasses import dataclass

import jax

from ctrl_jax.algorithms.stored_responses import Tilted, divergence
from ctrl_jax.steps.masked import Mean, masked_mean


@dataclass(frozen=True)
class GroupProjection(Tilted):
    def of_log_ratios(self, log_ratio: jax.Array, log_weights: jax.Array) -> Mean:
        return masked_mean(divergence(log_weights, log_ratio), None)
