"""A rival of bon_helpful: BoN-RL, the chance that one of 4 samples is above three quarters of the reference's.

Claim     It trains for best-of-4 too, but only for passing a threshold; it is to fall behind bon_helpful at equal KL,
          for beyond the threshold nothing is better.
Cost      That of bon_helpful, whose stages it shares.
Expected  In the sweep of rivals: KL .55, best-of-4 win rate .821 (.812-.829).
Command   make train EXP=rivals/bon_rl
"""

from dataclasses import replace

from ctrl_jax.config import BonRl, Experiment
from experiments import bon_helpful


def experiment() -> Experiment:
    return replace(bon_helpful.experiment(), name="bon_rl", policy=BonRl(procedure="best_of_4", kl_budget=0.6))
