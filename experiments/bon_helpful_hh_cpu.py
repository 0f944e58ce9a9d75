"""bon_helpful_hh at a size for two CPU cores: SmolLM2-135M-Instruct with adapters on hh-rlhf, short responses.

Claim     The whole path runs on a real chat model and real preferences on a laptop: reward model, calibration, policy
          gradient, report. Nothing about alignment: 40 steps of 64 responses are too few to learn from.
Cost      52 minutes on two CPU cores that other work shared, 5.4 GB of memory; 270 MB to download.
Expect    KL .11 (.11-.12) of the budget's .75, best-of-4 win rate .49 (.45-.54): no gain that could be seen. Measured
          on a local copy with 2,000 rows of helpful-base/test; the download has more.
Command   hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
          make train EXP=bon_helpful_hh_cpu
"""

from ctrl_jax.config import Calibration, Data, Evaluation, Experiment, Lora, Model, Policy, RewardModel, Supervised


def experiment() -> Experiment:
    return Experiment(
        name="bon_helpful_hh_cpu",
        data=Data(source="hh_rlhf/helpful-base", prompt_length=64, response_length=24),
        model=Model(path="models/SmolLM2-135M-Instruct", lora=Lora(rank=8, alpha=16)),
        sft=Supervised(steps=0),
        reward_model=RewardModel(steps=60, batch_size=16, learning_rate=1e-3, warmup_steps=6, checkpoint_every=20),
        calibration=Calibration(prompts=48, samples_per_prompt=32),
        policy=Policy(
            kl_budget=0.75,
            steps=40,
            prompts_per_step=8,
            samples_per_prompt=8,
            learning_rate=1e-3,
            warmup_steps=4,
            checkpoint_every=5,
        ),
        evaluation=Evaluation(prompts=48, responses_per_prompt=32),
    )
