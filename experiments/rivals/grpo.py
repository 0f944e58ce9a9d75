"""A rival of bon_helpful: GRPO on the raw reward, as most trainers run it, with the KL budget of the others.

Claim     It does not train for best-of-4; at equal KL it is to be near baseline_raw, and below bon_helpful.
Cost      That of bon_helpful, whose stages it shares.
Expected  In the sweep of rivals: KL .58, best-of-4 win rate .831 (.823-.839).
Command   make train EXP=rivals/grpo
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, Grpo
from experiments import bon_helpful


def experiment() -> Experiment:
    return replace(bon_helpful.experiment(), name="grpo", policy=Grpo(procedure="best_of_4", kl_budget=0.6))
