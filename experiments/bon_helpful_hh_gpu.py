"""bon_helpful_hh_cpu at a size for a quarter of an hour of one GPU: SmolLM2-135M-Instruct in bfloat16, 64 tokens.

Claim     As bon_helpful_hh_cpu: at one KL, exponential(10) beats the identity transform in best-of-4 win rate.
Cost      Not yet measured; sized for 15 minutes of one data-centre GPU, both points of the sweep together. 270 MB of a
          model to download, and 17 MB of data.
Expect    Not yet measured.
Command   hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
          experiments/launch/one_gpu.sh models/SmolLM2-135M-Instruct
          make train EXP=bon_helpful_hh_gpu        make sweep EXP=bon_helpful_hh_gpu
"""

from dataclasses import replace

from ctrl_jax.config import Calibration, Experiment, grid
from experiments import bon_helpful_hh_cpu


def experiment() -> Experiment:
    small = bon_helpful_hh_cpu.experiment()
    return replace(
        small,
        name="bon_helpful_hh_gpu",
        data=replace(small.data, prompt_length=192, response_length=64),
        model=replace(small.model, dtype="bfloat16"),
        reward_model=replace(small.reward_model, steps=400, batch_size=32, warmup_steps=20),
        calibration=Calibration(prompts=1024, samples_per_prompt=64),
        policy=replace(
            small.policy,
            kl_budget=1.0,
            steps=300,
            prompts_per_step=32,
            samples_per_prompt=16,
            learning_rate=1e-3,
            warmup_steps=15,
            checkpoint_every=100,
        ),
        evaluation=replace(small.evaluation, prompts=400, responses_per_prompt=64),
    )


def sweep() -> list[Experiment]:
    points = grid(experiment(), transforms=tuple(bon_helpful_hh_cpu.BETA_SHARES), kl_budgets=(1.0,))
    return bon_helpful_hh_cpu.with_shares(points, bon_helpful_hh_cpu.BETA_SHARES)
