"""A rival of bon_helpful that draws nothing in training: BoNBoN on groups of four stored responses.

Claim     It is to end near the law of best-of-4, at .64 nats, with less noise than best_of_n_sft, for the worst of a
          group teaches too; it is to be read beside that one and bon_helpful at equal KL.
Cost      About a minute and a half of two CPU cores in all, after bon_helpful, whose reference and reward model it
          shares; the calibration table is made anew once, with its responses.
Expected  In the sweep of rivals: KL 1.20, best-of-4 win rate .845 (.837-.854).
Command   make train EXP=rivals/bonbon
"""

from dataclasses import replace

from ctrl_jax.config import Bonbon, Experiment
from experiments.rivals import best_of_n_sft


def experiment() -> Experiment:
    base = best_of_n_sft.experiment()
    return replace(base, name="bonbon", policy=Bonbon(**vars(base.policy)))
