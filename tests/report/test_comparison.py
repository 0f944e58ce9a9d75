"""Two work directories with one reference: paired differences beside NumPy, and what cannot be compared."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

import ctrl_jax as cj
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline.stages import TABLE
from ctrl_jax.report import comparison
from ctrl_jax.report.comparison import Comparison, Difference, compare, sentences
from ctrl_jax.report.measurements import Run, read_run
from tests.report import synthetic

NAMES = ("sampling", "best_of_4")
LABELS = ("exponential", "identity")


def read(folder: pathlib.Path, **options: Any) -> Run:
    return read_run(synthetic.write_work_dir(folder, names=NAMES, **options))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return read(folder / "a"), read(folder / "b", transform="identity", kl=0.7)


@pytest.fixture(scope="module")
def compared(runs: tuple[Run, Run]) -> Comparison:
    return compare(*runs, names=LABELS)


def per_prompt(run: Run, judge: str) -> np.ndarray:
    """Win rates of best-of-4 on each prompt, by the procedure's weights of the ordered picks."""
    picks = {side: np.argsort(run.arrays[f"{side}_rewards"], axis=1) for side in ("policy", "reference")}
    ours, theirs = (np.take_along_axis(run.arrays[f"{side}_{judge}"], order, axis=1) for side, order in picks.items())
    weights = np.asarray(cj.best_of(4).order_weights(ours.shape[1]))
    wins = (np.sign(ours[:, :, None] - theirs[:, None, :]) + 1) / 2
    return np.einsum("bij,i,j->b", wins, weights, weights)


@pytest.mark.parametrize(("table", "judge"), [("win_rates", "rewards"), ("gold_win_rates", "gold")])
def test_a_difference_is_that_of_the_prompts(
    runs: tuple[Run, Run], compared: Comparison, table: str, judge: str
) -> None:
    ours, theirs = (per_prompt(run, judge) for run in runs)
    found = getattr(compared, table)["best_of_4"]
    # Ties in the rewards, which the rounding of the fake makes, are picked here in some order.
    tolerance = 1e-6 if judge == "rewards" else 2e-3
    assert (found.run, found.baseline) == (
        pytest.approx(ours.mean(), abs=tolerance),
        pytest.approx(theirs.mean(), abs=tolerance),
    )
    expected = cj.difference(ours, theirs)
    assert found.difference == pytest.approx(tuple(expected), abs=2 * tolerance)
    assert found.run == pytest.approx(getattr(runs[0].evaluation, table)["best_of_4"].mean, abs=2e-3)


def test_the_kl_is_compared_too(runs: tuple[Run, Run], compared: Comparison) -> None:
    assert compared.kl is not None
    assert compared.kl.difference == pytest.approx(tuple(cj.difference(*(run.arrays["kl"] for run in runs))), abs=1e-6)
    assert compared.kl.difference.mean == pytest.approx(synthetic.KL - 0.7)
    old = dataclasses.replace(runs[1], arrays={k: v for k, v in runs[1].arrays.items() if k != "kl"})
    assert compare(runs[0], old, names=LABELS).kl is None


def test_the_judge_is_compared_where_it_is_the_same(runs: tuple[Run, Run], compared: Comparison) -> None:
    assert set(compared.judge_win_rates) == set(NAMES)
    evaluation = dataclasses.replace(runs[1].evaluation, judge_fingerprint="another")
    other = compare(runs[0], dataclasses.replace(runs[1], evaluation=evaluation), names=LABELS)
    assert other.judge_win_rates == {} and other.gold_win_rates == compared.gold_win_rates


def test_a_run_beside_itself_has_no_difference(runs: tuple[Run, Run]) -> None:
    found = compare(runs[0], runs[0], names=("a", "b")).win_rates["best_of_4"]
    assert found.difference == (0.0, None, None)
    assert found.excludes_zero is None and found.verdict == "no interval"


@pytest.mark.parametrize(
    ("change", "field", "values"),
    [
        ({"evaluation": {"prompts": 41, "procedures": []}}, "evaluation.prompts", (40, 41)),
        ({"data": {"source": "tldr"}}, "data.source", ("dialogues/helpful", "tldr")),
        ({"seed": 3}, "seed", (0, 3)),
        ({"contents": {"reward_function": {"a": 1}}}, "contents.reward_function.a", (None, 1)),
        ({"name": "other"}, "reference_rewards", None),
    ],
)
def test_another_reference_is_refused_with_the_option_that_made_it(
    runs: tuple[Run, Run], tmp_path: pathlib.Path, change: dict[str, Any], field: str, values: Any
) -> None:
    other = read(tmp_path / "a", seed=1)
    other = dataclasses.replace(other, config={**runs[0].config, **change})
    with pytest.raises(InputError, match="exponential and identity were not evaluated beside") as caught:
        compare(runs[0], other, names=LABELS)
    assert (caught.value.field, caught.value.value) == (field, values)
    assert caught.value.remedy and caught.value.remedy in str(caught.value)
    # Options that the reference's evaluation does not depend on may differ.
    free = {**runs[1].config, "policy": {**runs[1].config["policy"], "learning_rate": 1.0}}
    assert compare(runs[0], dataclasses.replace(runs[1], config=free), names=LABELS)


def test_a_baseline_without_the_runs_procedure_is_refused(runs: tuple[Run, Run]) -> None:
    few = {"sampling": runs[1].evaluation.win_rates["sampling"]}
    other = dataclasses.replace(runs[1], evaluation=dataclasses.replace(runs[1].evaluation, win_rates=few))
    with pytest.raises(InputError, match=r"trained for best_of_4, under which identity was not.*with best_of_4 too"):
        compare(runs[0], other, names=LABELS)


def test_what_the_references_evaluation_depends_on_is_what_its_stage_reads() -> None:
    stages = {stage.name: stage for stage in TABLE}

    def reads(name: str) -> set[str]:
        stage = stages[name]
        return {*stage.reads.values()}.union(*(reads(need) for need in stage.needs.values() if need != "files"))

    named = comparison.OF_THE_REFERENCE
    read = reads("reference_evaluation")
    assert all(any(path == name or path.startswith(f"{name}.") for name in named) for path in read)
    # What is in `combine`, the reward's fingerprint has.
    assert all(name in ("contents", "combine") or any(path.startswith(name) for path in read) for name in named)


def test_it_says_in_words_whether_the_interval_excludes_zero(compared: Comparison) -> None:
    def said(mean: float, low: float | None, high: float | None) -> str:
        one = Difference(0.6 + mean, 0.6, cj.Interval(mean, low, high))  # type: ignore[arg-type]
        return sentences(dataclasses.replace(compared, win_rates={"best_of_4": one}))

    assert said(0.042, 0.021, 0.063) == (
        "exponential wins 4.2 points more than identity under best-of-4: the interval [+2.1, +6.3] excludes 0."
    )
    assert said(-0.042, -0.063, -0.021).startswith("exponential wins 4.2 points less than identity")
    assert said(0.01, -0.02, 0.04) == (
        "40 prompts show no difference between exponential and identity under best-of-4: +1.0 points, and the "
        "interval [−2.0, +4.0] includes 0."
    )
    assert said(0.01, None, None) == "exponential less identity under best-of-4: +1.0 points, without an interval."


def test_its_json_has_every_number(compared: Comparison) -> None:
    tree = json.loads(json.dumps(compared.as_json()))
    assert (tree["run"], tree["baseline"], tree["prompts"], tree["procedure"]) == (*LABELS, 40, "best_of_4")
    found = compared.win_rates["best_of_4"]
    assert tree["win_rates"]["best_of_4"] == {
        "run": found.run,
        "baseline": found.baseline,
        "difference": {"mean": found.difference.mean, "low": found.difference.low, "high": found.difference.high},
        "excludes_zero": found.excludes_zero,
    }
    assert set(tree["gold_win_rates"]) == set(NAMES) and tree["kl"]["difference"]["mean"] > 0
