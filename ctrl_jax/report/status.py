"""How far a sweep's points are: what the sweep finds in their folders, and its index, page and figures show."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ctrl_jax.evaluation import Evaluation


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

    def as_json(self) -> dict[str, Any]:
        """Its entry in sweep.json, which leaves the evaluation to the point's own file."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "evaluation"}
