"""A rival of bon_helpful that draws nothing in training: weighted likelihood of the reference's stored responses.

Claim     The responses that calibrate the reward are enough to fit the policy whose optimum is known in closed form; it
          is to be read beside bon_helpful's at equal KL.
Cost      A fraction of bon_helpful's training, after bon_helpful, whose reference and reward model it shares; the
          calibration table is made anew once, with its responses.
Command   make train EXP=weighted_likelihood_helpful
"""

from ctrl_jax.config import Calibration, Experiment, WeightedLikelihood


def experiment() -> Experiment:
    return Experiment(
        name="weighted_likelihood_helpful",
        calibration=Calibration(keep_responses=True),
        policy=WeightedLikelihood(
            transform="exponential(10)",
            procedure="best_of_4",
            kl_budget=0.6,
            steps=150,
            prompts_per_step=32,
            learning_rate=1e-3,
        ),
    )
