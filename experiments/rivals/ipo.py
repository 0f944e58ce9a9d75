"""A rival of bon_helpful: identity preference optimisation on the same pairs, from the same reference.

IPO needs neither a reward model nor samples in training. The reward model of bon_helpful judges it here, as it judges
the others; only the others were trained on it.

Claim     Of pairs of the reference's own responses, ranked without noise, its optimum is that of CTRL with the
          identity. These pairs are of the data and noisy; it is to be read at its own KL beside the ideal identity.
Cost      About that of dpo_helpful: two minutes on two CPU cores after bon_helpful, whose stages it shares.
Expected  In the sweep of rivals at β = .15: KL .68, best-of-4 win rate .790 (.780-.799).
Command   make train EXP=rivals/ipo
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, Ipo
from experiments import bon_helpful


def experiment() -> Experiment:
    return replace(bon_helpful.experiment(), name="ipo", policy=Ipo(procedure="best_of_4", kl_budget=0.6))
