"""bon_helpful with a start: group projection on the stored responses to half the KL budget, and CTRL from there.

Claim     Responses that calibration has paid for replace some of those that training would draw: half the steps of
          bon_helpful reach its win rate at its KL.
Cost      A minute and a half of two CPU cores after bon_helpful, whose reference and reward model it
          shares; the calibration table is made anew once, with its responses.
Expected  KL .594 (.589-.598), best-of-4 win rate .870 (.862-.877); bon_helpful has .872 (.865-.879) at .605.
Command   make train EXP=start_helpful
"""

from ctrl_jax.config import Calibration, Experiment, GroupProjection, Policy


def experiment() -> Experiment:
    return Experiment(
        name="start_helpful",
        calibration=Calibration(keep_responses=True),
        start=GroupProjection(
            transform="exponential(10)", procedure="best_of_4", kl_budget=0.3, steps=100, learning_rate=1e-3
        ),
        policy=Policy(transform="exponential(10)", procedure="best_of_4", kl_budget=0.6, steps=75),
    )
