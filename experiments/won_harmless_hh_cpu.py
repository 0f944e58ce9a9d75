"""Worst-of-4 on hh-rlhf's red-team conversations on two CPU cores: bon_helpful_hh_cpu's model and sizes.

Claim     A real chat model that is attacked by drawing until something harmful comes loses less when it is trained for
          the worst of four: at one KL, exponential(-5) beats the identity transform in worst-of-4 win rate.
Cost      21 minutes of two cores for the reward model and the calibration, which the points share, 7 for the
          reference's evaluation, and 30 for a point and its evaluation, with other work beside it all. 270 MB to
          download.
Expect    On 192 test prompts of a local copy with 2,000 rows, by a linear reward that is right on .624 of 194 pairs:
          the identity .708 (.683-.731) at KL .40, 59 % of the ideal lift, exponential(-5) .720 (.693-.747) at .52,
          31 % above its budget, 49 %. The claim is not shown: on the same prompts the two differ by .011
          (-.015 to .037), at KLs that differ by .12.
Command   hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
          make train EXP=won_harmless_hh_cpu        make sweep EXP=won_harmless_hh_cpu
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, grid
from experiments import bon_helpful_hh_cpu

BETA_SHARES = {"identity": 0.6, "exponential(-5)": 0.5}
"""What a policy of this size learns of a transformed reward, about as on bon_helpful_hh_cpu."""
KL = 0.4
"""Less than for best-of-4: to be rid of the worst quarter takes log(4/3) = .29 nats, to keep the best one 1.39. And the
further, the flatter the end of the ranks where exponential(-5) still knows responses apart: at 1.4 nats its β is
.007."""


def experiment() -> Experiment:
    helpful = bon_helpful_hh_cpu.experiment()
    policy = replace(
        helpful.policy,
        transform="exponential(-5)",
        procedure="worst_of_4",
        kl_budget=KL,
        beta_share=BETA_SHARES["exponential(-5)"],
        steps=40,
    )
    data = replace(helpful.data, source="hh_rlhf/harmless-base")
    return replace(helpful, name="won_harmless_hh_cpu", data=data, policy=policy)


def sweep() -> list[Experiment]:
    points = grid(experiment(), transforms=tuple(BETA_SHARES), kl_budgets=(KL,))
    return bon_helpful_hh_cpu.with_shares(points, BETA_SHARES)
