"""The points of a sweep beside a baseline: which pairs are compared, and what the console shows of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ctrl_jax.commands import summary
from ctrl_jax.errors import InputError
from ctrl_jax.report.comparison import Comparison, compare, sentence
from ctrl_jax.report.measurements import Run, read_run
from ctrl_jax.runtime.console import say, table
from ctrl_jax.theory import procedures

if TYPE_CHECKING:
    from ctrl_jax.commands.sweep_points import Point

IDENTITY = "identity"
"""The baseline by default: it looks at no procedure, and what a transform for one buys is seen beside it."""


def check(points: "Sequence[Point]", baseline: str) -> None:
    """Refuses a baseline that is neither a transform of the sweep nor one of its points. The default may be absent."""
    known = dict.fromkeys([*(point.experiment.policy.transform for point in points), *(point.name for point in points)])
    if baseline not in (*known, IDENTITY):
        raise InputError(
            f"`baseline` is {baseline!r}",
            field="baseline",
            value=baseline,
            remedy=f"give a transform or a point of the sweep: {', '.join(known)}.",
        )


def compared(points: "Sequence[Point]", baseline: str) -> tuple[list[Comparison], list[str]]:
    """(comparisons, why others are missing) of points that are done.

    Each point is compared with the point of the baseline transform, trained for its procedure, whose measured KL is
    nearest to its own, among those that were evaluated beside the same responses of the reference. Where the baseline
    is a point, all others are compared with that.
    """
    of_baseline = [point for point in points if baseline in (point.name, point.experiment.policy.transform)]
    found: list[Comparison] = []
    missing: list[str] = []
    runs: dict[str, Run] = {}
    for point in points if of_baseline else ():
        try:
            runs[point.name] = read_run(point.work_dir)
        except InputError as error:
            missing.append(f"{point.name} is not compared: {error}")
    for point in points:
        if point in of_baseline or point.name not in runs:
            continue
        run, reasons = runs[point.name], []
        for one in _nearest(point, of_baseline, runs, baseline):
            try:
                found.append(compare(run, runs[one.name], names=(point.name, one.name)))
                break
            except InputError as error:
                reasons.append(f"{point.name} is not compared: {error}")
        else:
            missing += reasons[:1]
    return found, missing


def _nearest(point: "Point", of_baseline: "Sequence[Point]", runs: dict[str, Run], baseline: str) -> "list[Point]":
    """The points that this one may be compared with, the nearest in KL first."""
    kl = runs[point.name].evaluation.kl.mean
    rule = procedures.parse(point.experiment.policy.procedure)
    fit = [
        one
        for one in of_baseline
        if one.name in runs and (one.name == baseline or procedures.parse(one.experiment.policy.procedure) == rule)
    ]
    return sorted(fit, key=lambda one: abs(runs[one.name].evaluation.kl.mean - kl))


def show(found: Sequence[Comparison], missing: Sequence[str]) -> None:
    """Prints the differences as a table, and what they say in words."""
    if found:
        columns = ["point", "beside", "win rate, procedure", "KL, nats per response", "the difference in win rate is"]
        rows = [
            [
                one.run,
                one.baseline,
                summary.difference(one.win_rates[one.procedure].difference),
                "" if one.kl is None else summary.difference(one.kl.difference),
                one.win_rates[one.procedure].verdict,
            ]
            for one in found
        ]
        table("differences on the same prompts, with paired 95 % intervals", columns, rows)
    for line in (*map(sentence, found), *missing):
        say(line)
