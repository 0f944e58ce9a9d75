"""A rival of bon_helpful that draws nothing in training: the likelihood of the best of four stored responses.

Claim     Its optimum is the law of best-of-4 itself, at .64 nats: near bon_helpful's budget, and of another shape. A
          policy that writes what best-of-4 would pick is not what best-of-4 is best decoded from.
Cost      About a minute and a half of two CPU cores in all, after bon_helpful, whose reference and reward model it
          shares; the calibration table is made anew once, with its responses.
Expected  In the sweep of rivals: KL .66, best-of-4 win rate .793 (.784-.803).
Command   make train EXP=rivals/best_of_n_sft
"""

from dataclasses import replace

from ctrl_jax.config import BestOfNSft, Calibration, Experiment
from experiments import bon_helpful


def experiment() -> Experiment:
    return replace(
        bon_helpful.experiment(),
        name="best_of_n_sft",
        calibration=Calibration(keep_responses=True),
        policy=BestOfNSft(
            procedure="best_of_4",
            kl_budget=0.6,
            steps=150,
            prompts_per_step=128,
            samples_per_prompt=4,
            learning_rate=1e-3,
        ),
    )
