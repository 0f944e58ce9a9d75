"""The reward of an experiment that has several: all of them, made one, with what they are compared with."""

import time
from collections.abc import Sequence

import jax
import numpy as np

from ctrl_jax.pipeline import data, rollouts, scored
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.supervised import Trained
from ctrl_jax.rewards import combined
from ctrl_jax.rewards.named import named
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.runtime import checksums, hosts
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import Stage, read_arrays, write_arrays
from ctrl_jax.types import Params, Prompts, Responses

FIELD, LABEL = "combine.rewards", "combine"
TABLE = "rewards.npz"


def others(run: Run) -> list[Reward]:
    """The rewards beside the reward model's.

    Raises:
      InputError: if one cannot be used.
    """
    dtype = run.experiment.model.dtype
    names = run.experiment.combine.rewards
    return [named(text, run.corpus, run.mesh, dtype=dtype, field=FIELD) for text in names]


def run(run: Run, reference: Trained, reward: Reward) -> Reward:
    """The combination of the reward model's reward with the others; that reward itself where there are none.

    Raises:
      InputError: if another reward cannot be used.
    """
    config = run.experiment.combine
    if not config.rewards:
        return reward
    parts = [reward, *others(run)]
    if not config.combination.compares:
        return combined.reward(parts, config.combination)
    stage = run.stage(
        "combine",
        corpus=data.key(run.corpus, "train", "test"),
        reference=reference.stage,
        rewards=[part.fingerprint for part in parts],
    )
    with stage.exclusive():
        functions = combined.functions(parts)
        if stage.complete and functions and (reason := scored.changed(run, functions, stage.directory)):
            say(f"{reason}. What depends on it is made anew.", style="yellow")
            stage.supersede()
        if not stage.complete:
            _make(run, stage, reference.params, parts)
    table = read_arrays(stage.directory / TABLE)
    known = dict(zip(table["ids"].tolist(), table["rewards"], strict=True))

    def compared(prompts: Prompts) -> np.ndarray:
        ids = np.asarray(hosts.fetch(prompts.ids)).tolist()
        new = {prompt_id: row for row, prompt_id in enumerate(ids) if prompt_id not in known}
        if new:  # of no data set: somebody asks the policy something
            rows = np.array([*new.values()])
            asked = jax.tree.map(lambda x: np.asarray(x)[rows], hosts.fetch(prompts))
            known.update(zip(new, _drawn(run, reference.params, parts, asked)[1], strict=True))
        return np.stack([known[prompt_id] for prompt_id in ids])

    return combined.reward(parts, config.combination, compared, drawn=stage.summary["table"])


def _make(run: Run, stage: Stage, reference: Params, parts: Sequence[Reward]) -> None:
    """Writes what the rewards give the reference's responses to all prompts that are trained on or evaluated."""
    experiment, started = run.experiment, time.monotonic()
    splits = (("train", experiment.calibration.prompts), ("test", experiment.evaluation.prompts))
    prompts = jax.tree.map(lambda *x: np.concatenate(x), *(run.corpus.prompts(*one).prompts for one in splits))
    _, first = np.unique(prompts.ids, return_index=True)  # a prompt may be in both
    prompts = jax.tree.map(lambda x: np.asarray(x)[np.sort(first)], prompts)
    responses, rewards = _drawn(run, reference, parts, prompts)
    write_arrays(stage.directory / TABLE, ids=prompts.ids, rewards=rewards)
    if functions := combined.functions(parts):
        scored.keep(run, functions, stage.directory, prompts, responses)
    digest = checksums.of_file(stage.directory / TABLE)[:16] if hosts.first() else None
    stage.finish({"table": digest, "seconds": time.monotonic() - started})


def _drawn(run: Run, reference: Params, parts: Sequence[Reward], prompts: Prompts) -> tuple[Responses, np.ndarray]:
    """The reference's own responses [B, K], and what each reward gives them [B, K, R]; by batches that fit."""

    def score(prompts: Prompts, responses: Responses) -> np.ndarray:
        return combined.scores(parts, prompts, responses)

    samples = run.experiment.calibration.samples_per_prompt
    found = [*rollouts.scored(run, LABEL, reference, score, prompts, samples)]
    responses = jax.tree.map(lambda *x: np.concatenate(x), *(batch for batch, _, _ in found))
    return responses, np.concatenate([rewards for _, rewards, _ in found])
