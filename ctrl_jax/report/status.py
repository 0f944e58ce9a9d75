"""How far a sweep's points are: what the sweep finds in their folders, and its index, page and figures show."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ctrl_jax.evaluation import Evaluation


class Cost(NamedTuple):
    """What a policy's training took, without the stages that it shares with others."""

    drawn: int
    """Responses of the policy that were drawn and scored."""
    read: int
    """Responses that updates read; one that several updates read counts as often."""
    seconds: float | None
    """Of the training; None where it was not measured."""


@dataclass(frozen=True)
class Status:
    """A point of a sweep, by its files."""

    name: str
    transform: str
    procedure: str
    kl_budget: float
    """Nats per response."""
    state: Literal["missing", "running", "done", "failed"]
    attempts: int = 0
    """Processes that the point was given."""
    reason: str | None = None
    """Why the last attempt failed; None unless the state is failed."""
    report: str | None = None
    """The path of its page, from the sweep's directory; None while there is none."""
    evaluation: Evaluation | None = None
    """None unless the state is done."""
    method: str = ""
    """What figures call its algorithm; without one, its transform."""
    aims: bool = True
    """Whether its training aims at the KL budget."""
    cost: Cost | None = None
    """None unless the state is done."""
    highest_kl: float | None = None
    """The highest mean of five steps' KL of its training, nats per response; None unless the state is done, and where
    the training measured none on the policy's own responses."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", self.method or self.transform)

    def as_json(self) -> dict[str, Any]:
        """Its entry in sweep.json, which leaves the evaluation to the point's own file."""
        tree = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "evaluation"}
        return tree | {"cost": None if self.cost is None else self.cost._asdict()}
