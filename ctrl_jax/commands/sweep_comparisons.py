"""The points of a sweep beside a baseline: which pairs are compared, and what the console shows of it."""

from collections.abc import Sequence
from typing import NamedTuple

from ctrl_jax.commands.point import Point
from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import Estimate
from ctrl_jax.report import methods, overoptimization
from ctrl_jax.report.comparison import Comparison, compare, sentences
from ctrl_jax.report.measurements import Run, read_run
from ctrl_jax.report.methods import AtEqualKl
from ctrl_jax.report.overoptimization import Method
from ctrl_jax.runtime.console import say, table
from ctrl_jax.theory import procedures

IDENTITY = "identity"
"""The baseline by default: it looks at no procedure, and what a transform for one buys is seen beside it."""


def check(points: Sequence[Point], baseline: str) -> None:
    """Refuses a baseline that is neither a transform or method of the sweep nor one of its points. The default may be
    absent."""
    known = dict.fromkeys([*(point.experiment.policy.method for point in points), *(point.name for point in points)])
    if baseline not in (*known, IDENTITY):
        raise InputError(
            f"`baseline` is {baseline!r}",
            field="baseline",
            value=baseline,
            remedy=f"give a transform or a point of the sweep: {', '.join(known)}.",
        )


def of_identity(points: Sequence[Point]) -> str:
    """The default baseline: the method whose transform is the identity, CTRL itself before another algorithm. With
    floors it is none."""
    policies = [point.experiment.policy for point in points]
    methods = {one.method for one in policies if one.transform == IDENTITY and not one.floors}
    return IDENTITY if IDENTITY in methods or len(methods) != 1 else methods.pop()


class Beside(NamedTuple):
    """What the points of a sweep that are done have measured, beside one another."""

    runs: dict[str, Run]
    """By the names of the points."""
    comparisons: list[Comparison]
    notes: list[str]
    """Why points are not among them."""
    at_equal_kl: list[AtEqualKl]
    """Methods with several points each, where the baseline is one."""
    laws: list[Method]
    """Of methods with enough points that a gold reward judges."""


def compared(points: Sequence[Point], baseline: str) -> Beside:
    """Compares points that are done.

    Each point is compared with the point of the baseline transform (or another method), trained for its procedure,
    whose measured KL is nearest to its own, among those that were evaluated beside the same responses of the reference.
    Where the baseline is a point, all others are compared with that.
    """
    beside = Beside({}, [], [], [], [])
    for point in points:
        try:
            beside.runs[point.name] = read_run(point.work_dir)
        except InputError as error:
            beside.notes.append(f"{point.name} is not compared: {error}")
    readable = [point for point in points if point.name in beside.runs]
    of_baseline = [point for point in readable if baseline in (point.name, point.experiment.policy.method)]
    for point in readable:
        reasons: list[str] = []
        for one in [] if point in of_baseline else _nearest(point, of_baseline, beside.runs, baseline):
            try:
                pair = beside.runs[point.name], beside.runs[one.name]
                beside.comparisons.append(compare(*pair, names=(point.name, one.name)))
                break
            except InputError as error:
                reasons.append(f"{point.name} is not compared: {error}")
        else:
            beside.notes.extend(reasons[:1])
    for procedure in dict.fromkeys(beside.runs[point.name].procedure for point in readable):
        by_method: dict[str, list[Run]] = {}
        for point in readable:
            if beside.runs[point.name].procedure == procedure:
                by_method.setdefault(point.experiment.policy.method, []).append(beside.runs[point.name])
        if baseline in by_method:
            found = methods.at_equal_kl(by_method, baseline, procedure)
            beside.at_equal_kl.extend(found.found)
            beside.notes.extend(found.notes if any(len(runs) > 1 for runs in by_method.values()) else [])
    beside.laws.extend(
        overoptimization.methods((point.experiment.policy.method, beside.runs[point.name]) for point in readable)
    )
    return beside


def _nearest(point: Point, of_baseline: Sequence[Point], runs: dict[str, Run], baseline: str) -> list[Point]:
    """The points that this one may be compared with, the nearest in KL first."""
    kl = runs[point.name].evaluation.kl.mean
    rule = procedures.parse(point.experiment.policy.procedure)
    fit = [
        one for one in of_baseline if one.name == baseline or procedures.parse(one.experiment.policy.procedure) == rule
    ]
    return sorted(fit, key=lambda one: abs(runs[one.name].evaluation.kl.mean - kl))


def show(beside: Beside) -> None:
    """Prints the differences as a table, and what they say in words."""
    rows = []
    for one in beside.comparisons:
        found, equal = one.win_rates[one.procedure], one.at_equal_kl.get(one.procedure)
        cells = (found, one.kl, equal)
        shown = ["" if cell is None else f"{cell.difference:+.3f}" for cell in cells]
        rows.append([one.run, one.baseline, *shown])
    if rows:
        columns = ["point", "less", "win rate, procedure", "KL, nats per response", "win rate at equal KL"]
        table("differences on the same prompts, with paired 95 % intervals", columns, rows)
    rows = [
        [one.method, one.baseline, f"{one.kl:.3f}", f"{one.difference.run:.3f}", f"{one.difference.difference:+.3f}"]
        for one in beside.at_equal_kl
    ]
    if rows:
        columns = ["method", "less", "KL, nats per response", "win rate", "difference"]
        table("methods at equal KL, between the points of each, with paired 95 % intervals", columns, rows)
    rows = [
        [method.name, judge, ", ".join(seed.told(judge) for seed in method.seeds), _over_seeds(method.peak(judge))]
        for method in beside.laws
        for judge in overoptimization.JUDGES
    ]
    if rows:
        columns = ["method", "judge", "each seed", "over seeds"]
        table("KL where rewards are highest, or what they do at the highest KL", columns, rows)
    for line in (*map(sentences, beside.comparisons), *beside.notes):
        say(line)


def _over_seeds(peak: Estimate | None) -> str:
    return "–" if peak is None or peak.low is None else f"{peak:.2f}"
