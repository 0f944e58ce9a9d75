"""Early stopping: what of a training is used is what is best on data that it does not learn from.

The best parameters so far travel in the training's own state, and so in each of its checkpoints. So a training that was
killed, or whose newest checkpoint is damaged, goes on to the same best as one that was not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ctrl_jax.devices import programs
from ctrl_jax.devices.mesh import replicate
from ctrl_jax.devices.programs import TrainState
from ctrl_jax.runtime import hosts
from ctrl_jax.types import Metric, Params

LOSS = "validation_loss"
"""The metric that decides; every training with a validation has it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Best:
    """The parameters of the lowest validation loss so far."""

    params: Params
    loss: jax.Array
    """[] float32; infinite before the first validation."""
    step: jax.Array
    """[] int32: steps that were made by then."""


class Validation(NamedTuple):
    """How a training is validated."""

    every: int
    """Steps between validations; the last step has one too."""
    patience: int
    """Validations, one after the other, that find nothing better before the training stops."""
    steps: int
    """Of the training, where it does not stop before."""
    size: int
    """Of the data that is not learned from, in examples."""
    measure: Callable[[Params], dict[str, float]]
    """The metrics of trained parameters, LOSS among them: a function of these alone."""
    metrics: tuple[Metric, ...]
    """Which they are."""

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.steps

    def validated(self, mesh: Mesh, state: TrainState, step: int) -> tuple[TrainState, Mapping[str, np.float32]]:
        """The state with the best of its parameters and those before; and the metrics of its own."""
        # Of the first process: all have to take the same for better.
        measured = {name: np.float32(value) for name, value in hosts.agree(self.measure(state.params)).items()}
        if measured[LOSS] < np.float32(hosts.fetch(state.extra.loss)):
            state = replace(state, extra=_best(mesh, state.params, measured[LOSS], step))
        return state, measured

    def stops(self, state: TrainState) -> bool:
        """Whether nothing better was found for so long that the state is the training's last."""
        return int(hosts.fetch(state.step)) - int(hosts.fetch(state.extra.step)) >= self.patience * self.every


def starting(mesh: Mesh, state: TrainState) -> TrainState:
    """A state before its first step, with room for the best."""
    return replace(state, extra=_best(mesh, state.params, np.float32(np.inf), 0))


def without_best(step: programs.Step) -> Callable[..., tuple[TrainState, programs.Metrics]]:
    """A step that is not shown the best parameters, which it neither needs nor changes."""

    def taken(state: TrainState, *arguments: Any) -> tuple[TrainState, programs.Metrics]:
        new, metrics = step(replace(state, extra=None), *arguments)
        return replace(new, extra=state.extra), metrics

    return taken


def _best(mesh: Mesh, params: Params, loss: np.float32, step: int) -> Best:
    # Copied, since the next step takes over the parameters that it is given.
    copied = programs.placed(mesh, _copied, params)
    loss_and_step: Any = replicate(mesh, (np.float32(loss), np.int32(step)))
    return Best(copied, *loss_and_step)


def _copied(params: Params) -> Params:
    return jax.tree.map(lambda x: jnp.array(x, copy=True), params)
