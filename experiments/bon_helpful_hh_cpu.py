"""Best-of-4 on hh-rlhf's helpful conversations on two CPU cores: SmolLM2-135M-Instruct with adapters, short responses.

Claim     A real chat model that is served with best-of-4 wins more when it is trained for that: at one KL,
          exponential(10) beats the identity transform in best-of-4 win rate, on preferences that people gave.
Cost      12 minutes of two cores for the reward model and the calibration, which the points share, 8 for the
          reference's evaluation, and 35 to 40 for a point and its evaluation. 270 MB to download.
Expect    On 256 test prompts of a local copy with 2,000 rows, by a linear reward that is right on .641 of 398 pairs of
          which most are cut at 16 tokens, with β from .67 and .4 of the ideal one: the identity .800 (.781-.818) at KL
          1.39 (1.33-1.46), 72 % of the ideal lift, exponential(10) .815 (.795-.832) at 1.57 (1.49-1.64), 68 %. On the
          same prompts exponential(10) wins .015 more (.004-.026), at a KL that is higher by .17: at one KL the claim is
          not shown, for the policy learns less of exponential(10).
Command   hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
          make train EXP=bon_helpful_hh_cpu        make sweep EXP=bon_helpful_hh_cpu
"""

from dataclasses import replace

from ctrl_jax.config import (
    ActorCritic,
    Calibration,
    Data,
    Evaluation,
    Experiment,
    Lora,
    Model,
    RewardModel,
    Supervised,
    grid,
)

BETA_SHARES = {"identity": 0.67, "exponential(10)": 0.32}
"""What a policy of this size learns of a transformed reward, as trainings ended."""


def experiment() -> Experiment:
    return Experiment(
        name="bon_helpful_hh_cpu",
        data=Data(source="hh_rlhf/helpful-base", prompt_length=96, long_prompts="truncate", response_length=16),
        model=Model(path="models/SmolLM2-135M-Instruct", lora=Lora(rank=16, alpha=32, last_layers=10)),
        sft=Supervised(steps=0),
        reward_model=RewardModel(linear=True, steps=150, batch_size=16),
        calibration=Calibration(prompts=256, samples_per_prompt=16),
        policy=ActorCritic(
            kl_budget=1.4,
            beta_share=BETA_SHARES["exponential(10)"],
            trace=0.8,
            steps=60,
            prompts_per_step=16,
            samples_per_prompt=8,
            learning_rate=2e-3,
            warmup_steps=5,
            checkpoint_every=10,
        ),
        evaluation=Evaluation(prompts=256, responses_per_prompt=24),
    )


def sweep() -> list[Experiment]:
    points = grid(experiment(), transforms=tuple(BETA_SHARES), kl_budgets=(1.4,))
    return with_shares(points, BETA_SHARES)


def with_shares(points: list[Experiment], shares: dict[str, float]) -> list[Experiment]:
    """The points of a sweep, each with the share of its transform."""
    return [replace(one, policy=replace(one.policy, beta_share=shares[one.policy.transform])) for one in points]
