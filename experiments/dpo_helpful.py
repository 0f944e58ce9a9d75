"""A rival of bon_helpful: direct preference optimisation on the same pairs, from the same reference.

DPO needs neither a reward model nor samples in training. The reward model of bon_helpful judges it here, as it judges
the others; only the others were trained on it.

Claim     A policy trained without its decoder in mind, to compare at its KL with the ideal policies in the report.
Expect    β = 1 ends near .65 nats. No budget is kept: at .1, the paper's and the option's default, it ran to 6.2, where
          the reward model likes it more and gold less (docs/rivals.md).
Cost      About two minutes on two CPU cores after bon_helpful, whose reference and reward model it shares.
Command   make train EXP=dpo_helpful
"""

from ctrl_jax.config import Dpo, Experiment


def experiment() -> Experiment:
    return Experiment(name="dpo_helpful", policy=Dpo(procedure="best_of_4", kl_budget=0.6, beta=1.0))
