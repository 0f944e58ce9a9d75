"""The calibration table: raw rewards of the reference policy's responses to the training prompts."""

import time
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.jobs.reward_model import Reward
from ctrl_jax.jobs.rollouts import respond
from ctrl_jax.jobs.run import Run
from ctrl_jax.jobs.sft import Trained
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import read_arrays, write_arrays
from ctrl_jax.steps import calibration
from ctrl_jax.types import CalibrationTable


class Calibrated(NamedTuple):
    table: CalibrationTable
    seconds: float
    """What it took to make."""


def run(run: Run, reference: Trained, reward: Reward) -> Calibrated:
    """Makes the table, or reads it. Its rows are in the order of `run.corpus.prompts("train")`.

    Raises:
      InputError: if the rewards of most prompts are all tied, so that there are no ranks to train on.
    """
    experiment = run.experiment
    config = experiment.calibration
    stage = run.stage(
        "calibration",
        corpus=run.corpus.stage,
        reference=reference.stage,
        reward_model=reward.stage,
        calibration=config,
        temperature=experiment.policy.temperature,
        seed=experiment.seed,
    )
    path = stage.directory / "rewards.npz"
    with stage.exclusive():
        if not stage.complete:
            started = time.monotonic()
            prompts = run.corpus.prompts("train", config.prompts)
            _, rewards = respond(
                run, "calibration", reference.params, reward.score, prompts.prompts, config.samples_per_prompt
            )
            if not np.isfinite(rewards).all():
                raise InputError(
                    f"{np.sum(~np.isfinite(rewards))} of {rewards.size} reference rewards are not finite: the "
                    f"reward {reward.stage} is broken. If it was trained here, delete its folder in {run.stages_dir} "
                    "and train it with a smaller --reward-model.learning-rate."
                )
            write_arrays(path, ids=prompts.prompts.ids, rewards=np.sort(rewards, axis=-1))
            stage.finish({"ties": _ties(rewards), "seconds": time.monotonic() - started})
    ties = stage.summary["ties"]
    if ties > 0.5:
        raise InputError(
            f"{ties:.0%} of the pairs of reference responses to a prompt have equal rewards, so their ranks say "
            "nothing. Train the reward model longer (--reward-model.steps) or on more data, or give a reward that "
            "tells responses apart; and check that the reference policy's responses differ (--policy.temperature)."
        )
    if ties > 0.05:
        say(f"[yellow]{ties:.1%} of the pairs of reference responses tie in reward: the ideal values assume no ties.")
    arrays = read_arrays(path)
    return Calibrated(
        CalibrationTable(jnp.asarray(arrays["ids"]), jnp.asarray(arrays["rewards"])), stage.summary["seconds"]
    )


def _ties(rewards: np.ndarray) -> float:
    """Share of the pairs of a prompt's reference responses that have equal rewards."""
    below, not_above = calibration.ranks(jnp.asarray(rewards), jnp.sort(jnp.asarray(rewards), axis=-1))
    references = rewards.shape[1]
    return float(jnp.mean((not_above - below - 1) / (references - 1)))
