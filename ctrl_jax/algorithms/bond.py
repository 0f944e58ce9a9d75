"""BOND: the Jeffreys divergence to the law of the best of N samples of the reference.

    L = w KL(π || π_N) + (1 − w) KL(π_N || π),    π_N = N F̂^(N−1) π_ref,    w = ½

(Sessa et al. 2024, arXiv 2407.14622, equation 11 with their β for w). The first part is vBoN's loss (vbon.py), and so
is F̂; the paper estimates the rank by a mean over references, #{reference rewards ≤ r} / K (equation 10). The minimum of
both parts is vBoN's: π ∝ π_ref F̂^(N−1), the paper's law without its correction for ties.

The second part is maximum likelihood of best-of-N responses. The paper draws these, N of the reference each time. Here
the policy's own responses take their place by their weights π_N / π, less the mean of the prompt's other weights:

    ∇KL(π_N || π) = −E_{y ~ π} [ (π_N / π) ∇log π ],    π_N / π = N F̂^(N−1) π_ref / π

which needs no second sampler, and no longer varies where π = π_N. J-BOND, the paper's iterated form with N = 2 and a
moving average of the policy in place of the reference, is j_bond.py.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ctrl_jax.algorithms.ctrl import Targets
from ctrl_jax.algorithms.vbon import Vbon
from ctrl_jax.steps import kl, policy_gradient
from ctrl_jax.steps.kl_budget import State as Controller
from ctrl_jax.steps.logprobs import Comparison
from ctrl_jax.steps.masked import Mean
from ctrl_jax.types import Experience, Params


@dataclass(frozen=True)
class Bond(Vbon):
    backward: float = dataclasses.field(kw_only=True)
    """w, in [0, 1]: the weight of KL(π || π_N)."""

    def loss(
        self, params: Params, frozen: Params, batch: Experience, targets: Targets, extra: Controller
    ) -> tuple[Mean, Comparison]:
        unpriced = targets._replace(price=jnp.zeros_like(targets.price))
        variational, comparison = super().loss(params, frozen, batch, unpriced, extra)
        lengths = batch.rollouts.responses.lengths
        log_prob = kl.per_sequence(comparison.log_probs, lengths)
        log_ratio = log_prob - kl.per_sequence(comparison.reference_log_probs, lengths)
        # log F̂ / β = (N − 1) log F̂, and N = 1 + 1 / β.
        log_weights = jnp.log1p(1 / extra.beta) + targets.scored.transformed / extra.beta - log_ratio
        weights = policy_gradient.leave_one_out(jax.lax.stop_gradient(jnp.exp(log_weights)))
        pull = (1 - self.backward) * weights + targets.price
        return Mean(self.backward * variational.sum - jnp.sum(pull * log_prob), variational.weight), comparison
