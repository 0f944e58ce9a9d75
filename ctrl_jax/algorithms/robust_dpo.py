"""Robust DPO: DPO's loss of the true preferences, without bias, where a share ε of the labels is flipped by chance.

    L = E [ (1 − ε) ℓ(h) − ε ℓ(−h) ] / (1 − 2ε),    ℓ(h) = −log σ(β h)

(Chowdhury, Kini and Natarajan 2024, arXiv 2403.00409), h the margin log π/π_ref(chosen) − log π/π_ref(rejected). As
ℓ(−h) = ℓ(h) + β h, it is ℓ(h) − ε / (1 − 2ε) β h. Its mean over the flips of a label is ℓ of the true one, so that the
minimum is DPO's of the true preferences, ∝ π_ref exp(r / β). Beware: of pairs that are each there once, in one order,
the loss has no lower bound, and `steps` alone limits the training.
"""

import dataclasses
from dataclasses import dataclass

import jax

from ctrl_jax.algorithms.dpo import Dpo
from ctrl_jax.algorithms.preference_pairs import Pairs
from ctrl_jax.steps.masked import Mean, masked_mean


@dataclass(frozen=True)
class RobustDpo(Dpo):
    flip_probability: float = dataclasses.field(kw_only=True)
    """ε in [0, ½): the share of labels that are the wrong way round."""

    def of_pairs(self, pairs: Pairs) -> Mean:
        margin = self.beta * pairs.margin
        excess = self.flip_probability / (1 - 2 * self.flip_probability)
        return masked_mean(jax.nn.softplus(-margin) - excess * margin, None)
