"""A rival of bon_helpful: the expected raw reward of the best of 4 samples, by leave-one-out advantages.

Claim     It trains for best-of-4 too, without ranks or a transform; it is to be read beside bon_helpful at equal KL,
          and shows what calibration and Φ add to knowing the procedure.
Cost      That of bon_helpful, whose stages it shares.
Expected  In the sweep of rivals: KL .60, best-of-4 win rate .870 (.864-.877).
Command   make train EXP=rivals/k_sample
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, KSample
from experiments import bon_helpful


def experiment() -> Experiment:
    return replace(bon_helpful.experiment(), name="k_sample", policy=KSample(procedure="best_of_4", kl_budget=0.6))
