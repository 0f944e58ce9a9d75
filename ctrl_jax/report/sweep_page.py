"""The report of a sweep, as a page."""

import urllib.parse
from collections.abc import Sequence
from typing import Any

from ctrl_jax.report import html
from ctrl_jax.report.comparison import Comparison, sentences
from ctrl_jax.report.methods import AtEqualKl
from ctrl_jax.report.names import short_name
from ctrl_jax.report.overoptimization import JUDGES, Method
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.panels import pareto
from ctrl_jax.report.statistics import lift_share
from ctrl_jax.report.status import Status


def render(
    name: str,
    points: Sequence[Status],
    notes: Sequence[str] = (),
    comparisons: Sequence[Comparison] = (),
    curves: Sequence[Panel] = (),
    at_equal_kl: Sequence[AtEqualKl] = (),
    gains: Sequence[Panel] = (),
    laws: Sequence[Method] = (),
    beside: Sequence[Panel] = (),
) -> str:
    """The report of a sweep, as HTML: the Pareto figure of each procedure in it, curves along trainings, all runs with
    their states, what they differ by from a baseline, methods at equal KL, and where they overoptimise."""
    order = list(dict.fromkeys(point.procedure for point in points))
    charts = []
    for index, procedure in enumerate(order):
        if panels := html.charts(f"pareto-{index}", pareto.panels(_of(points, procedure), procedure)):
            charts.append({"title": pareto.title(procedure), "panels": panels})
    differences = [_difference_row(one) for one in comparisons]
    done = sum(point.evaluation is not None for point in points)
    judges = list(
        dict.fromkeys(p.evaluation.judge for p in points if p.evaluation is not None and p.evaluation.judge is not None)
    )
    return html.render(
        "sweep.html",
        title=f"{name}: sweep",
        name=name,
        lead=f"{done} of {len(points)} runs evaluated.",
        charts=charts,
        curves=html.charts("along", curves),
        rows=[_sweep_row(point) for point in points],
        procedures=order,
        judge=short_name(judges[0]) if judges else None,
        has_gold=any(point.evaluation is not None and point.evaluation.gold_win_rates for point in points),
        notes=notes,
        differences=differences,
        others=list(dict.fromkeys(name for row in differences for name in row["others"])),
        at_equal_kl=at_equal_kl,
        beside=html.charts("equal-kl", beside),
        gains=html.charts("gain", gains),
        laws=[_law_row(method, judge) for method in laws for judge in JUDGES],
        several_methods=any(point.method != point.transform for point in points),
        has_equal_kl=any(one.equal_kl is not None for one in comparisons),
    )  # fmt: skip


def _sweep_row(point: Status) -> dict[str, Any]:
    evaluation = point.evaluation
    win_rate = evaluation.win_rates.get(point.procedure) if evaluation else None
    ideals = evaluation.ideal.get(point.procedure) if evaluation else None
    ideal = ideals.transform if ideals else None
    return {
        "point": point,
        "kl": evaluation.kl if evaluation else None,
        "win_rate": win_rate,
        "standard": evaluation.win_rates.get("sampling") if evaluation else None,
        "gold": evaluation.gold_win_rates.get(point.procedure) if evaluation else None,
        "judge": evaluation.judge_win_rates.get(point.procedure) if evaluation else None,
        "ideal": ideal,
        "share": lift_share(win_rate.mean, ideal) if win_rate else None,
        "link": urllib.parse.quote(point.report) if point.report else None,
    }


def _difference_row(one: Comparison) -> dict[str, Any]:
    others = {
        "one sample": None if one.procedure == "sampling" else one.win_rates.get("sampling"),
        "by gold": one.gold_win_rates.get(one.procedure),
        "by the judge": one.judge_win_rates.get(one.procedure),
    }
    return {
        "comparison": one,
        "main": one.win_rates[one.procedure],
        "others": {name: found for name, found in others.items() if found is not None},
        "equal": one.at_equal_kl.get(one.procedure),
        "sentences": sentences(one),
    }


def _law_row(method: Method, judge: str) -> dict[str, Any]:
    return {
        "method": method.name,
        "judge": {"proxy": "the reward trained on", "gold": "gold"}[judge],
        "seeds": [(seed.law(judge), seed.told(judge)) for seed in method.seeds],
        "peak": method.peak(judge),
    }


def _of(points: Sequence[Status], procedure: str) -> list[Status]:
    return [point for point in points if point.procedure == procedure]
