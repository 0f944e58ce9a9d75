"""A sweep's points, as its page and its figures show them."""

from dataclasses import dataclass

from ctrl_jax.report.measurements import Evaluation


@dataclass(frozen=True)
class Point:
    """One run of a sweep; `evaluation` is None until it is done."""

    name: str
    transform: str
    procedure: str
    kl_budget: float
    state: str
    evaluation: Evaluation | None = None
    report: str | None = None
