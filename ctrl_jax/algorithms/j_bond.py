"""J-BOND without its moving average: the policy climbs towards the best of two samples of itself.

    A = (1 − w) 2 C + w r_J,    C = the chance to beat another response of the group, ties counting ½,
                                r_J = −log 16 where both of two others are better, else 0,    w = ½

J-BOND (Sessa et al. 2024, arXiv 2407.14622, algorithm 2 and equation 17) takes, at every step, the Jeffreys divergence
to the best of two samples of an anchor: maximum likelihood of the better of two anchor responses, and a policy gradient
on r_J less the KL to the anchor. Its anchor is a moving average of the policy's parameters that follows by η = .02 a
step. That needs a second copy of the parameters and responses of it. Here the anchor is the policy itself (η = 1), and
the group's other responses are the anchor's, in all pairs of them: the likelihood of the better of two becomes 2 C, and
the KL to the anchor is 0.

What differs from CTRL: C ranks a response within its group, not among the reference's, so that A goes on asking for
better ones however good the policy is. There is no V that A climbs. J-BOND itself ends when it is stopped, as its KL to
the reference grows with the steps. Here, so that it can be compared at equal KL, the exact KL to the reference is
subtracted as in CTRL, with the controller's β; the policy comes to rest at π ∝ π_ref exp(Ψ / β), with Ψ = (1 − w) 2 C −
w log 16 P², where C and P, the chance that another is better, are those of its own responses.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.algorithms.own_advantage import OwnAdvantage, some_of
from ctrl_jax.theory.objective import Objective, check_reachable

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True)
class JBond(OwnAdvantage):
    backward: float = dataclasses.field(kw_only=True)
    """w, in [0, 1]: the weight of the policy gradient on r_J, beside that of the likelihood."""

    def advantages(self, rewards: jax.Array) -> jax.Array:
        others = rewards.shape[1] - 1
        better = jnp.sum(rewards[:, None, :] > rewards[:, :, None], axis=-1)
        worse = jnp.sum(rewards[:, None, :] < rewards[:, :, None], axis=-1)
        both_better = better * (better - 1) / (others * (others - 1))
        # Each less its mean where nothing ties, 1 and −log 16 / 3: constants, and so no bias.
        likelihood = (worse - better) / others
        penalty = math.log(16) * (1 / 3 - both_better)
        return (1 - self.backward) * likelihood + self.backward * penalty

    def first_beta(self, objective: Objective, num_references: int, reference_rewards: Any) -> float:
        """The β whose policy comes to rest at the KL budget, for rewards without ties.

        There p(u) = c exp(Ψ(F(u)) / β) on the ranks u among the reference's, with the policy's own CDF F. In f = F(u),
        du = df / p says c = ∫ exp(−Ψ(f) / β) df, and so KL = ∫ log p df = ∫ Ψ(f) / β df + log c, which falls with β.

        Raises:
          InputError: if so many reference responses share the highest reward that no policy has the budget.
        """
        check_reachable(some_of(reference_rewards), objective.kl_budget)
        own_rank = (1 + _POINTS) / 2
        psi = (1 - self.backward) * 2 * own_rank - self.backward * math.log(16) * (1 - own_rank) ** 2

        def kl(beta: float) -> float:
            return float(_WEIGHTS @ psi / 2 / beta + np.log(_WEIGHTS @ np.exp(-psi / beta) / 2))

        low, high = 1e-3, 1e3
        while high / low > 1 + 1e-6:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if kl(middle) > objective.kl_budget else (low, middle)
        return high
