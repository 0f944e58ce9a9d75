"""The whole path on next to nothing, to see that it runs: a network too small to learn, 600 dialogues, a few steps.

Claim     None about alignment: every stage runs, and every file of a work directory is written.
Cost      About a minute on two CPU cores from nothing, most of it compilation; less where that is cached.
Command   make train EXP=smoke
"""

from ctrl_jax.config import Calibration, Data, Evaluation, Experiment, Model, Policy, RewardModel, Supervised


def experiment() -> Experiment:
    return Experiment(
        name="smoke",
        data=Data(dialogues=600, prompt_length=40, response_length=24),
        model=Model(width=32, layers=1, heads=2, kv_heads=1, mlp_width=64),
        sft=Supervised(steps=20, batch_size=32, warmup_steps=4, checkpoint_every=5),
        reward_model=RewardModel(steps=20, batch_size=32, warmup_steps=4, checkpoint_every=5),
        calibration=Calibration(prompts=16, samples_per_prompt=16),
        policy=Policy(
            steps=10, prompts_per_step=8, samples_per_prompt=4, learning_rate=1e-2, warmup_steps=2, checkpoint_every=2
        ),
        evaluation=Evaluation(
            prompts=16,
            responses_per_prompt=32,
            procedures=("sampling", "best_of_2", "best_of_4", "worst_of_4"),
            bootstrap_resamples=100,
        ),
    )
