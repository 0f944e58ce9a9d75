"""Baseline for bon_helpful: train with the logarithm of the calibrated reward (best-of-N distillation, vBoN).

Claim     Close to the identity's win rates under sampling and best-of-4, and better under worst-of-N.
Cost      Four minutes on two CPU cores after bon_helpful, whose stages it shares.
Command   make train EXP=baseline_logarithm
"""

from dataclasses import replace

from ctrl_jax.config import Experiment
from experiments import bon_helpful


def experiment() -> Experiment:
    base = bon_helpful.experiment()
    return replace(base, name="baseline_logarithm", policy=replace(base.policy, transform="logarithm"))
