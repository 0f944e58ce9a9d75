"""Worst-of-4 on hh-rlhf's red-team conversations on two CPU cores: bon_helpful_hh_cpu's model and sizes.

Claim     A real chat model that is attacked by drawing until something harmful comes loses less when it is trained for
          the worst of four: at one KL, exponential(-10) beats the identity transform in worst-of-4 win rate.
Cost      Not yet measured; about bon_helpful_hh_cpu's, with which it shares no stage.
Expect    Not yet measured. The lower end is the easier one: exponential(-10) has twice the effective samples of
          exponential(10) at one KL.
Command   hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
          make train EXP=won_harmless_hh_cpu        make sweep EXP=won_harmless_hh_cpu
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, grid
from experiments import bon_helpful_hh_cpu

BASELINE = "identity with a critic"
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
    points = grid(experiment(), transforms=("identity", "exponential(-5)"), kl_budgets=(KL,))
    return [
        replace(point, policy=replace(point.policy, beta_share=BETA_SHARES[point.policy.transform])) for point in points
    ]
