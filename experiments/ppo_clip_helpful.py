"""A rival of bon_helpful: the same reward, transform and KL budget, by PPO-clip with eight updates a batch.

Claim     Several updates a batch trade samples for updates; its policy is to be read beside bon_helpful's at equal KL.
Cost      About six minutes on two CPU cores after bon_helpful, whose stages it shares.
Command   make train EXP=ppo_clip_helpful
"""

from ctrl_jax.config import Experiment, PpoClip


def experiment() -> Experiment:
    return Experiment(
        name="ppo_clip_helpful",
        policy=PpoClip(transform="exponential(10)", procedure="best_of_4", kl_budget=0.6),
    )
