"""The policy along its training: what is kept of it at a few steps, and what is measured of that on the test prompts.

The trained parameters of those steps are beside the checkpoints, which come and go. A policy that is kept is measured
as the final one is, with as many responses a prompt as `evaluation.along_responses` asks for.
"""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ctrl_jax.config import Experiment
from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import ALONG_ARRAYS
from ctrl_jax.pipeline.run import Run
from ctrl_jax.runtime import hosts
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.loop import Update, named
from ctrl_jax.runtime.stages import read_arrays, write_arrays
from ctrl_jax.types import Params

KEPT, MEASURED = "kept_along", "measured_along"
"""Folders of the work directory, with a file a step."""


def steps(experiment: Experiment) -> list[int]:
    """The steps after which the policy is kept: `evaluation.along` of them, evenly spaced, before the last."""
    points, last = experiment.evaluation.along, experiment.policy.steps
    return [round(last * point / (points + 1)) for point in range(1, points + 1)]


def keep(run: Run, update: Update, params: Params) -> None:
    """Writes the trained parameters behind this update, if it is one of the steps."""
    if update.at_rest and update.step in steps(run.experiment):
        write_arrays(_file(run, KEPT, update.step), **dict(named(hosts.fetch(params))))


def measured(
    run: Run,
    policy: Params,
    measure: Callable[[str, Params], tuple[np.ndarray, np.ndarray]],
    *,
    beside: np.ndarray,
) -> dict[str, Any]:
    """What `evaluation.npz` has of the policies along the training: their steps [P], rewards [P, B, M] and KLs [P, B].

    What an evaluation that was killed has measured is read. Nothing where `evaluation.along` is 0.

    Args:
      run: has the options and the folder.
      policy: the final one, whole; those before it differ in what was trained.
      measure: (the name of the draws, a policy) to its rewards [B, M] and KLs [B] on the test prompts.
      beside: the reference's rewards; what was measured beside others is measured anew, for the reward has changed.
    """
    digest = np.uint32(zlib.crc32(np.ascontiguousarray(beside).tobytes()))
    found: dict[str, list[Any]] = {name: [] for name in ALONG_ARRAYS}
    for step, params in _kept(run, policy):
        path = _file(run, MEASURED, step)
        before = read_arrays(path) if hosts.agree(path.exists()) else {}
        if before.get("beside") == digest:
            rewards, kl = before["rewards"], before["kl"]
        else:
            rewards, kl = measure(f"policy responses after step {step}", params)
            write_arrays(path, rewards=rewards, kl=kl, beside=digest)
        for name, value in zip(ALONG_ARRAYS, (step, rewards, kl), strict=True):
            found[name].append(value)
    return {name: np.stack(values) for name, values in found.items() if values}


def _kept(run: Run, policy: Params) -> Iterator[tuple[int, Params]]:
    """(step, the whole policy after it) of those that are there."""
    for step in steps(run.experiment):
        try:
            arrays = read_arrays(_file(run, KEPT, step))
        except InputError as error:
            say(f"The policy after step {step} is left out of the curve along the training: {error}", style="yellow")
            continue
        yield step, _with(policy, arrays)


def _with(policy: Params, arrays: dict[str, np.ndarray]) -> Params:
    """The policy with these arrays in place of its own, on the devices of its own."""
    names = [name for name, _ in named(policy)]

    def placed(leaf: Any, array: np.ndarray | None) -> Any:
        if array is None:
            return leaf
        return jax.make_array_from_callback(array.shape, leaf.sharding, lambda index: array[index])

    leaves = [placed(leaf, arrays.get(name)) for name, leaf in zip(names, jax.tree.leaves(policy), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(policy), leaves)


def _file(run: Run, folder: str, step: int) -> Path:
    return run.work_dir / folder / f"step-{step}.npz"
