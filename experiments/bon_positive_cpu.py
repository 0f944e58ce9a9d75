"""Best-of-4 for friendly answers to people who chat, on two CPU cores: data and reward come from packages.

SmolLM2-135M-Instruct, or any model directory (`--model.path`), answers conversations of the chitchat corpus; the reward
is VADER's sentiment of the answer, which any language model can steer and nobody has to train.

Claim     At one KL, exponential(10) beats the identity transform in best-of-4 win rate, on a reward without noise.
Cost      Not yet measured. 270 MB of a model to download, no data.
Expect    Not yet measured.
Command   make setup EXTRA=chitchat,sentiment
          hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
          make train EXP=bon_positive_cpu        make sweep EXP=bon_positive_cpu
"""

from ctrl_jax.config import (
    Calibration,
    Data,
    Evaluation,
    Experiment,
    GroupProjection,
    Lora,
    Model,
    Policy,
    RewardModel,
    Supervised,
    grid,
)


def experiment() -> Experiment:
    return Experiment(
        name="bon_positive_cpu",
        data=Data(source="chitchat", prompt_length=96, long_prompts="truncate", response_length=24),
        model=Model(path="models/SmolLM2-135M-Instruct", lora=Lora(rank=16, alpha=32)),
        sft=Supervised(steps=0),
        reward_model=RewardModel(function="experiments.rewards.sentiment:compound"),
        calibration=Calibration(prompts=128, samples_per_prompt=32, keep_responses=True),
        # What calibration drew is learned from first, which costs no draw; then new responses go on from there.
        start=GroupProjection(kl_budget=0.4, steps=40, prompts_per_step=16, checkpoint_every=10),
        policy=Policy(
            kl_budget=0.75,
            steps=40,
            prompts_per_step=16,
            samples_per_prompt=8,
            learning_rate=3e-4,
            warmup_steps=5,
            checkpoint_every=10,
        ),
        evaluation=Evaluation(prompts=128, responses_per_prompt=32),
    )


def sweep() -> list[Experiment]:
    return grid(experiment(), transforms=("identity", "exponential(10)"), kl_budgets=(0.75,))
