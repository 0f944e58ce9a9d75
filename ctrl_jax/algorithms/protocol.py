"""What an algorithm is: where its responses come from, what it computes of a batch, its loss, and its metrics.

An algorithm is a frozen dataclass, one file each. It is pure: arrays in, arrays out, without a mesh, a configuration or
files, so that one program serves any of them on any devices (devices/programs.py). A step by a batch is

    targets = algorithm.targets(batch)                                         once a batch
    epochs × minibatches times:
        loss, auxiliary = algorithm.loss(params, frozen, slice of the batch, its targets, extra)
        params, optimizer = one update by the gradient of the loss
        metrics = algorithm.measure(minibatch, its targets, auxiliary)
    extra, more metrics = algorithm.after(extra, mean of the metrics)

Of an update, algorithm.share(extra) is made: by the extra state behind `after` where a batch gets one update, and by
the one before where it gets several.

All arrays of a batch, of targets and of what is auxiliary lead with prompts, B.
"""

import abc
import enum
from typing import Any, ClassVar

import jax

from ctrl_jax.steps.masked import Mean, StandardError
from ctrl_jax.theory.objective import Objective
from ctrl_jax.types import Metric, Params


class Source(enum.Enum):
    """Where the responses that an algorithm learns from come from."""

    POLICY = enum.auto()
    """The policy samples them anew for every batch, and the reward scores them: a batch is an `Experience`."""
    REFERENCE = enum.auto()
    """The reference's, which the calibration stage drew, scored and kept: a batch is `StoredResponses`."""
    DEMONSTRATIONS = enum.auto()
    """The data's responses: `Examples` with N = 1."""
    PREFERENCES = enum.auto()
    """The data's pairs: `PreferencePairs`."""


GRADIENT = Metric("gradient_norm", "loss per parameter", "gradient", guarded=True)
"""Every algorithm reports its loss and this."""


def loss_in(unit: str, *, shown: bool = False) -> Metric:
    """The metric `loss`."""
    return Metric("loss", unit, "loss", guarded=True, shown=shown)


class Algorithm(abc.ABC):
    source: ClassVar[Source]
    metrics: ClassVar[tuple[Metric, ...]]
    """In the order in which a step computes them."""
    internal: ClassVar[tuple[str, ...]] = ()
    """Names of measurements that `after` alone reads: they are no metrics."""
    epochs: int = 1
    """How often a step learns from its batch."""
    minibatches: int = 1
    """Into how many equal parts of its prompts an epoch cuts the batch, for an update each."""

    @property
    def updates(self) -> int:
        """How many a batch gets."""
        return self.epochs * self.minibatches

    @property
    def guarded(self) -> tuple[str, ...]:
        """Names of the metrics that must be finite for a step to be made."""
        return tuple(metric.name for metric in self.metrics if metric.guarded)

    def first_beta(self, objective: Objective, num_references: int, reference_rewards: Any) -> float:
        """The weight of the KL for the objective's budget, where the options give none: by the ideal policy of its Φ.

        Args:
          objective: transform, procedure and KL budget.
          num_references: K, which calibrate.
          reference_rewards: [B, K] raw rewards of the reference, or [B, Q] quantiles of them; each row ascending.
        """
        return objective.beta(num_references, reference_rewards)

    def start(self) -> Any:
        """The extra state before the first step; None without one."""
        return None

    def targets(self, batch: Any) -> Any:
        """Whatever is computed once a batch."""
        return ()

    @abc.abstractmethod
    def loss(self, params: Params, frozen: Params, batch: Any, targets: Any, extra: Any) -> tuple[Mean, Any]:
        """(the loss, auxiliary arrays for `measure`) of some of a batch's prompts.

        Args:
          params: the network that is trained, whole.
          frozen: the parameters that are not trained; for a policy, the reference.
          batch: some prompts of a batch.
          targets: those of the same prompts.
          extra: the extra state.
        """

    def measure(self, batch: Any, targets: Any, auxiliary: Any) -> dict[str, Mean | StandardError]:
        """The metrics of a batch, as reductions over its prompts; of several updates, those of a minibatch."""
        return {}

    def after(self, extra: Any, metrics: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """(the extra state of the next step, metrics of this one's) from the metrics of this step."""
        return extra, {}

    def share(self, extra: Any) -> jax.Array | float:
        """How much of the optimiser's update is made, in (0, 1]: by the extra state."""
        return 1.0
