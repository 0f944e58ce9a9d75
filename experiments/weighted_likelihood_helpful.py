"""A rival of bon_helpful that draws nothing in training: weighted likelihood of the reference's stored responses.

Claim     The responses that calibrate the reward are enough to fit the policy whose optimum is known in closed form; it
          is to be read beside bon_helpful's at equal KL.
Cost      About a minute of two CPU cores in all, after bon_helpful, whose reference and reward model it shares; the
          calibration table is made anew once, with its responses.
Expected  KL .592 (.587-.597) of .6, best-of-4 win rate .866 (.859-.873); bon_helpful has .872 (.865-.879).
Command   make train EXP=weighted_likelihood_helpful
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, WeightedLikelihood
from experiments import group_projection_helpful


def experiment() -> Experiment:
    base = group_projection_helpful.experiment()
    return replace(base, name="weighted_likelihood_helpful", policy=WeightedLikelihood(**vars(base.policy)))
