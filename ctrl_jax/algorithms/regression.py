"""Regression of the policy's log-ratio on that of the target.

    L = E (Φ(û) / β − log Z − log π/π_ref)²

(QRPO, Matrenok et al. 2025, arXiv 2507.08068, here divided by β², so that one learning rate serves every transform; of
any Φ: the identity, the logarithm, exponentials). Z is known, so that each response counts by itself, without a group:
its gradient is −2 (log w − log π/π_ref) ∇log π. The many responses that the target avoids count as much as the few that
it favours.
"""

from dataclasses import dataclass

import jax

from ctrl_jax.algorithms.stored_responses import Tilted
from ctrl_jax.steps.masked import Mean, masked_mean


@dataclass(frozen=True)
class Regression(Tilted):
    def of_log_ratios(self, log_ratio: jax.Array, log_weights: jax.Array) -> Mean:
        return masked_mean((log_weights - log_ratio) ** 2, None)
