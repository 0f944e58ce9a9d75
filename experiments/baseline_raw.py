"""Baseline for bon_helpful: train with the reward model's raw score, as RLHF does.

Claim     What calibration adds, seen from its absence. No ideal value stands beside it: it is not a function of ranks.
Cost      Four minutes on two CPU cores after bon_helpful, whose stages it shares.
Command   make train EXP=baseline_raw
"""

from dataclasses import replace

from ctrl_jax.config import Experiment
from experiments import bon_helpful


def experiment() -> Experiment:
    base = bon_helpful.experiment()
    return replace(base, name="baseline_raw", policy=replace(base.policy, transform="raw"))
