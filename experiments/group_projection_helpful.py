"""A rival of bon_helpful that draws nothing in training: group projection on the reference's stored responses.

Claim     The responses that calibrate the reward are enough to fit the policy whose optimum is known in closed form; it
          is to be read beside bon_helpful's at equal KL.
Cost      About a minute of two CPU cores in all, after bon_helpful, whose reference and reward model it shares; the
          calibration table is made anew once, with its responses.
Expected  KL .598 (.593-.602) of .6, best-of-4 win rate .870 (.863-.877); bon_helpful has .872 (.865-.879).
Command   make train EXP=group_projection_helpful
"""

from ctrl_jax.config import Calibration, Experiment, GroupProjection


def experiment() -> Experiment:
    return Experiment(
        name="group_projection_helpful",
        calibration=Calibration(keep_responses=True),
        policy=GroupProjection(
            transform="exponential(10)",
            procedure="best_of_4",
            kl_budget=0.6,
            steps=150,
            prompts_per_step=32,
            learning_rate=1e-3,
        ),
    )
