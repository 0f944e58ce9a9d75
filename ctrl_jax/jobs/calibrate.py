"""The calibration table: raw rewards of the reference policy's responses to the training prompts."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.jobs.reward_model import Reward
from ctrl_jax.jobs.rollouts import rewards
from ctrl_jax.jobs.run import Run
from ctrl_jax.jobs.sft import Trained
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import RowFile, Stage, read_arrays, read_rows, write_arrays
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
    path = stage.directory / "rewards.npy"
    with stage.exclusive():
        if not stage.complete:
            _make(run, stage, reference, reward)
    ties = stage.summary["ties"]
    if ties > 0.5:
        raise InputError(
            f"{ties:.0%} of the pairs of reference responses to a prompt have equal rewards, so their ranks say "
            "nothing. Train the reward model longer (--reward-model.steps) or on more data, or give a reward that "
            "tells responses apart (in float32, which has 7 digits: take off what all rewards have in common); and "
            "check that the reference policy's responses differ (--policy.temperature)."
        )
    if ties > 0.05:
        told = f"{ties:.1%} of the pairs of reference responses tie in reward: the ideal values assume no ties."
        say(told, style="yellow")
    table = CalibrationTable(read_arrays(stage.directory / "ids.npz")["ids"], read_rows(path))  # type: ignore[arg-type]
    return Calibrated(table, stage.summary["seconds"])


def _make(run: Run, stage: Stage, reference: Trained, reward: Reward) -> None:
    """Writes the table a batch of prompts at a time, or goes on where an earlier process was killed."""
    config = run.experiment.calibration
    prompts = run.corpus.prompts("train", config.prompts).prompts
    write_arrays(stage.directory / "ids.npz", ids=prompts.ids)
    file = RowFile(stage.directory / "rewards.npy", (config.prompts, config.rewards_per_prompt), np.float32)
    so_far = file.note or {"ties": 0.0, "seconds": 0.0}
    ties, before, started = so_far["ties"], so_far["seconds"], time.monotonic()
    for batch in rewards(
        run, "calibration", reference.params, reward.score, prompts, config.samples_per_prompt, done=file.rows
    ):
        bad = calibration.out_of_range(batch)
        if bad.any():
            raise InputError(
                f"{np.sum(bad)} of {batch.size} reference rewards are not finite, or beyond "
                f"{calibration.MOST_REWARD:g} ({batch[bad][0]} the first): the reward {reward.stage} is broken. If it "
                f"was trained here, delete its folder in {run.stages_dir} and train it with a smaller "
                "--reward-model.learning-rate."
            )
        ascending = jnp.sort(jnp.asarray(batch), axis=-1)
        ties += float(_ties(ascending).sum())
        kept = calibration.quantiles(ascending, config.rewards_per_prompt)
        file.append(np.asarray(kept), {"ties": ties, "seconds": before + time.monotonic() - started})
    file.finish()
    stage.finish({"ties": ties / config.prompts, "seconds": before + time.monotonic() - started})


def _ties(ascending: jax.Array) -> jax.Array:
    """Share of the pairs of each prompt's reference rewards [B, K] that are equal: [B]."""
    below, not_above = calibration.ranks(ascending, ascending)
    return jnp.mean((not_above - below - 1) / (ascending.shape[1] - 1), axis=-1)
