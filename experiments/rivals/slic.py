"""A rival of bon_helpful: sequence likelihood calibration on the same pairs, from the same reference.

SLiC needs neither a reward model nor samples in training, and no reference in its loss. The reward model of bon_helpful
judges it here, as it judges the others; only the others were trained on it.

Claim     A policy trained without its decoder in mind, to compare at its KL with the ideal policies in the report.
Cost      About that of dpo_helpful: two minutes on two CPU cores after bon_helpful, whose stages it shares.
Expected  In the sweep of rivals at a margin of 1: KL .72, best-of-4 win rate .702 (.691-.712).
Command   make train EXP=rivals/slic
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, Slic
from experiments import bon_helpful


def experiment() -> Experiment:
    return replace(bon_helpful.experiment(), name="slic", policy=Slic(procedure="best_of_4", kl_budget=0.6))
