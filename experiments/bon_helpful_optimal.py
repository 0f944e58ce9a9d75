"""Train for best-of-4 with its own optimal transform Φ*, from automatic differentiation of the procedure.

Claim     Φ* allows the highest best-of-4 win rate at the KL budget; exponential(10) is within a point of it in theory.
Cost      Four minutes on two CPU cores after bon_helpful, whose stages it shares.
Command   make train EXP=bon_helpful_optimal
"""

from dataclasses import replace

from ctrl_jax.config import Experiment
from experiments import bon_helpful


def experiment() -> Experiment:
    base = bon_helpful.experiment()
    return replace(base, name="bon_helpful_optimal", policy=replace(base.policy, transform="optimal"))
