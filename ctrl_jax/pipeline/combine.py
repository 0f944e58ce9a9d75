"""Rewards beside the reward model's: made one with it, or held at floors, with what they are compared with."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ctrl_jax.pipeline import calibrate, data, rollouts, scored
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.supervised import Trained
from ctrl_jax.rewards import combined
from ctrl_jax.rewards.named import named
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.runtime import checksums, hosts
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import RowFile, Stage, fingerprint, read_rows
from ctrl_jax.types import Params, Prompts, Responses, Score

FIELD, LABEL = "combine.rewards", "combine"
TABLE = "rewards.npy"


def others(run: Run) -> list[Reward]:
    """The rewards beside the reward model's.

    Raises:
      InputError: if one cannot be used.
    """
    dtype = run.experiment.model.dtype
    names = run.experiment.combine.rewards
    return [named(text, run.corpus, run.mesh, dtype=dtype, field=FIELD, at_hand=run.functions) for text in names]


class Constraints(NamedTuple):
    """Rewards whose mean ranks a policy keeps at floors (algorithms/constrained.py)."""

    names: tuple[str, ...]
    rank: Score
    """(prompts, responses [B, N]) to ranks [B, N, M]."""
    fingerprint: str
    functions: tuple[Reward, ...] = ()
    """The Python functions among them."""


class Combined(NamedTuple):
    reward: Reward
    seconds: float | None = None
    """What it took to draw what is compared with; None where nothing is."""
    constraints: Constraints | None = None
    """None where the rewards are made one."""


def run(run: Run, reference: Trained, reward: Reward) -> Combined:
    """The combination of the reward model's reward with the others; that reward itself where nothing is made of it.

    Raises:
      InputError: if another reward cannot be used.
    """
    experiment, combination = run.experiment, run.experiment.combine.combination
    if not experiment.combine.changes:
        return Combined(reward)
    if not experiment.combines:
        parts = others(run)
        found = _references(run, reference, parts)
        made_of = {"parts": [part.fingerprint for part in parts], "drawn": found.drawn}
        rank, names = combined.ranks(parts, found.compared), tuple(part.name for part in parts)
        return Combined(
            reward, found.seconds, Constraints(names, rank, fingerprint(made_of), combined.functions(parts))
        )
    parts = [reward, *others(run)]
    if not combination.compares:
        return Combined(combined.reward(parts, combination))
    found = _references(run, reference, parts)
    return Combined(combined.reward(parts, combination, found.compared, drawn=found.drawn), found.seconds)


class _References(NamedTuple):
    compared: combined.Compared
    drawn: str
    """Names what it follows from besides the rewards."""
    seconds: float


def _references(run: Run, reference: Trained, parts: Sequence[Reward]) -> _References:
    """What the rewards give the reference's own responses to every prompt: drawn, or read where that was done.

    The prompts to test with have a stage of their own: to ask for others draws nothing anew for those to train on.
    """
    experiment = run.experiment
    asked = [("combine", "train", experiment.calibration.prompts)]
    if run.corpus.records["test"]:  # a policy that is trained from the library gets them later
        asked.append(("combine_test", "test", experiment.evaluation.prompts))
    tables = _tables(run, reference, parts, asked)
    known = {prompt_id: row for table in tables for prompt_id, row in zip(table.ids, table.rewards, strict=True)}

    def compared(prompts: Prompts) -> np.ndarray:
        ids = np.asarray(hosts.fetch(prompts.ids)).tolist()
        new = {prompt_id: row for row, prompt_id in enumerate(ids) if prompt_id not in known}
        if new:  # of no data set: somebody asks the policy something
            rows = np.array([*new.values()])
            asked = jax.tree.map(lambda x: np.asarray(x)[rows], hosts.fetch(prompts))
            found = [rewards for _, rewards in _drawn(run, reference.params, parts, asked)]
            known.update(zip(new, np.concatenate(found), strict=True))
        return np.stack([known[prompt_id] for prompt_id in ids])

    drawn = f"{reference.stage}-{checksums.of_arrays(np.asarray(tables[0].rewards))}"
    return _References(compared, drawn, sum(table.seconds for table in tables))


class _Table(NamedTuple):
    ids: list[int]
    """[B]"""
    rewards: np.ndarray
    """[B, K, R]"""
    seconds: float


def _tables(
    run: Run, reference: Trained, parts: Sequence[Reward], asked: Sequence[tuple[str, str, int]]
) -> list[_Table]:
    """What the rewards give the reference's responses to the first prompts of a split: (stage, split, count) of each.

    Where a function answers otherwise than in one of the tables, all are made anew.
    """
    made = {"reference": reference.stage, "rewards": [part.fingerprint for part in parts]}
    stages = [run.stage(name, corpus=data.key(run.corpus, split), **made) for name, split, _ in asked]
    prompts = [run.corpus.prompts(split, count).prompts for _, split, count in asked]
    functions = combined.functions(parts)
    with contextlib.ExitStack() as locks:
        for stage in stages:
            locks.enter_context(stage.exclusive())
        kept = [stage for stage in stages if functions and (stage.directory / scored.FILE).exists()]
        reasons = (scored.changed(run, functions, stage.directory) for stage in kept)
        if reason := next(filter(None, reasons), None):
            say(f"{reason}. What depends on it is made anew.", style="yellow")
            for stage in kept:
                stage.supersede()
        for stage, those in zip(stages, prompts, strict=True):
            if not stage.complete:
                _make(run, stage, reference.params, parts, those)
    return [
        _Table(np.asarray(those.ids).tolist(), read_rows(stage.directory / TABLE), stage.summary["seconds"])
        for stage, those in zip(stages, prompts, strict=True)
    ]


def _make(run: Run, stage: Stage, reference: Params, parts: Sequence[Reward], prompts: Prompts) -> None:
    """Writes what the rewards give the reference's responses, or goes on where an earlier process was killed."""
    shape = len(prompts.ids), run.experiment.calibration.samples_per_prompt, len(parts)
    file = RowFile(stage.directory / TABLE, shape, np.float32)
    functions, before, started = combined.functions(parts), file.note or 0.0, time.monotonic()
    for responses, rewards in _drawn(run, reference, parts, prompts, done=file.rows):
        for place, part in enumerate(parts):
            calibrate.check(rewards[..., place], part)
        if file.rows == 0 and functions:
            scored.keep(run, functions, stage.directory, prompts, responses)
        file.append(rewards, before + time.monotonic() - started)
    seconds = file.note or 0.0
    file.finish()
    stage.finish({"seconds": seconds})


def _drawn(
    run: Run, reference: Params, parts: Sequence[Reward], prompts: Prompts, *, done: int = 0
) -> Iterator[tuple[Responses, np.ndarray]]:
    """The reference's own responses [b, K], and what each reward gives them [b, K, R]; by batches from `done` on."""

    def score(prompts: Prompts, responses: Responses) -> np.ndarray:
        return combined.scores(parts, prompts, responses)

    samples = run.experiment.calibration.samples_per_prompt
    for responses, rewards, _ in rollouts.scored(run, LABEL, reference, score, prompts, samples, done=done):
        yield responses, rewards
