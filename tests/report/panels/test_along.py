"""Curves along trainings, from arrays whose win rates are straight lines in the KL."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from ctrl_jax.report import ideals
from ctrl_jax.report.comparison import compare, curve, sentences
from ctrl_jax.report.measurements import Run, read_run
from ctrl_jax.report.panels import along, frontier
from ctrl_jax.steps import comparison
from ctrl_jax.theory.precision import double_precision
from tests.report import synthetic
from tests.report.drawing import drawn, marks, rows

NAMES = ("sampling", "best_of_4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    options: dict[str, Any] = {"names": NAMES, "prompts": 200, "samples": 2}
    written = {
        "exponential": synthetic.write_work_dir(folder / "a", along=(0.2, 0.45), **options),
        "identity": synthetic.write_work_dir(folder / "b", transform="identity", along=(0.25, 0.6), **options),
        "plain": synthetic.write_work_dir(folder / "c", transform="logarithm", **options),
    }
    return {name: read_run(path) for name, path in written.items()}


def straight(run: Run, slope: float, kls: tuple[float, ...], final: float) -> Run:
    """A run of a reward without ties that one sample wins ½ + slope · KL of the time, on every prompt alike."""
    prompts, responses = run.arrays["reference_rewards"].shape
    reference = np.tile(np.arange(responses, dtype=float), (prompts, 1))

    def rewards(kl: float) -> np.ndarray:
        won = (0.5 + slope * kl) * responses  # how many of the reference's a response beats
        return np.tile(np.array([np.floor(won) - 0.5 + (won % 1 > k / 1000) for k in range(1000)]), (prompts, 1))

    of_prompts = np.random.default_rng(0).normal(0, 0.02, prompts)
    of_prompts -= of_prompts.mean()
    own = {name: array for name, array in run.arrays.items() if not name.endswith(("gold", "judge"))}
    arrays = {
        **own, "reference_rewards": reference, "policy_rewards": rewards(final), "kl": final + of_prompts,
        "along_steps": np.arange(1.0, 1 + len(kls)), "along_rewards": np.stack([rewards(kl) for kl in kls]),
        "along_kl": np.array(kls)[:, None] + of_prompts,
    }  # fmt: skip
    return dataclasses.replace(run, arrays=arrays)


def test_runs_are_compared_at_the_highest_kl_that_both_have(runs: dict[str, Run]) -> None:
    """First reaches .7 nats and wins .4 a nat, second .5 nats and .3 a nat."""
    first = straight(runs["exponential"], 0.4, (0.1, 0.3), 0.7)
    second = straight(runs["exponential"], 0.3, (0.2, 0.4), 0.5)
    found = compare(first, second, names=("a", "b"))
    assert found.equal_kl == pytest.approx(0.5)
    at = found.at_equal_kl["sampling"]
    assert (at.run, at.baseline) == (pytest.approx(0.7, abs=1e-3), pytest.approx(0.65, abs=1e-3))
    assert at.difference.mean == pytest.approx(0.05, abs=2e-3)
    assert found.win_rates["sampling"].difference.mean == pytest.approx(0.78 - 0.65, abs=2e-3), "not at equal KL"
    # All that is uncertain is the KL, of which both have the same prompts: (.4 − .3) · its standard error, ± 1.96.
    error = first.arrays["kl"].std(ddof=1) / np.sqrt(len(first.arrays["kl"]))
    low, high = at.difference.bounds
    assert high - low == pytest.approx(2 * 1.96 * 0.1 * error, rel=0.25)
    assert at.excludes_zero and compare(second, first, names=("b", "a")).equal_kl == pytest.approx(0.5)


def test_the_words_say_where_the_kl_is_equal(runs: dict[str, Run]) -> None:
    found = compare(runs["exponential"], runs["identity"], names=("a", "b"))
    assert found.equal_kl == pytest.approx(synthetic.KL)
    assert f"at equal KL, {synthetic.KL:.3f} nats along both trainings" in sentences(found)
    apart = compare(runs["exponential"], runs["plain"], names=("a", "c"))
    assert apart.equal_kl is None and apart.at_equal_kl == {} and "equal KL" not in sentences(apart)


def test_each_curve_is_drawn_with_its_band_over_the_ideals(runs: dict[str, Run]) -> None:
    [panel] = along.panels(runs, "best_of_4")
    assert "2 runs" in panel.description, "the third was not measured along its training"
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows([panel]):
        series.setdefault(row["series"], []).append((float(row["x"]), float(row["y"])))
    for name, kls in {"exponential": (0.2, 0.45, synthetic.KL), "identity": (0.25, 0.6, synthetic.KL)}.items():
        found = curve(runs[name], "best_of_4")
        assert found is not None
        points = np.array(series[f"{name}, measured"])
        np.testing.assert_allclose(points[:, 0], kls, atol=1e-4)
        np.testing.assert_allclose(points[:, 1], 100 * np.asarray(found.win_rate).mean(axis=1), rtol=1e-4)
        assert series[f"{name}, trained"] == series[f"{name}, measured"][-1:]
        line, low, high = (np.array(series[label]) for label in (name, f"{name}, low", f"{name}, high"))
        np.testing.assert_allclose(np.interp(points[:, 0], *line.T), points[:, 1], rtol=1e-3)
        assert (low[:, 1] < line[:, 1]).all() and (line[:, 1] < high[:, 1]).all()
        with double_precision():
            interval = comparison.at_kl(found, float(np.asarray(found.kl)[1].mean()), jax.random.key(0))
        middle = np.array([np.interp(points[1, 0], *one.T) for one in (low, high)]) / 100
        np.testing.assert_allclose(middle, interval[1:], atol=2e-3)
    ideal = np.array(series["ideal identity"])
    np.testing.assert_allclose(
        ideal[:, 1], 100 * ideals.win_rates("identity", "best_of_4", ideals.kl_grid(ideal[-1, 0])), rtol=1e-4
    )
    assert {"ideal exponential(10)", "best possible"} <= series.keys()
    legend = drawn(panel).get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == [
        "exponential(10)", "identity", "ideal policies", "best possible",
    ]  # fmt: skip


def test_there_is_no_panel_without_points_along_the_training(runs: dict[str, Run]) -> None:
    assert along.panels({"plain": runs["plain"]}, "best_of_4") == []
    assert along.panels(runs, "worst_of_16") == []


def test_a_runs_own_page_shows_its_points(runs: dict[str, Run], tmp_path: pathlib.Path) -> None:
    run = runs["exponential"]
    before = [(point.kl.mean, 100 * point.win_rates["best_of_4"].mean) for point in run.evaluation.along]
    found = marks(drawn(frontier.panels(run)[0]))
    assert len(before) == 2 and len(found) == 3
    np.testing.assert_allclose(sorted(found)[:2], before)
