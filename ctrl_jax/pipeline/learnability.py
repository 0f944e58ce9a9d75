"""What the reference's responses say of a reward before a policy is trained on it, while they are drawn for the table.

Does it follow their length, and can it be read off the reference's own features of them (steps/probe.py)?
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.evaluation import Estimate, RewardSignal
from ctrl_jax.pipeline import assembly, randomness
from ctrl_jax.pipeline.rollouts import at_once
from ctrl_jax.pipeline.run import Run
from ctrl_jax.runtime.stages import DONE, RowFile, Stage, read_rows
from ctrl_jax.steps import calibration, probe, rank_correlation, win_rate
from ctrl_jax.types import Params, Prompts, Responses

PROMPTS, RESPONSES = 64, 16
"""The probe reads the first responses to the first prompts, at most: some 1,000, a forward pass each."""
CORRELATIONS, FEATURES = "length_correlations.npy", "probe.npy"


class Observer:
    """Notes, batch by batch, what is needed of a stage's responses; what it noted before a kill counts."""

    def __init__(self, run: Run, stage: Stage, reference: Params, prompts: Prompts):
        self._run, self._stage, self._reference, self._prompts = run, stage, reference, prompts
        self._features = assembly.pooled_features(run.models, run.mesh)
        count, samples = len(prompts.ids), run.experiment.calibration.samples_per_prompt
        shape = min(PROMPTS, count), min(RESPONSES, samples), run.architecture.width + 1
        self._files = [
            RowFile(stage.directory / CORRELATIONS, (count, 1), np.float32),
            RowFile(stage.directory / FEATURES, shape, np.float32),
        ]

    @property
    def rows(self) -> int:
        """Prompts of which all is noted."""
        return min((file.rows for file in self._files if not file.complete), default=len(self._prompts.ids))

    def note(self, row: int, responses: Responses, rewards: np.ndarray) -> None:
        """Notes what is missing of the responses [b, K] to the prompts from `row` on, and their raw rewards [b, K]."""
        batch = jax.tree.map(lambda x: np.asarray(x)[row : row + len(rewards)], self._prompts), responses, rewards
        for file, made in zip(self._files, (_length_correlations, self._probed), strict=True):
            new = slice(file.rows - row, file.shape[0] - row)
            if new.start < min(len(rewards), new.stop):
                file.append(made(*jax.tree.map(lambda x, new=new: np.asarray(x)[new], batch)))

    def finish(self) -> dict[str, Any]:
        """What there is to say of the reward, as a stage's summary has it."""
        for file in self._files:
            file.finish()
        return {"signal": _signal(self._run, self._stage).as_json()}

    def _probed(self, prompts: Prompts, responses: Responses, rewards: np.ndarray) -> np.ndarray:
        """[b, n, D + 1]: of each response its features, and behind them its rank."""
        samples = min(RESPONSES, rewards.shape[1])
        ranks = np.asarray(calibration.leave_one_out(jnp.asarray(rewards)))[:, :samples, None]
        responses = jax.tree.map(lambda x: x[:, :samples], responses)
        features = at_once(self._run, lambda batch: self._features(self._reference, *batch), (prompts, responses))
        return np.concatenate([features, ranks], axis=-1)


def read(stage: Stage) -> RewardSignal:
    """What the summary of a finished stage says; nothing where an older version made it."""
    source, remedy = stage.directory / DONE, "move it away to have it made anew."
    return RewardSignal.from_json(stage.summary.get("signal"), source=source, remedy=remedy)


def _length_correlations(_: Prompts, responses: Responses, rewards: np.ndarray) -> np.ndarray:
    """[b, 1]: Spearman's of rewards and lengths, nan for a prompt whose rewards, or lengths, are all equal."""
    lengths = jnp.asarray(responses.lengths, jnp.float32)
    return np.asarray(rank_correlation.spearman(jnp.asarray(rewards), lengths))[:, None]


def _signal(run: Run, stage: Stage) -> RewardSignal:
    lengths = np.asarray(read_rows(stage.directory / CORRELATIONS))[:, 0]
    rows = np.asarray(read_rows(stage.directory / FEATURES))
    learnability = None
    if len(rows) >= 2 * probe.FOLDS:
        features, ranks = rows[..., :-1], rows[..., -1]
        predicted = jnp.asarray(probe.held_out_ranks(features, ranks), jnp.float32)
        learnability = _estimate(run, "learnability", rank_correlation.spearman(predicted, jnp.asarray(ranks)))
    return RewardSignal(_estimate(run, "length correlation", lengths), learnability)


def _estimate(run: Run, label: str, correlations: Any) -> Estimate | None:
    """The mean over the prompts that have one, with its interval over them; None where none has."""
    found = np.asarray(correlations)
    found = found[np.isfinite(found)]
    if not found.size:
        return None
    key = randomness.stage_key(run.experiment.seed, f"interval of {label}")
    return Estimate.of(*win_rate.interval(jnp.asarray(found), key, bounds=(-1, 1)))
