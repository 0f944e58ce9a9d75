"""A sweep whose points are small programs in place of trainings: what runs, what is tried again, the index."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ctrl_jax import config
from ctrl_jax.commands import report, summary, sweep_processes
from ctrl_jax.commands import sweep_points as sweep
from ctrl_jax.commands.point import Point
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import align, evaluate, randomness, results
from ctrl_jax.pipeline.workspace import Workspace, claimed, contents
from ctrl_jax.runtime import preemption
from ctrl_jax.runtime.preemption import Preempted
from ctrl_jax.runtime.shares import Share
from ctrl_jax.runtime.stages import read_json, write_json
from tests.processes import run as processes_together
from tests.trained import COMPILE_FAST, ROOT

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
ALL = Share(1, {}, None)

START = """
import json, os, pathlib, signal, sys, time
work, name = pathlib.Path(sys.argv[1]), sys.argv[2]
sweep_dir, others = work.parent, work.parent.parent
runs = work / "runs"
runs.mkdir(parents=True, exist_ok=True)
(runs / str(len(list(runs.iterdir())))).touch()
first = len(list(runs.iterdir())) == 1
def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.01)
"""
FINISH = f"""
(work / "report").mkdir(exist_ok=True)
(work / "evaluation.json").write_text({json.dumps(EVALUATION)!r})
(work / "results.json").write_text((others / "results" / f"{{work.name}}.json").read_text())
(work / "report" / "index.html").write_text("a page")
"""


@pytest.fixture
def points(tmp_path) -> list[Point]:
    experiments = config.grid(config.Experiment("base"), transforms=("identity", "logit"), kl_budgets=(0.5,))
    found = [Point(one, tmp_path / "sweep" / one.name) for one in experiments]
    for point in found:  # what their programs write last
        sealed = tmp_path / "results" / point.name
        write_json(sealed / "evaluation.json", "")
        (sealed / "evaluation.json").write_text(json.dumps(EVALUATION))
        results.seal(sealed, claimed(point.experiment, contents(point.experiment)))
        os.replace(sealed / "results.json", sealed.with_name(f"{sealed.name}.json"))
    return found


@pytest.fixture
def page(tmp_path) -> Path:
    """Where the sweep's page is written; a test that does not ask for it does without, and is faster."""
    return tmp_path / "sweep" / "sweep.html"


@pytest.fixture(autouse=True)
def no_page(request, monkeypatch):
    if "page" not in request.fixturenames:
        monkeypatch.setattr(report, "write_sweep_report", lambda sweep_dir, *_: sweep_dir / "sweep.html")


@pytest.fixture
def run(points, tmp_path):
    """Runs the sweep with points that execute some Python before they write their results."""

    def call(body: str = "", *, shares: tuple[Share, ...] = (ALL,)) -> int:
        def command(point: Point) -> list[str]:
            return [sys.executable, "-c", START + body + FINISH, str(point.work_dir), point.experiment.policy.transform]

        return sweep_processes.run(tmp_path / "sweep", points, command, shares)

    return call


@pytest.fixture
def index(tmp_path) -> Callable[[], dict[str, dict]]:
    """What sweep.json says of each transform."""
    path = tmp_path / "sweep" / "sweep.json"
    return lambda: {point["transform"]: point for point in read_json(path)["points"]}


def processes(point: Point) -> int:
    """How many were started for it."""
    return len(list((point.work_dir / "runs").iterdir()))


def states(index: Callable[[], dict[str, dict]]) -> dict[str, str]:
    return {name: point["state"] for name, point in index().items()}


def test_all_points_run_once_and_end_in_the_figure(points, run, index, page, capsys):
    assert run("print('working on', name)") == 0
    text = page.read_text()
    assert all(f"{point.name}/report/index.html" in text for point in points)
    assert page.with_name("pareto_best_of_4.png").exists()
    printed = capsys.readouterr().out
    assert "sweep.html" in printed
    assert "working on" not in printed, "each point writes to a log of its own"
    assert (points[0].work_dir / "log.txt").read_text() == "working on identity\n"
    assert states(index) == {"identity": "done", "logit": "done"}

    assert run() == 0
    assert [processes(point) for point in points] == [1, 1], "the same command does nothing again"


@pytest.mark.parametrize("names", [("evaluation.json",), ("evaluation.json", "results.json")])
def test_results_of_another_point_are_not_taken_for_its_own(points, run, index, names):
    assert run() == 0
    (points[1].work_dir / "evaluation.json").write_text(json.dumps({**EVALUATION, "ties": 0.5}))
    for name in names:
        (points[0].work_dir / name).write_bytes((points[1].work_dir / name).read_bytes())
    sweep.publish(points[0].work_dir.parent, points)
    assert states(index) == {"identity": "missing", "logit": "missing"}
    assert run() == 0
    assert [processes(point) for point in points] == [2, 2]


def test_points_run_at_the_same_time_each_with_its_share(points, run):
    cores = sorted(os.sched_getaffinity(0))
    shares = (Share(1, {"CUDA_VISIBLE_DEVICES": "0,1"}, frozenset(cores[:1])),
              Share(1, {"CUDA_VISIBLE_DEVICES": "2,3"}, frozenset(cores[-1:])))  # fmt: skip
    met = "wait_for(lambda: len(list(sweep_dir.glob('*/runs'))) == 2)\n"
    told = "print(os.environ['CUDA_VISIBLE_DEVICES'], *os.sched_getaffinity(0))\n"
    assert run(met + told, shares=shares) == 0
    given = {(point.work_dir / "log.txt").read_text() for point in points}
    assert given == {f"0,1 {cores[0]}\n", f"2,3 {cores[-1]}\n"}


def test_the_index_and_the_page_follow_the_points(points, run, page):
    told = "states = lambda: [p['state'] for p in json.loads((sweep_dir / 'sweep.json').read_text())['points']]\n"
    shown = "wait_for(lambda: (sweep_dir / 'sweep.json').exists() and 'running' in states())\n"
    written = "page = sweep_dir / 'sweep.html'\n"
    written += "wait_for(lambda: page.exists() and f'{states().count(\"done\")} of 2' in page.read_text())\n"
    assert run(told + shown + written + "print(*states())\n") == 0
    assert [(point.work_dir / "log.txt").read_text() for point in points] == ["running missing\n", "done running\n"]


def test_a_point_that_fails_is_tried_once_more_and_the_others_go_on(points, run, index, page, capsys):
    assert run("if name == 'identity':\n    sys.exit('error: too little data')\n") == 1
    assert [processes(point) for point in points] == [2, 1]
    assert states(index) == {"identity": "failed", "logit": "done"}
    assert index()["identity"]["attempts"] == 2
    assert index()["identity"]["reason"] == "error: too little data"
    printed = capsys.readouterr().out
    assert printed.count(f"{points[0].name} failed and will be tried again: error: too little data") == 1
    assert printed.count(f"{points[0].name} failed: error: too little data") == 1
    assert "1 of 2 runs evaluated" in page.read_text()
    assert f"{points[0].name} failed: error: too little data" in page.read_text()

    assert run() == 0
    assert [processes(point) for point in points] == [3, 1]
    assert index()["identity"]["attempts"] == 3
    assert index()["identity"]["reason"] is None


def test_a_point_killed_by_the_system_counts_as_failed_once(points, run, index, capsys):
    assert run("if first and name == 'identity':\n    os.kill(os.getpid(), signal.SIGKILL)\n") == 0
    assert [processes(point) for point in points] == [2, 1]
    assert states(index) == {"identity": "done", "logit": "done"}
    assert index()["identity"]["attempts"] == 2
    assert "It was killed by SIGKILL." in capsys.readouterr().out


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)])
def test_a_sweep_that_is_told_to_stop_ends_its_points_and_resumes(points, run, index, number, raised):
    saves = "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)))\n"
    asks = f"if first:\n    os.kill(os.getppid(), signal.{number.name})\n    time.sleep(60)\n"
    with pytest.raises(raised):
        run(saves + asks)
    assert (points[0].work_dir / "log.txt").read_text() == "saved\n"
    assert states(index) == {"identity": "missing", "logit": "missing"}
    assert not (points[1].work_dir / "runs").exists()
    assert run() == 0
    assert states(index) == {"identity": "done", "logit": "done"}


def test_a_point_that_does_not_stop_is_killed(points, run, index, monkeypatch):
    monkeypatch.setattr(sweep_processes, "GRACE", 0.0)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)\n"
    with pytest.raises(KeyboardInterrupt):
        run(f"(work / 'pid').write_text(str(os.getpid()))\n{deaf}")
    with pytest.raises(ProcessLookupError):
        os.kill(int((points[0].work_dir / "pid").read_text()), 0)
    assert states(index) == {"identity": "missing", "logit": "missing"}


def test_a_point_with_a_number_that_no_evaluation_can_have_is_failed(points, run, index, page):
    assert run() == 0
    (points[0].work_dir / "evaluation.json").write_text(json.dumps({**EVALUATION, "ties": float("nan")}))
    results.seal(points[0].work_dir, claimed(points[0].experiment, contents(points[0].experiment)))
    sweep.publish(page.parent, points)
    assert states(index) == {"identity": "failed", "logit": "done"}
    assert f"evaluation.json of {points[0].name} has nan at ties" in index()["identity"]["reason"]
    assert f"{points[0].name} failed: evaluation.json of" in page.read_text()


@pytest.fixture
def alone(points, tmp_path, monkeypatch):
    """Runs a point in this process, with fakes for its training, evaluation and report."""

    def evaluated(run: Workspace, aligned: None) -> dict:
        write_json(run.work_dir / "evaluation.json", EVALUATION)
        results.seal(run.work_dir, run.claimed_config, draws=randomness.draws())
        return EVALUATION

    def reported(work_dir: Path) -> Path:
        page = work_dir / "report" / "index.html"
        page.parent.mkdir(exist_ok=True)
        page.write_text("a page")
        return page

    monkeypatch.setattr(align, "prepare", lambda workspace: workspace)
    monkeypatch.setattr(evaluate, "run", evaluated)
    monkeypatch.setattr(report, "write", reported)
    monkeypatch.setattr(summary, "print_run", lambda *_: None)

    def call(point: Point, training: Callable[[Workspace], None]) -> None:
        monkeypatch.setattr(align, "policy", training)
        sweep.run_point(
            Workspace(point.experiment, point.work_dir, tmp_path / "stages", make_mesh(1)), tmp_path / "sweep", points
        )

    return call


def raising(error: BaseException) -> Callable[[Workspace], None]:
    def training(run: Workspace) -> None:
        raise error

    return training


def test_a_point_alone_keeps_the_index_that_its_sweep_would(points, alone, index, tmp_path):
    seen = []

    def training(run: Workspace) -> None:
        sweep.publish(tmp_path / "sweep", points)  # as another batch job does that ends meanwhile
        seen.append(states(index))

    alone(points[0], training)
    assert seen == [{"identity": "running", "logit": "missing"}]
    assert states(index) == {"identity": "done", "logit": "missing"}
    alone(points[0], raising(AssertionError("a point that is done is left alone")))
    assert index()["identity"]["attempts"] == 1


ON_SEVERAL_HOSTS = """
import json, sys
from pathlib import Path
from ctrl_jax.runtime import hosts
hosts.start()
from ctrl_jax import config

from ctrl_jax.commands import sweep_points as sweep
from ctrl_jax.commands import train
from ctrl_jax.pipeline import results
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.devices.mesh import make_mesh
folder, runs = Path(sys.argv[1]), []
point = sweep.Point(config.Experiment("a"), folder / "a")
def together(run):
    runs.append(run)
    hosts.wait("aligned")
    if hosts.first():  # files are the first's to write: another that wrote them anew would empty what was sealed
        (folder / "a" / "report").mkdir(parents=True, exist_ok=True)
        for name in ("evaluation.json", "report/index.html"):
            (folder / "a" / name).write_text("{}")
    results.seal(run.work_dir, run.claimed_config)
train.align, sweep.publish = together, lambda *_, **__: None
for _ in range(2):
    sweep.run_point(Workspace(point.experiment, point.work_dir, folder / "stages", make_mesh()), folder, [point])
    hosts.wait("the job is done")
sys.stdout.write(f"\\n{len(runs)} runs\\n")
"""


def test_a_point_that_is_done_is_left_alone_by_all_hosts(tmp_path):
    ended = processes_together(ON_SEVERAL_HOSTS, 2, str(tmp_path), timeout=30)
    assert [one.printed.splitlines()[-1] for one in ended] == ["1 runs"] * 2


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (InputError("too little data"), "failed", "too little data"),
        (RuntimeError("a bug"), "failed", "RuntimeError: a bug"),
        (KeyboardInterrupt(), "missing", None),
        (Preempted(), "missing", None),
    ],
)
def test_a_point_alone_notes_why_it_failed_unless_it_was_told_to_stop(points, alone, index, error, state, reason):
    with pytest.raises(type(error)):
        alone(points[0], raising(error))
    assert (index()["identity"]["state"], index()["identity"]["reason"]) == (state, reason)
    assert index()["identity"]["attempts"] == 1


def test_a_point_whose_signal_became_an_error_has_not_failed(points, alone, index):
    def wrapped(run):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise ValueError("Failed to restore") from None

    with pytest.raises(Preempted), preemption.raising():
        alone(points[0], wrapped)
    assert index()["identity"]["state"] == "missing"


def test_damaged_records_of_a_point_lose_no_policy(points, run, index, page):
    assert run() == 0
    # Neither file holds a policy: the first is made anew by the point, the second counts attempts.
    (points[0].work_dir / "evaluation.json").write_text('{"kl": ')
    (points[1].work_dir / "point.json").write_text("[" * 100_000)
    sweep.publish(page.parent, points)
    assert states(index) == {"identity": "missing", "logit": "done"}
    assert run() == 0
    assert states(index) == {"identity": "done", "logit": "done"}
    assert [processes(point) for point in points] == [2, 1]


def test_a_judge_that_is_given_later_has_yet_to_judge(points, run, index):
    assert run() == 0
    judged = [
        Point(replace(point.experiment, evaluation=config.Evaluation(judge="a:b")), point.work_dir) for point in points
    ]
    assert [sweep.is_done(point) for point in judged] == [False, False]
    write_json(points[0].work_dir / "evaluation.json", {**EVALUATION, "judge": {"name": "a:b", "fingerprint": "x"}})
    results.seal(points[0].work_dir, claimed(points[0].experiment, contents(points[0].experiment)))
    assert [sweep.is_done(point) for point in judged] == [True, False]
    assert [sweep.is_done(point) for point in points] == [True, True]


def test_the_index_tells_a_batch_job_that_was_killed(points, tmp_path, index):
    # What run_point leaves behind when its process vanishes: its first note, and no lock.
    sweep.note(points[0], 1, sweep.UNSAID)
    sweep.publish(tmp_path / "sweep", points)
    assert states(index) == {"identity": "failed", "logit": "missing"}
    assert "ended without a word" in index()["identity"]["reason"]


def test_batch_jobs_are_scripts_that_run_their_point(points, tmp_path, index):
    def command(point: Point) -> list[str]:
        return [sys.executable, "-c", START + FINISH, str(point.work_dir), "a name; with $odd 'characters'"]

    jobs = tmp_path / "jobs"
    sweep.write_jobs(tmp_path / "sweep", points, command, jobs)
    assert states(index) == {"identity": "missing", "logit": "missing"}
    scripts = sorted(jobs.iterdir())
    assert [script.name for script in scripts] == [f"{point.name}.sh" for point in points]
    for script, point in zip(scripts, points, strict=True):
        subprocess.run([str(script)], cwd=tmp_path, check=True)
        assert processes(point) == 1
    sweep.publish(tmp_path / "sweep", points)
    assert states(index) == {"identity": "done", "logit": "done"}


def test_no_name_becomes_a_command_of_a_batch_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    owned = tmp_path / "owned"
    hostile = f"a'b\"c\ntouch {owned}\n$(touch {owned})"
    experiment = replace(config.Experiment("base"), name=hostile.replace("/", "_"))
    sweep_dir, jobs = tmp_path / "x\ntouch owned\n#", tmp_path / "jobs"
    point = Point(experiment, sweep_dir / "work")
    program = "import pathlib, sys; pathlib.Path('ran').write_text(sys.argv[1])"
    sweep.write_jobs(sweep_dir, [point], lambda point: [sys.executable, "-c", program, hostile], jobs)
    (script,) = jobs.iterdir()
    subprocess.run([str(script)], cwd=tmp_path, check=True)
    assert (Path.cwd() / "ran").read_text() == hostile
    assert not owned.exists() and not (tmp_path / "owned").exists()


def test_two_points_of_one_name_are_refused(points):
    with pytest.raises(InputError, match=r"called 'identity_kl0.5'.*rename one"):
        sweep.check([points[0], points[0]])


def test_a_place_taken_by_another_experiment_is_refused(points):
    write_json(points[1].work_dir / "config.json", {"name": "other"})
    with pytest.raises(InputError, match="belongs to another experiment"):
        sweep.check(points)
    assert not points[0].work_dir.exists()


def test_two_points_that_an_option_made_equal_are_refused(tmp_path):
    base = config.Experiment("base")
    with pytest.raises(InputError, match="'one' and 'two' of the sweep are the same experiment"):
        sweep.check([Point(replace(base, name=name), tmp_path / name) for name in ("one", "two")])


def test_a_batch_that_a_points_devices_do_not_divide_is_refused(points):
    with pytest.raises(InputError, match="do not divide by the 7 devices"):
        sweep.check(points, devices=7)


def test_a_sweep_without_points_is_refused():
    with pytest.raises(InputError, match="no points"):
        sweep.check([])


def test_a_point_is_found_by_its_name(points):
    assert sweep.find(points, "logit_kl0.5") is points[1]
    with pytest.raises(InputError, match=r"no point 'logit'; it has identity_kl0.5, logit_kl0.5"):
        sweep.find(points, "logit")


SMOKE_SWEEP = '''"""Two points of smoke."""
import importlib.util
from ctrl_jax.config import grid
spec = importlib.util.spec_from_file_location("smoke", {smoke!r})
smoke = importlib.util.module_from_spec(spec)
spec.loader.exec_module(smoke)
experiment = smoke.experiment
def sweep():
    return grid(experiment(), transforms=("identity", "logit"), kl_budgets=(0.5,))
'''


@pytest.mark.slow
def test_two_real_points_at_once_make_what_they_share_once(tmp_path):
    path = tmp_path / "smoke_sweep.py"
    path.write_text(SMOKE_SWEEP.format(smoke=str(ROOT / "experiments" / "smoke.py")))
    arguments = ["--jobs", "2", "--runs-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache")]
    environment = {**os.environ, "XLA_FLAGS": COMPILE_FAST, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    ran = subprocess.run(
        [sys.executable, "-m", "ctrl_jax", "sweep", str(path), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (sweep_dir,) = (tmp_path / "runs").glob("*.sweep")
    index = read_json(sweep_dir / "sweep.json")["points"]
    assert [(point["state"], point["attempts"]) for point in index] == [("done", 1), ("done", 1)]
    stages = [stage.name.rsplit("-", 1)[0] for stage in (tmp_path / "runs" / "stages").iterdir()]
    assert sorted(stages) == ["calibration", "data", "reference_evaluation", "reward_model", "sft"]
    logs = [(sweep_dir / point["name"] / "log.txt").read_text() for point in index]
    # Twenty steps of SFT were taken by one of the two.
    assert sum("reference policy (sft) 20/20" in log for log in logs) == 1
