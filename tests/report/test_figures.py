import csv
import dataclasses
import io
import json
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from ctrl_jax.errors import InputError
from ctrl_jax.report import figures
from ctrl_jax.report.measurements import Estimate, Run, parse_evaluation, read_run, wilson
from ctrl_jax.theory import ideal
from tests.report import synthetic


@pytest.fixture(scope="module")
def run(finished: pathlib.Path) -> Run:
    return read_run(finished)


def drawn(panel: figures.Panel) -> Axes:
    axes = Figure(figsize=figures.PANEL_SIZE).add_subplot()
    panel.draw(axes)
    return axes


def marks(axes: Axes) -> list[tuple[float, float]]:
    """Centres of all points that have error bars."""
    return [tuple(xy) for container in axes.containers if (line := container[0]) for xy in line.get_xydata()]


def test_ranks_match_counting_one_by_one() -> None:
    random = np.random.default_rng(0)
    values, reference = random.integers(0, 5, (3, 4)).astype(float), random.integers(0, 5, (3, 6)).astype(float)

    def share(value: float, others: list[float]) -> float:
        return sum((value > other) + 0.5 * (value == other) for other in others) / len(others)

    expected = [[share(value, list(row)) for value in own] for own, row in zip(values, reference, strict=True)]
    np.testing.assert_allclose(figures._ranks(values, reference, among_itself=False), expected)
    expected = [[share(row[i], [*row[:i], *row[i + 1 :]]) for i in range(6)] for row in reference]
    np.testing.assert_allclose(figures._ranks(reference, reference, among_itself=True), expected)


@pytest.mark.parametrize("bins", [7, 20])
def test_spread_ranks_of_a_uniform_policy_are_flat_in_any_bins(bins: int) -> None:
    edges = np.linspace(0, 1, bins + 1)
    # A uniform rank wins 0, ..., 63 of 63 comparisons equally often.
    levels = np.arange(64)[None, :] / 63
    density, _ = np.histogram(figures._spread(levels, references=63), edges, density=True)
    np.testing.assert_allclose(density, 1, atol=0.02)


def test_wilson_interval_matches_scipy() -> None:
    wins, count = np.array([0.0, 3.0, 50.0, 99.0]), np.array([5.0, 10.0, 80.0, 100.0])
    low, high = wilson(wins / count, count)
    for index in range(len(wins)):
        interval = stats.binomtest(int(wins[index]), int(count[index])).proportion_ci(0.95, method="wilson")
        assert (low[index], high[index]) == pytest.approx((interval.low, interval.high), abs=1e-4)


def test_binned_intervals_match_a_bootstrap_over_prompts() -> None:
    random = np.random.default_rng(1)
    where = random.uniform(size=(200, 8))
    # A level a prompt: responses of a prompt move together, so an interval over responses would be too narrow.
    values = where + random.normal(size=(200, 1)) + 0.1 * random.normal(size=(200, 8))
    middles, means, halves = figures._binned(where, values, bins=4)
    edges = np.quantile(where, np.linspace(0, 1, 5))
    for index in range(4):
        inside = (where >= edges[index]) & (where < edges[index + 1] + (index == 3))
        assert middles[index] == pytest.approx(where[inside].mean())
        assert means[index] == pytest.approx(values[inside].mean())
        resampled = []
        for _ in range(800):
            rows = random.integers(0, 200, 200)
            resampled.append(values[rows][inside[rows]].mean())
        assert halves[index] == pytest.approx(1.96 * np.std(resampled), rel=0.15)


def test_binned_keeps_ties_together() -> None:
    where = np.array([[0.0, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 1.0]])
    middles, means, _ = figures._binned(where, where, bins=10)
    np.testing.assert_allclose(middles, means)
    assert set(middles) <= {0.0, 0.5, 1.0, 4 / 7, 3.5 / 7}


def test_smooth_is_a_centred_mean_that_skips_nan() -> None:
    np.testing.assert_allclose(figures._smooth(np.array([1.0, np.nan, 3.0, 8.0]), width=3), [1, 2, 5.5, 5.5])


@pytest.mark.parametrize(
    ("transform", "procedure", "expected"),
    [
        ("identity", "best_of_4", 0.8770),
        ("exponential(10)", "best_of_4", 0.9351),
        ("exponential(-10)", "worst_of_4", 0.9927),
    ],
)
def test_ideal_curves_start_at_one_half_and_meet_the_known_values(
    transform: str, procedure: str, expected: float
) -> None:
    # Inference-time win rates at 1 nat, from the integrals of the ideal continuous model.
    curve = figures._ideal_curve(transform, procedure, np.array([0.0, 1.0]))
    np.testing.assert_allclose(curve, [0.5, expected], atol=1e-3)


def test_the_optimal_curve_is_above_all_others_and_a_raw_reward_has_none() -> None:
    kls = np.array([0.2, 0.8])
    best = figures._ideal_curve("optimal", "best_of_4", kls)
    assert (best >= figures._ideal_curve("exponential(10)", "best_of_4", kls) - 1e-6).all()
    assert np.isnan(figures._ideal_curve("raw", "best_of_4", kls)).all()


def test_a_kl_out_of_reach_leaves_a_gap(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    at_kl = ideal.at_kl

    def reaches_one_nat(phi: Any, kl: float) -> Any:
        if kl > 1:
            raise InputError("out of reach")
        return at_kl(phi, kl)

    monkeypatch.setattr(ideal, "at_kl", reaches_one_nat)
    figures._ideal_policy.cache_clear()
    curve = figures._ideal_curve("exponential(10)", "best_of_4", np.array([0.5, 1.5]))
    assert np.isfinite(curve[0]) and np.isnan(curve[1])
    far = dataclasses.replace(run.evaluation, kl=run.evaluation.kl._replace(mean=2.0, high=2.1))
    for panel in figures.headline(dataclasses.replace(run, evaluation=far)):
        drawn(panel)
    figures._ideal_policy.cache_clear()


def test_procedures_are_ordered_by_family_and_size() -> None:
    names = ["worst_of_16", "best_of_16", "worst_of_2", "sampling", "best_of_2"]
    assert sorted(names, key=figures.procedure_order) == [
        "sampling",
        "best_of_2",
        "best_of_16",
        "worst_of_2",
        "worst_of_16",
    ]


def test_win_rates_are_drawn_where_they_were_measured(run: Run) -> None:
    best, _ = figures.win_rate_vs_n(run)
    expected = [
        (np.log2(n), 100 * run.evaluation.win_rates[name].mean)
        for n, name in ((1, "sampling"), (2, "best_of_2"), (4, "best_of_4"))
    ]
    np.testing.assert_allclose(marks(drawn(best)), expected)


def test_the_frontier_has_the_measured_point_and_both_its_intervals(run: Run) -> None:
    axes = drawn(figures.frontier(run)[0])
    kl, win_rate = run.evaluation.kl, run.evaluation.win_rates["best_of_4"]
    np.testing.assert_allclose(marks(axes), [(kl.mean, 100 * win_rate.mean)])
    horizontal, vertical = (bars.get_segments()[0] for bars in axes.containers[0][2])
    np.testing.assert_allclose(horizontal[:, 0], [kl.low, kl.high])
    np.testing.assert_allclose(vertical[:, 1], [100 * win_rate.low, 100 * win_rate.high])


def test_gold_and_proxy_are_drawn_side_by_side(run: Run) -> None:
    dumbbells, by_proxy = figures.proxy_gold(run)
    heights = {name: height for height, name in enumerate(["worst_of_4", "best_of_4", "best_of_2", "sampling"])}
    evaluation = run.evaluation
    expected = {
        (round(100 * table[name].mean, 6), heights[name])
        for table in (evaluation.win_rates, evaluation.gold_win_rates, evaluation.judge_win_rates)
        for name in heights
    }
    assert {(round(x, 6), y) for x, y in marks(drawn(dumbbells))} == expected
    # Ten bins a side; fewer where ties share one.
    assert 15 <= len(marks(drawn(by_proxy))) <= 20


def test_charts_of_missing_inputs_are_left_out(run: Run) -> None:
    arrays = {name: array for name, array in run.arrays.items() if not re.match("reliability|.*(gold|lengths)", name)}
    evaluation = dataclasses.replace(run.evaluation, gold_win_rates={}, judge_win_rates={})
    bare = dataclasses.replace(run, arrays=arrays, metrics={}, evaluation=evaluation)
    assert figures.proxy_gold(bare) == figures.training(bare) == figures.reliability(bare) == []
    assert figures.lengths(bare) == []
    assert len(figures.headline(bare)) == 3


def test_training_panels_leave_out_columns_without_numbers(run: Run) -> None:
    metrics = dict(run.metrics) | {"beta": np.full_like(run.metrics["step"], np.nan)}
    del metrics["calibrated_reward"]
    titles = [panel.title for panel in figures.training(dataclasses.replace(run, metrics=metrics))]
    assert titles == [
        "KL from the reference", "Win rate under best-of-4", "Response length", "Unfinished responses",
    ]  # fmt: skip


def points(finished: pathlib.Path) -> list[figures.Point]:
    evaluation = read_run(finished).evaluation
    other = dataclasses.replace(evaluation, kl=evaluation.kl._replace(mean=0.5, low=0.48, high=0.52))
    return [
        figures.Point("a", "exponential(10)", "best_of_4", 0.75, "done", evaluation),
        figures.Point("b", "raw", "best_of_4", 0.5, "done", other),
        figures.Point("c", "identity", "best_of_4", 1.0, "failed"),
    ]


def test_pareto_draws_every_measured_point(finished: pathlib.Path) -> None:
    axes = drawn(figures.pareto(points(finished), "best_of_4")[0])
    height = 100 * read_run(finished).evaluation.win_rates["best_of_4"].mean
    np.testing.assert_allclose(sorted(marks(axes)), [(0.5, height), (synthetic.KL, height)])
    legend = axes.get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == ["exponential(10)", "raw", "best possible"]


def test_pareto_of_nothing_measured_is_nothing(finished: pathlib.Path) -> None:
    assert figures.pareto(points(finished)[2:], "best_of_4") == []
    assert figures.pareto(points(finished), "worst_of_32") == []


def test_transforms_of_a_sweep_look_different() -> None:
    names = ["identity", "raw", "logarithm", "optimal", *(f"exponential({t})" for t in (1, 2, 5, 10))]
    assert len(set(figures._looks(names).values())) == len(names)


def test_svg_is_well_formed_has_own_ids_and_only_role_colours(run: Run) -> None:
    panels = [*figures.frontier(run), *figures.reliability(run), *figures.training(run)]
    ids: list[str] = []
    for index, panel in enumerate(panels):
        text = figures.svg(panel, f"chart-{index}")
        xml.etree.ElementTree.fromstring(text)
        assert "http" not in text
        assert set(re.findall(r"#[0-9a-fA-F]{6}\b", text)) <= set()
        own = re.findall(r'\bid="([^"]*)"', text)
        assert all(identifier.startswith(f"chart-{index}-") for identifier in own)
        assert {
            target for pair in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', text) for target in pair if target
        } <= set(own)
        ids += own
    assert len(set(ids)) == len(ids)


def test_svg_escapes_its_texts() -> None:
    panel = figures.Panel("<script>", "a & b", lambda axes: None)
    assert "&lt;script&gt;: a &amp; b" in figures.svg(panel, "x")


def test_svg_is_the_same_every_time(run: Run) -> None:
    panel = figures.calibration(run)[0]
    assert figures.svg(panel, "x") == figures.svg(panel, "x")


def test_roles_are_told_apart_by_their_light_colour() -> None:
    assert len({color.light for color in figures.PALETTE.values()}) == len(figures.PALETTE)


def test_pictures_have_the_asked_shape_on_a_transparent_ground(run: Run) -> None:
    panels = figures.win_rate_vs_n(run)
    drawn = figures.pictures(panels, ("png", "svg", "pdf"), columns=2, dots_per_inch=100)
    with Image.open(io.BytesIO(drawn["png"])) as picture:
        width, height = 2 * 100 * figures.PANEL_SIZE[0], 100 * (figures.PANEL_SIZE[1] + 0.3)
        assert picture.size == pytest.approx((width, height), abs=2)
        alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    assert alpha[0, 0] == 0 and (alpha == 0).mean() > 0.5, "the ground is left to the slide"
    root = xml.etree.ElementTree.fromstring(drawn["svg"])
    assert root.tag.endswith("svg")
    grounds = [element for element in root.iter() if element.get("id") in ("patch_1", "patch_2")]
    assert grounds and all("fill: none" in str(path.get("style")) for ground in grounds for path in ground)
    assert drawn["pdf"].startswith(b"%PDF")
    assert figures.pictures(panels, ("png", "svg", "pdf"), columns=2, dots_per_inch=100) == drawn
    with Image.open(io.BytesIO(figures.pictures(panels, ("png",), columns=2, ground="white")["png"])) as picture:
        assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def rows(panels: list[figures.Panel]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(figures.table(panels))))


def test_a_table_has_the_numbers_of_the_files(run: Run) -> None:
    measured = run.evaluation.win_rates
    of_policy = {row["x"]: row for row in rows(figures.win_rate_vs_n(run)[:1]) if row["series"] == "policy"}
    for n, name in (("1", "sampling"), ("2", "best_of_2"), ("4", "best_of_4")):
        numbers = [float(of_policy[n][column]) for column in ("y", "y_low", "y_high")]
        assert numbers == pytest.approx([100 * value for value in measured[name]], rel=1e-5)
        assert of_policy[n]["y_axis"] == "win rate against the reference, %"
    [point] = [row for row in rows(figures.frontier(run)) if row["series"] == "policy"]
    kl = run.evaluation.kl
    assert [float(point[f"x{end}"]) for end in ("", "_low", "_high")] == pytest.approx(list(kl), rel=1e-5)
    curve = [float(row["y"]) for row in rows(figures.training(run)[:1]) if row["series"] == "every step"]
    np.testing.assert_allclose(curve, run.metrics["kl"], rtol=1e-5)
    dumbbells = rows(figures.proxy_gold(run)[:1])
    assert {row["y"] for row in dumbbells} == {"sampling", "best-of-2", "best-of-4", "worst-of-4"}
    assert {row["series"] for row in dumbbells} == {"training reward", "gold", "second_opinion"}
    bars = [row for row in rows(figures.lengths(run)) if row["series"] == "policy"]
    assert sum(float(row["y"]) for row in bars) == pytest.approx(100, rel=1e-4)
    assert {"observed", "pairs"} == {row["series"] for row in rows(figures.reliability(run))}


def test_a_win_rate_below_one_half_is_on_the_axis(run: Run) -> None:
    low = run.evaluation.win_rates["best_of_4"]._replace(mean=0.412, low=0.38, high=0.44)
    evaluation = dataclasses.replace(run.evaluation, win_rates={**run.evaluation.win_rates, "best_of_4": low})
    axes = drawn(figures.frontier(dataclasses.replace(run, evaluation=evaluation))[0])
    assert axes.get_ylim()[0] < 38
    metrics = {**run.metrics, "win_rate": np.linspace(0.3, 0.6, len(run.metrics["step"]))}
    axes = drawn(figures.frontier(dataclasses.replace(run, metrics=metrics))[0])
    assert axes.get_ylim()[0] < 30
    above = {**run.metrics, "win_rate": np.maximum(run.metrics["win_rate"], 0.55)}
    axes = drawn(figures.frontier(dataclasses.replace(run, metrics=above))[0])
    assert axes.get_ylim()[0] == 50


def test_a_rising_curve_starts_where_its_first_step_is() -> None:
    rising = np.linspace(0, 1, 30)
    np.testing.assert_allclose(figures._smooth(rising)[:20], rising[:20], atol=1e-12)


def test_points_that_coincide_are_nested(finished: pathlib.Path) -> None:
    evaluation = read_run(finished).evaluation
    names = ("exponential(10)", "logarithm", "identity")
    same = [figures.Point(name, name, "best_of_4", 0.75, "done", evaluation) for name in names]
    far = dataclasses.replace(evaluation, kl=Estimate(0.1, 0.09, 0.11))
    panel = figures.pareto([*same, figures.Point("far", "logit", "best_of_4", 0.1, "done", far)], "best_of_4")[0]
    marks = {str(c.get_label()): c[0] for c in drawn(panel).containers if not str(c.get_label()).startswith("_")}
    sizes = {name: mark.get_markersize() for name, mark in marks.items()}
    assert len({sizes[name] for name in names}) == 3, "each shows around the next"
    by_size = sorted(names, key=lambda name: -sizes[name])
    orders = [marks[name].get_zorder() for name in by_size]
    assert orders == sorted(orders), "the smallest in front"
    assert sizes["far"] == min(sizes.values())


def test_the_reliability_diagram_shows_each_pair_once(run: Run) -> None:
    axes = drawn(figures.reliability(run)[0])
    assert axes.get_xlim()[0] == 0.5 and axes.get_xlim()[1] >= 1
    [bars] = [c for c in axes.child_axes[0].containers]
    assert sum(bar.get_height() for bar in bars.patches) == run.arrays["reliability_count"].sum() / 2
    assert min(x for x, _ in marks(axes)) >= 0.5


def test_no_interval_is_drawn_where_there_is_none(run: Run) -> None:
    alone = {name: Estimate(value.mean, None, None) for name, value in run.evaluation.win_rates.items()}
    kl = Estimate(run.evaluation.kl.mean, None, None)
    evaluation = dataclasses.replace(run.evaluation, kl=kl, win_rates=alone)
    bare = dataclasses.replace(run, evaluation=evaluation)
    [point] = [row for row in rows(figures.frontier(bare)) if row["series"] == "policy"]
    assert point["y_low"] == point["y"] == point["y_high"]
    for panel in (*figures.headline(bare), *figures.proxy_gold(bare)):
        drawn(panel)


def test_a_training_without_any_number_is_drawn_without_its_path(run: Run) -> None:
    nothing = np.full_like(run.metrics["step"], np.nan)
    bare = dataclasses.replace(run, metrics={**run.metrics, "kl": nothing})
    assert {row["series"] for row in rows(figures.frontier(bare))} >= {"policy", "best possible"}


def test_no_global_plotting_state() -> None:
    code = "import sys, ctrl_jax.commands.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_point_is_parsed_like_a_run(finished: pathlib.Path) -> None:
    tree = json.loads((finished / "evaluation.json").read_text())
    assert parse_evaluation(tree, source="x", remedy="") == read_run(finished).evaluation
