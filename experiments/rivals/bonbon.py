"""A rival of bon_helpful that draws nothing in training: BoNBoN on groups of four stored responses.

Claim     It is to end near the law of best-of-4, at .64 nats, with less noise than best_of_n_sft, for the worst of a
          group teaches too; it is to be read beside that one and bon_helpful at equal KL.
Cost      About a minute and a half of two CPU cores in all, after bon_helpful, whose reference and reward model it
          shares; the calibration table is made anew once, with its responses.
Expected  Not yet measured.
Command   make train EXP=rivals/bonbon
"""

from dataclasses import replace

from ctrl_jax.config import Bonbon, Calibration, Experiment
from experiments import bon_helpful


def experiment() -> Experiment:
    return replace(
        bon_helpful.experiment(),
        name="bonbon",
        calibration=Calibration(keep_responses=True),
        policy=Bonbon(
            procedure="best_of_4",
            kl_budget=0.6,
            steps=150,
            prompts_per_step=128,
            samples_per_prompt=4,
            learning_rate=1e-3,
        ),
    )
