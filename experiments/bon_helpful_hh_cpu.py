"""Best-of-4 on hh-rlhf's helpful conversations on two CPU cores: SmolLM2-135M-Instruct with adapters, short responses.

Claim     A real chat model that is served with best-of-4 wins more when it is trained for that: at one KL,
          exponential(10) beats the identity transform in best-of-4 win rate, on preferences that people gave.
Cost      20 minutes of two cores a point; 12 for the reward model and the calibration, which the points share.
          270 MB to download.
Expect    The identity, on the 204 test prompts of a local copy with 2,000 rows: best-of-4 win rate .592 (.563-.619) at
          KL .303 (.288-.319), 37 % of the ideal lift, by a reward model that is right on .603 of 204 pairs. That run
          started at the ideal β and had no brake; exponential(10) is not measured. Longer responses have higher rewards
          (rank correlation .55 within a prompt).
Command   hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
          make train EXP=bon_helpful_hh_cpu        make sweep EXP=bon_helpful_hh_cpu
"""

from ctrl_jax.config import (
    Calibration,
    Data,
    Evaluation,
    Experiment,
    Lora,
    Model,
    Policy,
    RewardModel,
    Supervised,
    Validation,
    grid,
)


def experiment() -> Experiment:
    return Experiment(
        name="bon_helpful_hh_cpu",
        data=Data(source="hh_rlhf/helpful-base", prompt_length=96, long_prompts="truncate", response_length=24),
        model=Model(path="models/SmolLM2-135M-Instruct", lora=Lora(rank=16, alpha=32, last_layers=10)),
        sft=Supervised(steps=0),
        reward_model=RewardModel(
            steps=150,
            batch_size=16,
            learning_rate=2e-4,
            warmup_steps=10,
            validation=Validation(every=25),
        ),
        calibration=Calibration(prompts=256, samples_per_prompt=16),
        policy=Policy(
            kl_budget=0.75,
            steps=60,
            prompts_per_step=8,
            samples_per_prompt=16,
            learning_rate=5e-4,
            warmup_steps=5,
            checkpoint_every=10,
        ),
        evaluation=Evaluation(prompts=256, responses_per_prompt=16),
    )


def sweep() -> list[Experiment]:
    return grid(experiment(), transforms=("identity", "exponential(10)"), kl_budgets=(0.75,))
