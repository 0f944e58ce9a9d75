"""A rival of bon_helpful: robust DPO on the same pairs, from the same reference, for a tenth of flipped labels.

It needs neither a reward model nor samples in training. The reward model of bon_helpful judges it here, as it judges
the others; only the others were trained on it.

Claim     A policy trained without its decoder in mind, to be read beside dpo_helpful at its own KL. The generated pairs
          have no flips beyond those of Bradley-Terry, so that it takes them for surer than they are.
Cost      About that of dpo_helpful: two minutes on two CPU cores after bon_helpful, whose stages it shares.
Expected  In the sweep of rivals at β = 1: KL 1.18, best-of-4 win rate .841 (.833-.849).
Command   make train EXP=rivals/robust_dpo
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, RobustDpo
from experiments import bon_helpful


def experiment() -> Experiment:
    return replace(bon_helpful.experiment(), name="robust_dpo", policy=RobustDpo(procedure="best_of_4", kl_budget=0.6))
