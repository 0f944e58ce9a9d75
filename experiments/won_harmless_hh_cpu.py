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


def experiment() -> Experiment:
    helpful = bon_helpful_hh_cpu.experiment()
    return replace(
        helpful,
        name="won_harmless_hh_cpu",
        data=replace(helpful.data, source="hh_rlhf/harmless-base"),
        policy=replace(helpful.policy, transform="exponential(-10)", procedure="worst_of_4"),
    )


def sweep() -> list[Experiment]:
    return grid(experiment(), transforms=("identity", "exponential(-10)"), kl_budgets=(1.4,))
