"""The calibration table: raw rewards of the reference policy's responses to the training prompts.

Where an experiment asks for it (`calibration.keep_responses`), the responses are kept beside it.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import RewardSignal
from ctrl_jax.pipeline import data, learnability, rollouts, scored, stored
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.supervised import Trained
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.runtime import checksums, hosts
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import DONE, RowFile, Stage, read_arrays, read_rows, write_arrays
from ctrl_jax.steps import calibration
from ctrl_jax.theory.objective import Raw
from ctrl_jax.types import CalibrationTable, Prompts

TABLE, IDS = "rewards.npy", "ids.npz"
MOST_CONSTANT = 0.9
"""The share of prompts whose reference rewards may all be equal, such as those that a verifier calls all wrong."""


class Calibrated(NamedTuple):
    table: CalibrationTable
    seconds: float
    """What it took to make."""
    digest: str
    """Names the table, by content: the key of whatever depends on it."""
    responses: np.ndarray | None = None
    """[B, K] records (stored.py), which stay on disk; None where the experiment keeps none."""
    responses_digest: str = ""
    """Names them, by content."""
    signal: RewardSignal = RewardSignal()
    """What the responses say of the reward."""

    @property
    def all_digests(self) -> str:
        """Names the table and the responses: the key of what learns from these."""
        return f"{self.digest}-{self.responses_digest}"


def run(run: Run, reference: Trained, reward: Reward) -> Calibrated:
    """Makes the table, or reads it. Its rows are in the order of `run.corpus.prompts("train")`.

    Raises:
      InputError: if on nearly all prompts the rewards are all tied, so that there is nothing to learn.
    """
    experiment = run.experiment
    config = experiment.calibration
    stage = run.stage(
        "calibration",
        corpus=data.key(run.corpus, "train"),
        reference=reference.stage,
        reward_model=reward.fingerprint,
    )
    prompts = run.corpus.prompts("train", config.prompts).prompts
    with stage.exclusive():
        if reason := _stale(run, stage, reward):
            place = stage.supersede()
            say(
                f"{reason}. The calibration table is made anew, and with it the policy and its "
                f"evaluation; the old table is in {place}.",
                style="yellow",
            )
        if hosts.agree(config.keep_responses and stage.complete and not (stage.directory / stored.FILE).exists()):
            place = stage.supersede()
            say(
                "The reference's responses were not kept when its calibration table was made (now they are, by "
                f"`calibration.keep_responses`). Both are made anew; the old table is in {place}.",
                style="yellow",
            )
        if not stage.complete:
            _make(run, stage, reference, reward, prompts)
    table, summary = _read(run, stage, prompts), stage.summary
    ties, alike = summary["ties"], np.mean(table.rewards.min(axis=1) == table.rewards.max(axis=1))
    constant = summary.get("constant", float(alike))
    if constant > MOST_CONSTANT:
        raise InputError(
            f"On {constant:.0%} of the prompts all reference responses have one reward, so that there is nothing to "
            "learn. Train the reward model longer (`reward_model.steps`) or on more data, or give a reward that "
            "tells responses apart (in float32, which has 7 digits: take off what all rewards have in common); and "
            "check that the reference policy's responses differ (`policy.temperature`)."
        )
    if ties > 0.05:
        warning = f"{ties:.1%} of the pairs of reference responses tie in reward: the ideal values assume no ties."
        if ties > 0.5 and not isinstance(experiment.policy.objective.transform, Raw):
            warning += " Ranks of so few levels say little more than the rewards, and the first β is for more."
        if constant > 0:
            warning += f" {constant:.0%} of the prompts have one reward alone, and teach nothing."
        say(warning, style="yellow")
    signal = learnability.read(stage)
    for sentence in signal.sentences:
        say(sentence)
    calibrated = Calibrated(table, summary["seconds"], summary["table"], signal=signal)
    if not config.keep_responses:
        return calibrated
    kept = stored.read(stage, experiment, run.architecture.vocabulary_size)
    return calibrated._replace(responses=kept, responses_digest=summary["responses"])


def _stale(run: Run, stage: Stage, reward: Reward) -> str | None:
    """Why the table, or what there is of it, is not the reward's."""
    if (stage.directory / scored.FILE).exists():
        return scored.changed(run, reward.asked, stage.directory)
    unfinished = (stage.directory / f"{TABLE}.partial").exists()
    return f"{stage.directory} has rewards without the {scored.FILE} that says whose they are" if unfinished else None


def _read(run: Run, stage: Stage, prompts: Prompts) -> CalibrationTable:
    config = run.experiment.calibration
    ids, table = read_arrays(stage.directory / IDS)["ids"], read_rows(stage.directory / TABLE)
    wanted = (config.prompts, config.rewards_per_prompt)
    if table.shape != wanted or table.dtype != np.float32 or not np.array_equal(ids, prompts.ids):
        raise InputError(
            f"{stage.directory / TABLE} is of {table.dtype}{list(table.shape)}, or of other prompts, where "
            f"float32{list(wanted)} was made. Move {stage.directory} away to have it made anew."
        )
    return CalibrationTable(ids, table)  # type: ignore[arg-type]


def _make(run: Run, stage: Stage, reference: Trained, reward: Reward, prompts: Prompts) -> None:
    """Writes the table a batch of prompts at a time, or goes on where an earlier process was killed."""
    config = run.experiment.calibration
    if (stage.directory / TABLE).exists():
        say(f"{stage.directory} was left without its {DONE}: it is made anew.", style="yellow")
    write_arrays(stage.directory / IDS, ids=prompts.ids)
    file = RowFile(stage.directory / TABLE, (config.prompts, config.rewards_per_prompt), np.float32)
    kept = None
    if config.keep_responses:
        kept = stored.open_file(stage, run.experiment, run.architecture.vocabulary_size)
    observer = learnability.Observer(run, stage, reference.params, prompts)
    # A kill leaves one file behind another: what one has already is drawn again, and left out there.
    row = min(file.rows, observer.rows, file.rows if kept is None else kept.rows)
    so_far = file.note or {"ties": 0.0, "constant": 0, "seconds": 0.0}
    ties, constant, before, started = so_far["ties"], so_far["constant"], so_far["seconds"], time.monotonic()
    for responses, batch, log_probs in rollouts.scored(
        run, "calibration", reference.params, reward.score, prompts, config.samples_per_prompt,
        done=row, log_probs=kept is not None,
    ):  # fmt: skip
        check(batch, reward)
        if row == 0:
            scored.keep(run, reward.asked, stage.directory, prompts, responses)
        observer.note(row, responses, batch)
        if kept is not None and row + len(batch) > kept.rows:
            assert log_probs is not None, "asked for above"
            records = stored.records(responses, log_probs, batch, kept.dtype)
            kept.append(records[kept.rows - row :])
        if row + len(batch) > file.rows:
            ascending = jnp.sort(jnp.asarray(batch[file.rows - row :]), axis=-1)
            ties += float(_ties(ascending).sum())
            constant += int((ascending[:, 0] == ascending[:, -1]).sum())
            rewards = calibration.quantiles(ascending, config.rewards_per_prompt)
            note = {"ties": ties, "constant": constant, "seconds": before + time.monotonic() - started}
            file.append(np.asarray(rewards), note)
        row += len(batch)
    shares = {"ties": ties / config.prompts, "constant": constant / config.prompts}
    summary = {**shares, **observer.finish(), "seconds": before + time.monotonic() - started}
    _finish(stage, file, kept, summary)


def check(rewards: np.ndarray, reward: Reward) -> None:
    """Raises InputError where a reference reward is not finite, or too large for float32 to add up."""
    bad = calibration.out_of_range(rewards)
    if bad.any():
        raise InputError(
            f"{np.sum(bad)} of {rewards.size} reference rewards are not finite, or beyond "
            f"{calibration.MOST_REWARD:g} ({rewards[bad][0]} the first): the reward {reward.fingerprint} is "
            "broken. If it was trained here, train it with a smaller `reward_model.learning_rate`."
        )


def _finish(stage: Stage, file: RowFile, kept: RowFile | None, summary: dict[str, Any]) -> None:
    digests = {}
    for name, one in (("responses", kept), ("table", file)):
        if one is not None:
            one.finish()
            digests[name] = checksums.of_file(one.path)[:16] if hosts.first() else None
    stage.finish({**summary, **digests})


def _ties(ascending: jax.Array) -> jax.Array:
    """Share of the pairs of each prompt's reference rewards [B, K] that are equal: [B]."""
    below, not_above = calibration.ranks(ascending, ascending)
    return jnp.mean((not_above - below - 1) / (ascending.shape[1] - 1), axis=-1)
