"""Methods of a sweep at equal KL: each is a curve through its runs, one for each strength it was trained at.

Two methods seldom end at one KL. So each method's runs, in the order of their measured KL, are joined by straight lines
in the plane of win rate against KL, prompt by prompt, and methods are compared where their curves have a KL in common.
Nothing is extrapolated.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import KL_ARRAY
from ctrl_jax.report.comparison import Difference, at_kl, check_same_reference, win_rates
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


def at_equal_kl(runs: Mapping[str, Sequence[Run]], baseline: str, procedure: str) -> list[AtEqualKl]:
    """Every method beside the baseline at the measured KL of each of the baseline's runs that the method's curve spans;
    where there is none, at the highest KL that both curves have.

    Args:
      runs: by the names of methods; all that were trained for the procedure.
      baseline: one of them.
      procedure: to decode with.
    """
    found: list[AtEqualKl] = []
    if baseline not in runs:
        return found
    with double_precision():
        theirs = curve(runs[baseline], procedure)
        for method, of_method in runs.items():
            ours = None if method == baseline else curve(_comparable(of_method, runs[baseline][0]), procedure)
            if ours is None or theirs is None or (both := comparison.kl_range(ours, theirs)) is None:
                continue
            places = np.asarray(jnp.mean(theirs.kl, axis=-1))  # as kl_range rounds them
            inside = places[(both[0] <= places) & (places <= both[1])]
            found += [
                AtEqualKl(method, baseline, procedure, float(kl), at_kl(ours, theirs, float(kl)))
                for kl in (inside if inside.size else both[1:])
            ]
    return found


def curve(runs: Sequence[Run], procedure: str) -> Curve | None:
    """The curve through runs of one method; None of fewer than two, or where a run kept no KL by prompt."""
    if len(runs) < 2 or any(KL_ARRAY not in run.arrays for run in runs):
        return None
    ordered = sorted(runs, key=lambda run: float(run.arrays[KL_ARRAY].mean()))
    kls = np.stack([run.arrays[KL_ARRAY] for run in ordered])
    return comparison.of_training(kls, np.stack([win_rates(run, procedure) for run in ordered]))


def _comparable(runs: Sequence[Run], beside: Run) -> list[Run]:
    """Those that were evaluated beside the same responses of the reference."""

    def same(run: Run) -> bool:
        try:
            check_same_reference(run, beside, names=("one", "another"))
        except InputError:
            return False
        return True

    return [run for run in runs if same(run)]
