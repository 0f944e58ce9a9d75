"""A rival of bon_helpful that draws nothing in training: regression (QRPO) on the reference's stored responses.

Claim     The responses that calibrate the reward are enough to fit the policy whose optimum is known in closed form; it
          is to be read beside bon_helpful's at equal KL.
Cost      About a minute of two CPU cores in all, after bon_helpful, whose reference and reward model it shares; the
          calibration table is made anew once, with its responses.
Expected  KL .635 (.630-.642) of .6, best-of-4 win rate .875 (.868-.882); bon_helpful has .872 (.865-.879) at .605.
Command   make train EXP=regression_helpful
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, Regression
from experiments import group_projection_helpful


def experiment() -> Experiment:
    base = group_projection_helpful.experiment()
    return replace(base, name="regression_helpful", policy=Regression(**vars(base.policy)))
