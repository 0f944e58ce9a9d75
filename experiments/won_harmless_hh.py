"""Worst-of-4 on hh-rlhf's red-team conversations, with any chat model: what a best-of-N jailbreak would find.

Claim     A model that is attacked by drawing until something harmful comes loses less when it is trained for the
          worst of four: at one KL, exponential(-5) beats the identity transform in worst-of-4 win rate.
Cost      Sized for one accelerator of 80 GB and a model of 1 to 3 billion parameters; not yet measured there.
Expect    The embedded dialogues' order of the two transforms (won_harmless); a figure is owed until it is measured.
          The budget is .4 nats, as won_harmless_hh_cpu's: at bon_helpful_hh's 4 no β is left to learn at.
Command   hf download Qwen/Qwen2.5-1.5B-Instruct --local-dir models/Qwen2.5-1.5B-Instruct
          make train EXP=won_harmless_hh
          make sweep EXP=won_harmless_hh
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, grid
from experiments import bon_helpful_hh

KL = 0.4


def experiment() -> Experiment:
    helpful = bon_helpful_hh.experiment()
    return replace(
        helpful,
        name="won_harmless_hh",
        data=replace(helpful.data, source="hh_rlhf/harmless-base"),
        policy=replace(helpful.policy, transform="exponential(-5)", procedure="worst_of_4", kl_budget=KL),
    )


def sweep() -> list[Experiment]:
    return grid(experiment(), transforms=("identity", "exponential(-5)"), kl_budgets=(KL,))
