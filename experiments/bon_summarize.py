"""Best-of-4 summaries of Reddit posts, with any chat model, from OpenAI's TL;DR comparisons.

Claim     As bon_helpful_hh, on summarisation: at one KL, exponential(10) beats the identity transform in best-of-4 win
          rate.
Cost      Sized for one accelerator of 80 GB and a model of 1 to 3 billion parameters; not yet measured there.
Expect    The embedded dialogues' order of the two transforms (bon_helpful); a figure is owed until it is measured.
Command   hf download Qwen/Qwen2.5-1.5B-Instruct --local-dir models/Qwen2.5-1.5B-Instruct
          make train EXP=bon_summarize
          make sweep EXP=bon_summarize
"""

from dataclasses import replace

from ctrl_jax.config import Experiment, grid
from experiments import bon_helpful_hh


def experiment() -> Experiment:
    helpful = bon_helpful_hh.experiment()
    return replace(
        helpful,
        name="bon_summarize",
        # Posts have up to some 500 tokens, their summaries some 50.
        data=replace(helpful.data, source="tldr", prompt_length=576, response_length=64),
    )


def sweep() -> list[Experiment]:
    return grid(experiment(), transforms=("identity", "exponential(10)"), kl_budgets=(2.0, 4.0))
