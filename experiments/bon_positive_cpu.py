"""Best-of-4 for friendly answers to people who chat, on two CPU cores: data and reward come from packages.

SmolLM2-135M-Instruct, or any model directory (`--model.path`), answers conversations of the chitchat corpus; the reward
is VADER's sentiment of the answer, which any language model can steer and nobody has to train.

Claim     At one KL, exponential(10) beats the identity transform in best-of-4 win rate, on a reward without noise.
Cost      An hour of two cores a point, less what the points share: calibration and the reference's evaluation, 25
          minutes on a machine that had other work. 270 MB of a model to download, no data.
Expect    exponential(10), measured once: best-of-4 win rate .678 (.661-.694) at KL .231 (.224-.239), 62 % of the ideal
          lift at that KL, on 192 test prompts; one sample .607 (.597-.617). The KL came to rest below its budget of .5,
          and 32 steps are too few to lower β as far as that takes. The identity's point is not measured yet. More in
          docs/real_models.md.
Command   make setup EXTRA=chitchat,sentiment
          hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
          make train EXP=bon_positive_cpu        make sweep EXP=bon_positive_cpu
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, RewardModel, grid
from experiments import bon_helpful_hh_cpu


def experiment() -> Experiment:
    helpful = bon_helpful_hh_cpu.experiment()
    return replace(
        helpful,
        name="bon_positive_cpu",
        data=replace(helpful.data, source="chitchat"),
        reward_model=RewardModel(function="experiments.rewards.sentiment:compound"),
    )


def sweep() -> list[Experiment]:
    return grid(experiment(), transforms=("identity", "exponential(10)"), kl_budgets=(0.5,))
