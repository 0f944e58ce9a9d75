"""A rival of bon_helpful that draws nothing in training: the raw reward, distilled into the policy's log-ratios.

Claim     Its optimum is that of RLHF on the raw reward, at the same KL as bon_helpful: what calibration and transform
          add is the difference between the two at equal KL.
Cost      About a minute of two CPU cores in all, after bon_helpful, whose reference and reward model it shares; the
          calibration table is made anew once, with its responses.
Expected  In the sweep of rivals: KL .59, best-of-4 win rate .832 (.824-.840).
Command   make train EXP=rivals/reward_distillation
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, RewardDistillation
from experiments import group_projection_helpful


def experiment() -> Experiment:
    base = group_projection_helpful.experiment()
    policy = RewardDistillation(**{**vars(base.policy), "transform": "raw"})
    return replace(base, name="reward_distillation", policy=policy)
