"""A sweep of two points whose training and evaluation are fakes: what it does again, and what it leaves alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ctrl_jax import config
from ctrl_jax.errors import InputError
from ctrl_jax.jobs import evaluate, report, summary, sweep, train
from ctrl_jax.jobs.run import Run
from ctrl_jax.runtime.mesh import make_mesh
from ctrl_jax.runtime.stages import write_json

INTERVAL = {"mean": 0.6, "low": 0.55, "high": 0.65}
EVALUATION = {
    "kl": {"mean": 0.5, "low": 0.45, "high": 0.55},
    "kl_budget": 0.5,
    "win_rates": {"sampling": INTERVAL, "best_of_4": INTERVAL},
    "gold_win_rates": {"sampling": INTERVAL, "best_of_4": INTERVAL},
    "ideal": {name: {"identity": 0.6, "transform": 0.6, "optimal": 0.6} for name in ("sampling", "best_of_4")},
    "reward_model": {"accuracy": 0.7, "ece": 0.1},
    "ties": 0.0,
    "timings": {"train": 1.0},
}


@pytest.fixture
def points(tmp_path) -> list[Run]:
    experiments = config.grid(config.Experiment("base"), transforms=("identity", "logit"), kl_budgets=(0.5,))
    mesh = make_mesh(1)
    return [Run(one, tmp_path / "sweep" / one.name, tmp_path / "stages", mesh) for one in experiments]


@pytest.fixture
def done(monkeypatch) -> list[str]:
    """What was done, in order: `evaluate NAME`, `report NAME`."""
    log: list[str] = []

    def evaluated(run: Run, aligned: None) -> dict:
        log.append(f"evaluate {run.experiment.policy.transform}")
        write_json(run.work_dir / "evaluation.json", EVALUATION)
        return EVALUATION

    def reported(work_dir: Path) -> Path:
        log.append(f"report {json.loads((work_dir / 'config.json').read_text())['policy']['transform']}")
        page = work_dir / "report" / "index.html"
        page.parent.mkdir(exist_ok=True)
        page.write_text("a page")
        return page

    monkeypatch.setattr(train, "run", lambda run: None)
    monkeypatch.setattr(evaluate, "run", evaluated)
    monkeypatch.setattr(report, "run", reported)
    monkeypatch.setattr(summary, "print_run", lambda *_: None)
    return log


EVERYTHING = ["evaluate identity", "report identity", "evaluate logit", "report logit"]


def test_all_points_run_once_and_end_in_the_figure(points, done, tmp_path, capsys):
    assert sweep.run(tmp_path / "sweep", points) == 0
    assert done == EVERYTHING
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert all(f"{point.experiment.name}/report/index.html" in page for point in points)
    assert (tmp_path / "sweep" / "pareto_best_of_4.png").exists()
    assert "sweep.html" in capsys.readouterr().out

    assert sweep.run(tmp_path / "sweep", points) == 0
    assert done == EVERYTHING, "the same command does nothing again"


@pytest.mark.parametrize("error", [InputError("too little data"), RuntimeError("a bug")])
def test_a_point_that_fails_does_not_take_the_others_with_it(points, done, tmp_path, monkeypatch, capsys, error):
    def failing(run: Run) -> None:
        if run.experiment.policy.transform == "identity":
            raise error

    monkeypatch.setattr(train, "run", failing)
    assert sweep.run(tmp_path / "sweep", points) == 1
    assert done == ["evaluate logit", "report logit"]
    printed = capsys.readouterr()
    assert f"{points[0].experiment.name} failed: {error}" in printed.out
    assert ("Traceback" in printed.err) == isinstance(error, RuntimeError)
    assert "1 of 2 runs evaluated" in (tmp_path / "sweep" / "sweep.html").read_text()

    monkeypatch.setattr(train, "run", lambda run: None)
    assert sweep.run(tmp_path / "sweep", points) == 0
    assert done == ["evaluate logit", "report logit", "evaluate identity", "report identity"]


def test_a_point_killed_before_its_report_gets_it_on_the_next_run(points, done, tmp_path, monkeypatch):
    written = report.run

    def killed(work_dir: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(tmp_path / "sweep", points)
    assert done == ["evaluate identity"]
    monkeypatch.setattr(report, "run", written)
    assert sweep.run(tmp_path / "sweep", points) == 0
    assert done == EVERYTHING


def test_two_points_of_one_name_are_refused_before_any_runs(points, done, tmp_path):
    with pytest.raises(InputError, match=r"called 'identity_kl0.5'.*rename one"):
        sweep.run(tmp_path / "sweep", [points[0], points[0]])
    assert done == []


def test_a_place_taken_by_another_experiment_is_refused_before_any_runs(points, done, tmp_path):
    write_json(points[1].work_dir / "config.json", {"name": "other"})
    with pytest.raises(InputError, match="belongs to another experiment"):
        sweep.run(tmp_path / "sweep", points)
    assert done == []


def test_two_points_that_an_option_made_equal_are_refused(tmp_path, mesh):
    base = config.Experiment("base")
    points = [Run(replace(base, name=name), tmp_path / name, tmp_path / "stages", mesh) for name in ("one", "two")]
    with pytest.raises(InputError, match="'one' and 'two' of the sweep are the same experiment"):
        sweep.run(tmp_path / "sweep", points)
    assert not (tmp_path / "one").exists()


def test_a_sweep_without_points_is_refused(tmp_path):
    with pytest.raises(InputError, match="no points"):
        sweep.run(tmp_path / "sweep", [])
