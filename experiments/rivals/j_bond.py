"""A rival of bon_helpful: J-BOND with the policy as its own anchor, under the KL budget.

Claim     It climbs towards the best of two of its own samples, whatever decodes it; at equal KL it is to be near
          baseline_identity, and below bon_helpful under best-of-4.
Cost      That of bon_helpful, whose stages it shares.
Expected  In the sweep of rivals: KL .60, best-of-4 win rate .851 (.843-.859).
Command   make train EXP=rivals/j_bond
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, JBond
from experiments import bon_helpful


def experiment() -> Experiment:
    return replace(bon_helpful.experiment(), name="j_bond", policy=JBond(procedure="best_of_4", kl_budget=0.6))
