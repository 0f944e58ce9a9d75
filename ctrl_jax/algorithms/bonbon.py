"""BoNBoN: the likelihood of a group's best response, and IPO on its best and its worst.

    L = E [ −α log π/π_ref(best) + (1 − α) (h − 1 / (2β_N))² ],    h = log π/π_ref(best) − log π/π_ref(worst)
    1 / (2β_N) = (N − 1) (1 + 1/2 + ... + 1/(N − 1))

(Gui et al. 2024, arXiv 2406.00832, with their α = .005). The constant is the mean of h at the law of best-of-N, whose
log-ratio is (N − 1) log u + log N; it is so for every u of the best. The first part alone (α = 1) is least at that law.
The second alone (α = 0) is not: as h moves with the worst response too, it is least at a law that is only similar. Of
N = 2 it is IPO's, ∝ π_ref exp(2u), with a KL of .152 nats against best-of-2's .193; of N = 4 its KL is .85 against .64,
of N = 8 .88 against 1.20 (solved on a grid of ranks without ties).

Where several responses tie for the best or the worst, h counts for all pairs of them in equal parts. A group in which
all tie says nothing of h, and the second part of it is 0. For N = 1 all is the reference.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.best_of_group import BestOfGroup
from ctrl_jax.steps.masked import Mean, masked_mean


@dataclass(frozen=True)
class Bonbon(BestOfGroup):
    alpha: float = dataclasses.field(kw_only=True)
    """α, the weight of the best response's likelihood."""

    def of_extremes(self, log_ratio: jax.Array, best: jax.Array, worst: jax.Array) -> Mean:
        gaps = log_ratio[:, :, None] - log_ratio[:, None, :]
        contrast = jnp.sum(best[:, :, None] * worst[:, None, :] * (gaps - margin(best.shape[1])) ** 2, axis=(1, 2))
        ranked = jnp.sum(best * worst, axis=-1) == 0
        likelihood = jnp.sum(best * log_ratio, axis=-1)
        return masked_mean(jnp.where(ranked, (1 - self.alpha) * contrast, 0) - self.alpha * likelihood, None)


def margin(n: int) -> float:
    """1 / (2β_N): the mean of log π_N/π_ref(best) − log π_N/π_ref(worst) over groups of N without ties, nats."""
    return (n - 1) * sum(1 / k for k in range(1, n))
