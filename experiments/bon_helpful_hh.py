"""Best-of-4 on hh-rlhf's helpful conversations, with any chat model: exponential(10) against online IPO.

Claim     A model that is served with best-of-4 wins more when it is trained for that: at one KL, exponential(10) beats
          the identity transform in best-of-4 win rate.
Cost      Sized for one accelerator of 80 GB and a model of 1 to 3 billion parameters; not yet measured there. For two
          CPU cores there is bon_helpful_hh_cpu.
Expect    The embedded dialogues' order of the two transforms (bon_helpful); a figure is owed until it is measured.
Command   hf download Qwen/Qwen2.5-1.5B-Instruct --local-dir models/Qwen2.5-1.5B-Instruct
          make train EXP=bon_helpful_hh
          make sweep EXP=bon_helpful_hh
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
        name="bon_helpful_hh",
        data=Data(source="hh_rlhf/helpful-base", prompt_length=256, response_length=128),
        model=Model(
            path="models/Qwen2.5-1.5B-Instruct", dtype="bfloat16", lora=Lora(rank=32, alpha=64), rematerialize=True
        ),
        sft=Supervised(steps=0),
        reward_model=RewardModel(
            steps=1000,
            batch_size=64,
            learning_rate=2e-4,
            warmup_steps=50,
            long_prompts="truncate",
            validation=Validation(every=50, pairs=1024),
        ),
        calibration=Calibration(prompts=4096, samples_per_prompt=64),
        policy=Policy(
            kl_budget=4.0,
            steps=500,
            prompts_per_step=32,
            samples_per_prompt=8,
            learning_rate=2e-4,
            warmup_steps=20,
        ),
        evaluation=Evaluation(prompts=512, responses_per_prompt=32),
    )


def sweep() -> list[Experiment]:
    return grid(experiment(), transforms=("identity", "exponential(10)"), kl_budgets=(2.0, 4.0))
