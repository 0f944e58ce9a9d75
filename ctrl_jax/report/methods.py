"""Methods of a sweep at equal KL: each is a curve through its runs, one for each strength it was trained at.

Two methods seldom end at one KL. So each method's runs, in the order of their measured KL, are joined by straight lines
in the plane of win rate against KL, prompt by prompt, and methods are compared where their curves have a KL in common.
Nothing is extrapolated.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ctrl_jax.evaluation import KL_ARRAY
from ctrl_jax.report.comparison import Difference, at_kl, win_rates
from ctrl_jax.report.measurements import Run
from ctrl_jax.steps import comparison
from ctrl_jax.steps.comparison import Curve
from ctrl_jax.theory.precision import double_precision


class AtEqualKl(NamedTuple):
    """A method beside another one at a KL, by interpolation between the runs of each."""

    method: str
    baseline: str
    procedure: str
    kl: float
    """Nats per response: that of a run of the baseline."""
    difference: Difference

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "difference": self.difference.as_json()}


class Beside(NamedTuple):
    found: list[AtEqualKl]
    notes: list[str]
    """Which methods or runs are not among them, and why."""


def at_equal_kl(runs: Mapping[str, Sequence[Run]], baseline: str, procedure: str) -> Beside:
    """Every method beside the baseline at the measured KL of each of the baseline's runs that the method's curve spans;
    where there is none, at the highest KL that both curves have.

    Runs are compared with those that were evaluated beside the same responses of the reference.

    Args:
      runs: by the names of methods; all that were trained for the procedure.
      baseline: one of them.
      procedure: to decode with.
    """
    beside = Beside([], [])
    with double_precision():
        for of_reference in _by_reference(runs):
            if baseline in of_reference and len(of_reference) > 1:
                _compare(of_reference, baseline, procedure, beside)
    return beside


def _compare(runs: Mapping[str, Sequence[Run]], baseline: str, procedure: str, beside: Beside) -> None:
    theirs = _curve(baseline, runs[baseline], procedure, beside)
    for method, of_method in runs.items():
        if method == baseline or theirs is None:
            continue
        ours = _curve(method, of_method, procedure, beside)
        if ours is None:
            continue
        both = comparison.kl_range(ours, theirs)
        if both is None:
            beside.notes.append(f"{method} and {baseline} have no KL in common, and are not compared at equal KL.")
            continue
        places = np.asarray(jnp.mean(theirs.kl, axis=-1))  # as kl_range rounds them
        inside = places[(both[0] <= places) & (places <= both[1])]
        beside.found.extend(
            AtEqualKl(method, baseline, procedure, float(kl), at_kl(ours, theirs, float(kl)))
            for kl in (inside if inside.size else both[1:])
        )


def _curve(method: str, runs: Sequence[Run], procedure: str, beside: Beside) -> Curve | None:
    """The curve through the runs of a method; None of fewer than two, with a note."""
    kept = [run for run in runs if KL_ARRAY in run.arrays]
    if len(kept) > 1:
        ordered = sorted(kept, key=lambda run: float(run.arrays[KL_ARRAY].mean()))
        kls = np.stack([run.arrays[KL_ARRAY] for run in ordered])
        curve = comparison.of_training(kls, np.stack([win_rates(run, procedure) for run in ordered]))
        if dropped := len(kls) - len(curve.kl):
            beside.notes.append(
                f"At equal KL {dropped} of the {len(runs)} runs of {method} are left out: their KL is not clearly "
                "below the next one's."
            )
        if len(curve.kl) > 1:
            return curve
    beside.notes.append(
        f"{method} has no two runs of unlike KL beside the same responses of the reference, and is not compared at "
        "equal KL."
    )
    return None


def _by_reference(runs: Mapping[str, Sequence[Run]]) -> list[dict[str, list[Run]]]:
    """The runs by method, apart by the reference's responses that they were evaluated beside."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for method, of_method in runs.items():
        for run in of_method:
            values = np.ascontiguousarray(run.arrays["reference_rewards"])
            key = f"{values.shape} {hashlib.sha256(values.tobytes()).hexdigest()}"
            groups.setdefault(key, {}).setdefault(method, []).append(run)
    return list(groups.values())
