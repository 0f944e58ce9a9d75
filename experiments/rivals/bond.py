"""A rival of bon_helpful: BOND, the Jeffreys divergence to the law of best-of-4.

Claim     Its optimum is vbon's. The likelihood of best-of-4 responses, which it adds, is to leave out less of that law
          on the way; under best-of-4 it is to be below bon_helpful at equal KL.
Cost      That of bon_helpful, whose stages it shares.
Expected  In the sweep of rivals: KL .60, best-of-4 win rate .791 (.783-.801).
Command   make train EXP=rivals/bond
"""

from dataclasses import replace

from ctrl_jax.config import Bond, Experiment
from experiments import bon_helpful


def experiment() -> Experiment:
    return replace(bon_helpful.experiment(), name="bond", policy=Bond(procedure="best_of_4", kl_budget=0.6))
