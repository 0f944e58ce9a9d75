"""A sweep: its points one after another, sharing all stages, and the Pareto figure of those that are done."""

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from ctrl_jax.errors import InputError
from ctrl_jax.jobs import evaluate, report, summary, train
from ctrl_jax.jobs.run import Run
from ctrl_jax.runtime.console import say, table
from ctrl_jax.runtime.stages import plain, read_json


def run(sweep_dir: Path, points: Sequence[Run]) -> int:
    """Runs the points that are not done, and writes `sweep.html` and the Pareto figure after each.

    A point that fails is reported, and the others go on. Returns 1 if one failed, else 0. The same command resumes.
    """
    names = [point.experiment.name for point in points]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"Two points of the sweep are called {twice!r}, and would share a work directory; rename one.")
    settings = [{**plain(point.experiment), "name": None} for point in points]
    for index in range(len(points)):
        if settings[index] in settings[:index]:
            same = names[settings.index(settings[index])]
            raise InputError(
                f"The points {same!r} and {names[index]!r} of the sweep are the same experiment. If an option "
                "made them so, leave it out: a sweep sets what its points differ in."
            )
    if not points:
        raise InputError("The sweep has no points; let sweep() return at least one experiment.")
    for point in points:
        point.claim()
    failed: dict[str, str] = {}
    for index, point in enumerate(points, 1):
        name = point.experiment.name
        if not _done(point):
            say(f"[bold]{index}/{len(points)} {name}")
            try:
                evaluation = evaluate.read(point) or evaluate.run(point, train.run(point))
                summary.print_run(point, evaluation, report.run(point.work_dir))
            except Exception as error:  # one point must not take the others with it
                failed[name] = str(error)
                say(f"[red]{name} failed: {escape(str(error))}")
                if not isinstance(error, InputError):
                    traceback.print_exc()
        page = report.write_sweep_report(sweep_dir, [_state(point, sweep_dir, failed) for point in points])
    _print(points)
    say(f"Pareto figure and table: {page}")
    return 1 if failed else 0


def _state(point: Run, sweep_dir: Path, failed: dict[str, str]) -> dict[str, Any]:
    done, page = _done(point), _page(point)
    policy = point.experiment.policy
    return {
        "name": point.experiment.name,
        "transform": policy.transform,
        "procedure": policy.procedure,
        "kl_budget": policy.kl_budget,
        "state": "done" if done else "failed" if point.experiment.name in failed else "missing",
        "evaluation": read_json(point.work_dir / "evaluation.json") if done else None,
        "report": str(page.relative_to(sweep_dir)) if page.exists() and page.is_relative_to(sweep_dir) else None,
    }


def _done(point: Run) -> bool:
    # The page comes last: a kill between evaluation and report leaves the point without one.
    return (point.work_dir / "evaluation.json").exists() and _page(point).exists()


def _page(point: Run) -> Path:
    return point.work_dir / "report" / "index.html"


def _print(points: Sequence[Run]) -> None:
    rows = []
    for point in points:
        path = point.work_dir / "evaluation.json"
        if path.exists():
            evaluation, procedure = read_json(path), point.experiment.policy.procedure
            cells = [evaluation["kl"], evaluation["win_rates"][procedure], evaluation["win_rates"]["sampling"]]
            rows.append([point.experiment.name, *map(summary.estimate, cells)])
        else:
            rows.append([point.experiment.name, "failed", "", ""])
    table("sweep", ["point", "KL, nats per response", "win rate, procedure", "win rate, sampling"], rows)
