"""Which points of a sweep are compared with which, and what is printed and written of it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from ctrl_jax import config
from ctrl_jax.commands import report, sweep, sweep_comparisons, sweep_points
from ctrl_jax.commands.point import Point
from ctrl_jax.commands.sweep_comparisons import compared
from ctrl_jax.errors import InputError
from ctrl_jax.report.measurements import read_run
from ctrl_jax.report.status import Status
from tests.report import synthetic
from tests.report.pages import visible

NAMES = ("sampling", "best_of_4", "worst_of_4")


def point(folder: Path, name: str, transform: str, kl: float, *, procedure: str = "best_of_4", seed: int = 0) -> Point:
    policy = config.Policy(transform=transform, procedure=procedure)
    work_dir = folder / name
    synthetic.write_work_dir(
        work_dir, transform=transform, procedure=procedure, kl=kl, seed=seed, names=NAMES, along=(0.2,), samples=1
    )
    return Point(config.Experiment(name, policy=policy), work_dir)


@pytest.fixture(scope="module")
def points(tmp_path_factory) -> list[Point]:
    """Two budgets of two transforms, a point that was evaluated beside another reference, and one for worst-of-4."""
    folder = tmp_path_factory.mktemp("runs") / "bon.sweep"
    return [
        point(folder, "identity_low", "identity", 0.5),
        point(folder, "identity_high", "identity", 1.0),
        point(folder, "exponential_low", "exponential(10)", 0.55),
        point(folder, "exponential_high", "exponential(10)", 0.9),
        point(folder, "another_seed", "exponential(10)", 0.55, seed=1),
        point(folder, "worst", "exponential(-10)", 0.5, procedure="worst_of_4"),
    ]


def pairs(points: list[Point], baseline: str) -> dict[str, str]:
    return {one.run: one.baseline for one in compared(points, baseline).comparisons}


def test_a_point_is_compared_with_the_nearest_of_the_baseline(points):
    assert pairs(points, "identity") == {
        "exponential_low": "identity_low",
        "exponential_high": "identity_high",
    }
    assert pairs(points, "exponential(10)") == {
        "identity_low": "exponential_low",
        "identity_high": "exponential_high",
    }


def test_a_baseline_may_be_a_point(points):
    assert pairs(points, "identity_low") == {
        "identity_high": "identity_low",
        "exponential_low": "identity_low",
        "exponential_high": "identity_low",
        "worst": "identity_low",
    }


def test_a_point_beside_another_reference_is_not_compared_and_it_says_why(points):
    beside = compared(points, "identity")
    assert list(beside.runs) == [one.name for one in points]
    assert [note for note in beside.notes if note.startswith("another_seed is not compared: another_seed and identity")]
    assert len(beside.notes) == 1
    assert compared(points, "raw").comparisons == [] == compared(points, "raw").notes


def test_one_that_cannot_be_read_is_named_and_the_others_are_compared(points, tmp_path):
    broken = Point(points[0].experiment, tmp_path / "nowhere")
    beside = compared([broken, *points[1:]], "identity")
    assert {one.run: one.baseline for one in beside.comparisons} == {
        "exponential_low": "identity_high",
        "exponential_high": "identity_high",
    }
    assert any(note.startswith("identity_low is not compared: ") for note in beside.notes)


def test_the_console_has_the_differences_and_says_what_they_mean(points, capsys):
    beside = compared(points[:4], "identity")
    sweep_comparisons.show(beside)
    printed = " ".join(capsys.readouterr().out.split())
    assert "paired 95 % intervals" in printed and printed.count("the interval") >= 2
    found = beside.comparisons[0].win_rates["best_of_4"].difference
    assert f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]" in re.sub(r"[│┃|] *", "", printed)
    sweep_comparisons.show(compared([], "identity"))
    assert capsys.readouterr().out == ""


def statuses(points: list[Point]) -> list[Status]:
    return [
        Status(
            one.name,
            one.experiment.policy.transform,
            one.experiment.policy.procedure,
            0.75,
            "done",
            evaluation=read_run(one.work_dir).evaluation,
        )
        for one in points
    ]


def test_the_sweeps_files_have_the_differences(points, monkeypatch, tmp_path):
    found = {one.name: status for one, status in zip(points, statuses(points), strict=True)}
    monkeypatch.setattr(sweep_points, "_status", lambda one, *_: found[one.name])
    page, beside = sweep_points.publish(tmp_path, points, baseline="identity")
    tree = json.loads((tmp_path / "differences.json").read_text())
    assert beside.comparisons == compared(points, "identity").comparisons
    assert tree == {
        "baseline": "identity",
        "comparisons": [one.as_json() for one in beside.comparisons],
        "methods": [one.as_json() for one in beside.at_equal_kl],
        "overoptimization": [],
    }
    (equal,) = tree["methods"]
    assert (equal["method"], equal["baseline"]) == ("exponential(10)", "identity")
    assert equal["difference"] == beside.at_equal_kl[0].difference.as_json()
    words = visible(page.read_text())
    for one in beside.comparisons:
        estimate = one.win_rates["best_of_4"].difference
        shown = f"{100 * estimate.mean:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]".replace("-", "−")
        assert f"{one.run} {one.baseline} {shown}" in words
        kl = f"{one.kl.difference.mean:+.3f} [{one.kl.difference.low:+.3f}, {one.kl.difference.high:+.3f}]"
        assert kl.replace("-", "−") in words and f"at {one.equal_kl:.3f} nats" in words
    found = beside.at_equal_kl[0]
    assert f"exponential(10) identity, best-of-4 {found.kl:.3f} {100 * found.difference.run:.1f} %" in words
    assert "another_seed is not compared" in words and "On the same prompts" in words
    assert {path.name for path in tmp_path.glob("along_*.png")} == {"along_best_of_4.png", "along_worst_of_4.png"}


def test_a_point_that_is_done_says_how_far_its_kl_went(points, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep_points, "is_done", lambda point: True)
    (status,) = [sweep_points._status(one, tmp_path, False) for one in points[:1]]
    kl = read_run(points[0].work_dir).metrics["kl"]
    assert status.highest_kl == pytest.approx(max(kl[i : i + 5].mean() for i in range(len(kl) - 4)))
    assert status.as_json()["highest_kl"] == status.highest_kl
    calibration = config.Calibration(keep_responses=True)
    stored = config.Experiment("stored", policy=config.GroupProjection(), calibration=calibration)
    estimated = sweep_points._status(points[0]._replace(experiment=stored), tmp_path, False)
    assert estimated.evaluation is not None and estimated.highest_kl is None


def test_while_points_are_to_come_nothing_is_compared(points, tmp_path, monkeypatch):
    """It would be done again whenever one of many ends."""
    sweep_points.publish(tmp_path, points, compare=False)
    tree = json.loads((tmp_path / "differences.json").read_text())
    assert tree["comparisons"] == tree["methods"] == []
    asked = []
    monkeypatch.setattr(sweep_points, "publish", lambda *_, compare, **__: asked.append(compare))
    monkeypatch.setattr(sweep_points, "_run_noted", lambda *_: None)
    for all_done in (False, True):
        monkeypatch.setattr(sweep_points, "is_done", lambda point, all_done=all_done: all_done or point != points[-1])
        run = SimpleNamespace(experiment=points[0].experiment, work_dir=points[0].work_dir)
        sweep_points.run_point(run, tmp_path, points)
    assert asked == [False, True]
    # One that has failed for good keeps nobody waiting.
    monkeypatch.setattr(sweep_points, "is_done", lambda point: point != points[-1])
    monkeypatch.setattr(sweep_points, "read_record", lambda _: sweep_points.Record(2, "too little data"))
    sweep_points.run_point(run, tmp_path, points)
    assert asked[-1] is True


def test_a_page_without_a_baseline_has_no_differences(points, tmp_path):
    page = report.write_sweep_report(tmp_path, statuses(points[:1]), {}, [], [])
    assert "On the same prompts" not in page.read_text()


def test_an_unknown_baseline_is_refused(points):
    sweep_comparisons.check(points[2:], "identity")
    sweep_comparisons.check(points, "exponential(10)")
    sweep_comparisons.check(points, "worst")
    with pytest.raises(InputError, match=r"`baseline` is 'identiti'; give a transform or a point of the sweep: ident"):
        sweep_comparisons.check(points, "identiti")


def test_the_process_of_a_point_gets_the_baseline(points):
    command = sweep._command_of_point(sweep_comparisons, ["--baseline", "worst", "--jobs", "2"])(points[0])
    assert command[-4:] == ["--point", "identity_low", "--baseline", "worst"]


SWEEP = """
from ctrl_jax.config import Experiment, grid

BASELINE = "exponential(10)"


def experiment():
    return Experiment("mine")


def sweep():
    return grid(experiment(), transforms=("identity", "exponential(10)"), kl_budgets=(0.5,))
"""


@pytest.mark.parametrize(("options", "baseline"), [([], "exponential(10)"), (["--baseline", "identity"], "identity")])
def test_a_sweep_may_name_its_own_baseline(tmp_path, monkeypatch, options, baseline):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SWEEP)
    assert sweep.main(["mine.py", "--write-jobs", "jobs", *options]) == 0
    (found,) = Path("runs").glob("*.sweep/differences.json")
    assert json.loads(found.read_text())["baseline"] == baseline


@pytest.mark.parametrize(
    ("policies", "baseline"),
    [
        ([config.Policy(), config.Policy(transform="identity"), config.ActorCritic(transform="identity")], "identity"),
        ([config.ActorCritic(), config.ActorCritic(transform="identity")], "identity with a critic"),
        ([config.ActorCritic(transform="identity"), config.PpoClip(transform="identity")], "identity"),
        ([config.Policy()], "identity"),
        ([config.Policy(), config.Policy(transform="identity", floors=(0.5,))], "identity"),
    ],
    ids=["CTRL's own", "the only one", "neither of two", "absent", "with floors"],
)
def test_by_default_it_is_the_identity_whatever_the_algorithm_that_has_it(tmp_path, policies, baseline):
    combine = config.Combine(rewards=("rewards:brevity",))
    made = [
        Point(config.Experiment(f"p{i}", policy=policy, combine=combine), tmp_path) for i, policy in enumerate(policies)
    ]
    assert sweep_comparisons.of_identity(made) == baseline


def test_a_sweep_with_several_policies_of_a_reward_says_where_it_is_highest(tmp_path, capsys):
    sweep_dir = tmp_path / "s"
    few = [point(sweep_dir, f"a{kl}", "exponential(10)", kl) for kl in (0.3, 0.6, 1.0)]
    sweep_comparisons.show(compared(few, "identity"))
    assert "KL where rewards are highest" not in capsys.readouterr().out
    sweep_points.publish(sweep_dir, few)
    assert not list(sweep_dir.glob("overoptimization*"))
    beside = compared([*few, point(sweep_dir, "a1.5", "exponential(10)", 1.5)], "identity")
    sweep_comparisons.show(beside)
    said = capsys.readouterr().out
    assert "KL where rewards are highest" in said
    (method,) = beside.laws
    for judge in ("proxy", "gold"):
        assert re.search(rf"exponential\(10\) +│ +{judge} +│ +{method.seeds[0].told(judge)} │ +– │", said), said
    missing = [Status("a0.3", "exponential(10)", "best_of_4", 0.3, "missing")]
    written = report.write_sweep_report(sweep_dir, missing, beside.runs, [], [], laws=beside.laws)
    assert "Overoptimisation" in visible(written.read_text())
    assert {path.suffix for path in sweep_dir.glob("overoptimization*")} == {".png", ".svg", ".pdf", ".csv"}
