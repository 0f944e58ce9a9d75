"""Responses of the reference and the policy to one prompt, with their rewards, and the procedure's pick."""

import jax.numpy as jnp
from rich.markup import escape

from ctrl_jax import build
from ctrl_jax.data.language import as_prompt
from ctrl_jax.data.pipelines import PromptSet, prompts
from ctrl_jax.errors import InputError
from ctrl_jax.jobs.rollouts import respond
from ctrl_jax.jobs.run import Run
from ctrl_jax.jobs.train import Aligned
from ctrl_jax.runtime.console import say, table
from ctrl_jax.steps.calibration import calibrate
from ctrl_jax.theory import procedures


def read_prompt(run: Run, text: str | None) -> PromptSet:
    """What the human says as the policies read it, or the first test prompt; before there are any policies.

    Raises:
      InputError: if it is empty, or longer than the context.
    """
    if text is None:
        return run.corpus.prompts("test", 1)
    if not text.strip():
        raise InputError(f"The prompt is empty ({text!r}); give --prompt a text, or leave it out.")
    return prompts(
        [{"prompt": as_prompt(text.strip())}],
        run.corpus.tokenizer,
        prompt_length=run.experiment.data.prompt_length,
    )


def run(run: Run, aligned: Aligned, prompt: PromptSet, *, num_samples: int) -> None:
    """Prints N responses of each policy with raw, calibrated and transformed reward; ▸ marks the procedure's pick."""
    experiment = run.experiment
    corpus = run.corpus
    procedure = procedures.parse(experiment.policy.procedure)
    references = max(experiment.calibration.samples_per_prompt, num_samples)
    phi = build.transform_of(experiment.policy, num_references=references)
    say(f"[bold]{escape(prompt.texts[0].strip())}")
    reference, reference_rewards = respond(
        run, "sample, reference", aligned.reference.params, aligned.reward.params, prompt.prompts, references
    )
    policy, policy_rewards = respond(
        run, "sample, policy", aligned.policy, aligned.reward.params, prompt.prompts, num_samples
    )
    for label, rollouts, rewards in (
        ("reference", reference, reference_rewards),
        ("policy", policy, policy_rewards),
    ):
        raw = jnp.asarray(rewards[0, :num_samples])
        calibrated = calibrate(raw, jnp.asarray(reference_rewards[0]))
        transformed = raw if phi is None else phi(calibrated)
        pick = None
        if num_samples >= procedure.num_samples:
            pick = int(procedure.select(raw[: procedure.num_samples], build.stage_key(experiment.seed, "pick")))
        rows = [
            [("▸ " if i == pick else "  ") + escape(text), float(raw[i]), float(calibrated[i]), float(transformed[i])]
            for i, text in enumerate(corpus.texts(rollouts.responses)[0][:num_samples])
        ]
        table(label, [f"response (▸ {procedure})", "raw", "calibrated", "transformed"], rows)
