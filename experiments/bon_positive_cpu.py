"""Best-of-4 for friendly answers to people who chat, on two CPU cores: data and reward come from packages.

SmolLM2-135M-Instruct, or any model directory (`--model.path`), answers conversations of the chitchat corpus; the reward
is VADER's sentiment of the answer, which any language model can steer and nobody has to train.

Claim     At one KL, exponential(10) beats the identity transform in best-of-4 win rate, on a reward without noise.
Cost      35 minutes of two cores (200 GFLOP/s) a point, and 12 for what the points share: calibration and the
          reference's evaluation. 270 MB of a model to download, no data.
Expect    On 256 test prompts, measured once. exponential(10): best-of-4 win rate .882 (.872-.891) at KL 1.158
          (1.126-1.189), 86 % of the ideal lift. identity: .869 (.858-.879) at KL 1.170 (1.139-1.203), 93 % of the ideal
          lift. On the same prompts the difference is 1.3 points (0.4-2.2). More in docs/real_models.md.
Command   make setup EXTRA=chitchat,sentiment
          hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
          make train EXP=bon_positive_cpu        make sweep EXP=bon_positive_cpu
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, Policy, RewardModel, grid
from experiments import bon_helpful_hh_cpu

BETA_SHARES = {"identity": 0.9, "exponential(10)": 0.62}
"""What a policy of this size learns of a transformed reward, as training found it."""


def experiment() -> Experiment:
    helpful = bon_helpful_hh_cpu.experiment()
    return replace(
        helpful,
        name="bon_positive_cpu",
        data=replace(helpful.data, source="chitchat", prompt_length=64, response_length=16),
        reward_model=RewardModel(function="experiments.rewards.sentiment:compound"),
        policy=Policy(
            kl_budget=1.2,
            beta_share=BETA_SHARES["exponential(10)"],
            steps=80,
            prompts_per_step=8,
            samples_per_prompt=16,
            learning_rate=5e-4,
            warmup_steps=5,
            checkpoint_every=10,
        ),
        evaluation=replace(helpful.evaluation, responses_per_prompt=32),
    )


def sweep() -> list[Experiment]:
    points = grid(experiment(), transforms=tuple(BETA_SHARES), kl_budgets=(1.2,))
    return bon_helpful_hh_cpu.with_shares(points, BETA_SHARES)
