import dataclasses
import pathlib

import numpy as np

from ctrl_jax.evaluation import Estimate
from ctrl_jax.report.measurements import read_run
from ctrl_jax.report.panels import pareto
from ctrl_jax.report.status import Status
from tests.report import synthetic
from tests.report.drawing import drawn, marks


def points(finished: pathlib.Path) -> list[Status]:
    evaluation = read_run(finished).evaluation
    other = dataclasses.replace(evaluation, kl=evaluation.kl._replace(mean=0.5, low=0.48, high=0.52))
    return [
        Status("a", "exponential(10)", "best_of_4", 0.75, "done", evaluation=evaluation),
        Status("b", "raw", "best_of_4", 0.5, "done", evaluation=other),
        Status("c", "identity", "best_of_4", 1.0, "failed"),
    ]


def test_pareto_draws_every_measured_point(finished: pathlib.Path) -> None:
    axes = drawn(pareto.panels(points(finished), "best_of_4")[0])
    height = 100 * read_run(finished).evaluation.win_rates["best_of_4"].mean
    np.testing.assert_allclose(sorted(marks(axes)), [(0.5, height), (synthetic.KL, height)])
    legend = axes.get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == ["exponential(10)", "raw", "best possible"]


def test_the_ideal_curve_of_a_transform_has_the_colour_of_the_method_that_has_it(finished: pathlib.Path) -> None:
    evaluation = read_run(finished).evaluation
    transforms = ("exponential(10)", "identity")
    critics = [
        Status(name, name, "best_of_4", 0.75, "done", evaluation=evaluation, method=f"{name} with a critic")
        for name in transforms
    ]
    axes = drawn(pareto.panels(critics, "best_of_4")[0])
    colors = {str(line.get_label()): line.get_color() for line in axes.lines}
    marks = {str(one.get_label()): one[0].get_color() for one in axes.containers}
    assert len(set(marks.values())) == 2
    for name in transforms:
        assert colors[f"ideal {name}"] == marks[name]


def test_pareto_of_nothing_measured_is_nothing(finished: pathlib.Path) -> None:
    assert pareto.panels(points(finished)[2:], "best_of_4") == []
    assert pareto.panels(points(finished), "worst_of_32") == []


def test_points_that_coincide_are_nested(finished: pathlib.Path) -> None:
    evaluation = read_run(finished).evaluation
    names = ("exponential(10)", "logarithm", "identity")
    same = [Status(name, name, "best_of_4", 0.75, "done", evaluation=evaluation) for name in names]
    far = dataclasses.replace(evaluation, kl=Estimate(0.1, 0.09, 0.11))
    panel = pareto.panels([*same, Status("far", "logit", "best_of_4", 0.1, "done", evaluation=far)], "best_of_4")[0]
    marks = {str(c.get_label()): c[0] for c in drawn(panel).containers if not str(c.get_label()).startswith("_")}
    sizes = {name: mark.get_markersize() for name, mark in marks.items()}
    assert len({sizes[name] for name in names}) == 3, "each shows around the next"
    by_size = sorted(names, key=lambda name: -sizes[name])
    orders = [marks[name].get_zorder() for name in by_size]
    assert orders == sorted(orders), "the smallest in front"
    assert sizes["far"] == min(sizes.values())


def test_of_many_methods_each_has_a_panel_beside_ctrls(finished: pathlib.Path) -> None:
    evaluation = read_run(finished).evaluation
    low, high = (dataclasses.replace(evaluation, kl=Estimate(kl, kl - 0.02, kl + 0.02)) for kl in (0.3, 0.9))
    names = ["exponential(10)", "identity", "GRPO", "DPO", "IPO", "SLiC", "BOND"]
    points = [
        Status(
            f"{name}_{i}", name if name in names[:2] else "raw", "best_of_4", 0.6, "done", evaluation=run, method=name
        )
        for name in names
        for i, run in enumerate((high, low))
    ]
    panels = pareto.panels(points, "best_of_4")
    assert [panel.title for panel in panels] == names
    limits = set()
    for name, panel in zip(names, panels, strict=True):
        axes = drawn(panel)
        limits.add((axes.get_xlim(), axes.get_ylim()))
        assert sorted(x for x, _ in marks(axes)) == [0.3, 0.9], "its own runs"
        legend = axes.get_legend()
        assert legend is not None
        texts = [text.get_text() for text in legend.get_texts()]
        assert texts == ["best possible", *names[:2], *([] if name in names[:2] else [name])]
    assert len(limits) == 1, "all on the same axes"
    few = [point for point in points if point.method in (*names[:2], "GRPO", "DPO", "IPO")]
    assert len(pareto.panels(few, "best_of_4")) == 1
