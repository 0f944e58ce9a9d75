"""bon_positive_cpu at a size for one GPU: SmolLM2-135M-Instruct in bfloat16, responses of 64 tokens.

Claim     As bon_positive_cpu: at one KL, exponential(10) beats the identity transform in best-of-4 win rate.
Cost      Not yet measured; sized for minutes of one GPU with 24 GB. 270 MB of a model to download, no data.
Expect    Not yet measured.
Command   make setup EXTRA=cuda12,chitchat,sentiment
          hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
          make train EXP=bon_positive_gpu        make sweep EXP=bon_positive_gpu
"""

from dataclasses import replace

from ctrl_jax.config import Calibration, Experiment, grid
from experiments import bon_positive_cpu


def experiment() -> Experiment:
    small = bon_positive_cpu.experiment()
    return replace(
        small,
        name="bon_positive_gpu",
        data=replace(small.data, prompt_length=128, response_length=64),
        model=replace(small.model, dtype="bfloat16"),
        calibration=Calibration(prompts=1024, samples_per_prompt=64),
        policy=replace(
            small.policy,
            kl_budget=0.75,
            beta_share=None,  # what so many more responses teach is for the probe to say
            steps=300,
            prompts_per_step=32,
            samples_per_prompt=16,
            warmup_steps=20,
        ),
        evaluation=replace(small.evaluation, prompts=400, responses_per_prompt=64),
    )


def sweep() -> list[Experiment]:
    return grid(experiment(), transforms=("identity", "exponential(10)"), kl_budgets=(0.75, 1.5))
