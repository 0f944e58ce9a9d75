"""Baseline for bon_helpful: train with the calibrated reward itself, which is the win rate of one sample (online IPO).

Claim     The highest win rate of one sample at the KL budget. It is what best-of-4 training is compared with.
Cost      Four minutes on two CPU cores after bon_helpful, whose stages it shares.
Expected  KL .59, best-of-4 win rate .81 (.80-.82); under sampling .78.
Command   make train EXP=baseline_identity
"""

from dataclasses import replace

from ctrl_jax.config import Experiment
from experiments import bon_helpful


def experiment() -> Experiment:
    base = bon_helpful.experiment()
    return replace(base, name="baseline_identity", policy=replace(base.policy, transform="identity"))
