"""A few scored responses are kept with what was made of the rewards, and scored again before that is used again.

A key knows a reward by its weights, its options and its source. What else it depends on (a file that a function reads,
a service that it asks, a package that is loaded by a computed name) shows in its answers alone.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from ctrl_jax.pipeline.rollouts import at_once
from ctrl_jax.pipeline.run import Run
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import read_arrays, write_arrays
from ctrl_jax.types import Prompts, Responses

FILE = "scored.npz"
PROMPTS, RESPONSES = 4, 4


def keep(run: Run, asked: Sequence[Reward], folder: Path, prompts: Prompts, responses: Responses) -> None:
    """Writes a few of these responses [B, N] to `scored.npz`, with the rewards of each that is asked, twice: do they
    come out alike?

    They are scored as `changed` will score them, in a batch of their own: in another a network rounds otherwise.
    """
    count = min(PROMPTS, len(responses.lengths))
    prompts = jax.tree.map(lambda x: np.asarray(x)[:count], prompts)
    responses = jax.tree.map(lambda x: np.asarray(x)[:count, :RESPONSES], responses)
    rewards, again = (np.stack([_scores(run, one, prompts, responses) for one in asked]) for _ in range(2))
    for one, first, second in zip(asked, rewards, again, strict=True):
        if not np.array_equal(first, second):
            say(
                f"The reward {one.name} does not answer alike twice (up to {np.abs(first - second).max():.3g} apart). "
                "So nobody can know whether it has changed when its answers are used again.",
                style="yellow",
            )
    write_arrays(
        folder / FILE,
        prompts=prompts.tokens,
        prompt_lengths=prompts.lengths,
        ids=prompts.ids,
        responses=responses.tokens,
        lengths=responses.lengths,
        rewards=rewards.squeeze(0) if len(asked) == 1 else rewards,
        again=again.squeeze(0) if len(asked) == 1 else again,
    )


def changed(run: Run, asked: Sequence[Reward], folder: Path) -> str | None:
    """How one of the rewards answers other than when `keep` wrote to the folder; None where none does."""
    kept = read_arrays(folder / FILE)
    prompts = Prompts(*(kept[name] for name in ("prompts", "prompt_lengths", "ids")))  # type: ignore[arg-type]
    responses = Responses(*(kept[name] for name in ("responses", "lengths")))  # type: ignore[arg-type]
    stored, again = (kept[name].reshape(len(asked), *kept["lengths"].shape) for name in ("rewards", "again"))
    reasons = (_changed(run, *one, prompts, responses) for one in zip(asked, stored, again, strict=True))
    return next((reason for reason in reasons if reason is not None), None)


def _changed(
    run: Run, reward: Reward, stored: np.ndarray, again: np.ndarray, prompts: Prompts, responses: Responses
) -> str | None:
    if not np.array_equal(stored, again):
        return None  # it was said when it was kept
    now = _scores(run, reward, prompts, responses)
    apart = np.abs(now - stored)
    if apart.max() <= reward.tolerance * np.abs(stored).max():
        return None
    if not np.array_equal(now, _scores(run, reward, prompts, responses)):
        say(
            f"The reward {reward.name} does not answer alike twice any more: what it answered before is kept.",
            style="yellow",
        )
        return None
    row, column = np.unravel_index(int(apart.argmax()), apart.shape)
    text = run.corpus.texts(jax.tree.map(lambda x: x[row, column][None, None], responses))[0][0]
    return (
        f"The reward {reward.name} answers otherwise than before, though its source is the same: to {text[:60]!r} it "
        f"gave {stored[row, column]:.6g}, and gives {now[row, column]:.6g} now. A file that it reads, a service that "
        "it asks or a package that it loads has changed"
    )


def _scores(run: Run, reward: Reward, prompts: Prompts, responses: Responses) -> np.ndarray:
    """Raw rewards [B, N], without the progress bar of a stage."""
    return at_once(run, lambda batch: reward.score(*batch), (prompts, responses))
