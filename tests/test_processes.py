"""Several processes compute what one does, and go on where others stopped."""

import json
import os
import signal
import time
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from ctrl_jax.models import lora
from ctrl_jax.runtime.checkpoints import Checkpoints
from ctrl_jax.runtime.metrics import read_metrics
from ctrl_jax.runtime.preemption import EXIT_CODE
from tests.devices import test_programs
from tests.processes import Job, run
from tests.trained import COMPILE_FAST, CommandLine

pytestmark = pytest.mark.usefixtures("compile_fast")


# A second step, after a first one that was made elsewhere.
PROGRAM = """
import sys
from contextlib import closing
from pathlib import Path
from ctrl_jax.runtime import hosts
hosts.start()
import jax, numpy as np
from ctrl_jax.models import lora
from ctrl_jax.runtime.checkpoints import Checkpoints
from ctrl_jax.devices.mesh import make_mesh
from tests.devices import test_programs
jax.config.update("jax_disable_most_optimizations", True)
folder, make, fsdp = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
step, state, batch = getattr(test_programs, make)(make_mesh(fsdp=fsdp))
with closing(Checkpoints(folder / "checkpoints", fingerprint="f00d")) as checkpoints:
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    index, state, data = checkpoints.restore(jax.tree.map(place, state))
assert index == 1 and data == {"next": 1}
frozen, second = batch(1)
drawn = {}
if make == "policy":
    rollouts = step.sample(lora.overlay(frozen, state.params), second.prompts, step.key(state.step))
    drawn["tokens"] = hosts.fetch(rollouts).responses.tokens
state, metrics = hosts.fetch(step(state, frozen, second))
if hosts.first():
    moments = {f"moment {i}": leaf for i, leaf in enumerate(jax.tree.leaves(state.optimizer))}
    np.savez(folder / "found.npz", **drawn, **{f"metric {name}": x for name, x in metrics.items()}, **moments)
hosts.wait("done")
"""


@pytest.mark.parametrize(
    ("make", "processes", "fsdp"),
    [
        ("sft", 2, 1),
        *(pytest.param("policy", *sizes, marks=pytest.mark.slow) for sizes in ((2, 1), (2, 2), (4, 1), (4, 2))),
    ],
)
def test_processes_go_on_from_the_checkpoint_of_eight_devices(tmp_path, make, processes, fsdp):
    step, state, batch = getattr(test_programs, make)(test_programs.mesh_of(8))
    state, _ = step(state, *batch(0))
    with closing(Checkpoints(tmp_path / "checkpoints", fingerprint="f00d")) as checkpoints:
        checkpoints.save(1, state, {"next": 1})
    run(PROGRAM, processes, str(tmp_path), make, str(fsdp), timeout=600)

    frozen, second = batch(1)
    with np.load(tmp_path / "found.npz") as found:
        if make == "policy":
            drawn = step.sample(lora.overlay(frozen, state.params), second.prompts, step.key(state.step))
            np.testing.assert_array_equal(found["tokens"], drawn.responses.tokens)
        state, metrics = step(state, frozen, second)
        for name, value in metrics.items():
            np.testing.assert_allclose(found[f"metric {name}"], value, rtol=1e-5, atol=1e-5, err_msg=name)
        for index, leaf in enumerate(jax.tree.leaves(state.optimizer)):
            np.testing.assert_allclose(found[f"moment {index}"], leaf, rtol=1e-4, atol=1e-6)


# The second phase numbers its steps as the first did. Each takes its time: a notice of SIGTERM needs some seconds.
STOPPED = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from ctrl_jax.runtime import hosts
hosts.start()
import jax, numpy as np
from ctrl_jax.pipeline import rollouts
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.runtime.preemption import Preempted
from tests.runtime.test_loop import train
folder, last, victims = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
mesh, done = make_mesh(), []
def slow(step):
    done.append(step)
    time.sleep(0.5)
def respond(batch):
    slow(len(done))
    return batch
try:
    train(folder / "one", mesh, steps=12)
    if str(jax.process_index()) in victims:
        os.kill(os.getpid(), signal.SIGTERM)
    if last == "training":
        train(folder / "two", mesh, steps=12, before=slow)
    else:
        rollouts.prompts_at_a_time = lambda *_: 1
        experiment = SimpleNamespace(data=None)
        run = SimpleNamespace(mesh=mesh, architecture=None, experiment=experiment)
        rollouts.in_batches(run, "sampling", respond, np.arange(24), rows_per_prompt=1)
except Preempted as stopped:
    sys.stdout.write(f"\\n{len(done)} {stopped}\\n")
    sys.exit(75)
"""


@pytest.mark.parametrize(("last", "victims"), [("training", "1"), ("sampling", "01")])
def test_sigterm_between_two_phases_stops_all_processes_after_the_same_step(tmp_path, last, victims):
    one, other = Job(STOPPED, 2, arguments=(str(tmp_path), last, victims)).wait(120)
    assert one.code == other.code == EXIT_CODE, one.errors[-3000:]
    told, same = (ended.printed.splitlines()[-1] for ended in (one, other))
    assert told == same
    done, message = told.split(" ", 1)
    assert 0 < int(done) < 12
    saved = f" sum: step {done} of 12 is saved in {tmp_path}/two." if last == "training" else ""
    assert message == f"Stopped by SIGTERM.{saved}"


TRAIN = """
import sys
from ctrl_jax.__main__ import main
sys.exit(main(["train", "smoke", "--runs-dir", sys.argv[1], "--cache-dir", sys.argv[2]]))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The work directory of `train smoke` in one process."""
    folder = tmp_path_factory.mktemp("one")
    code, _, errors = CommandLine(folder / "runs", folder / "cache").run("train")
    assert code == 0, errors
    return folder / "runs" / "smoke"


def numbers_and_words(work_dir: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Of the report, by their paths; times are not results."""
    evaluation = json.loads((work_dir / "evaluation.json").read_text())
    evaluation.pop("timings")
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(evaluation)}
    words = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, str)}
    return {path: leaf for path, leaf in leaves.items() if path not in words}, words


def assert_same_report(found: Path, expected: Path) -> None:
    assert (found / "report" / "index.html").exists()
    (numbers, words), (other_numbers, other_words) = numbers_and_words(found), numbers_and_words(expected)
    assert words == other_words
    # SFT, reward model and the draws of the reference are the same, and so are the first steps of the policy. Then a
    # rounding turns a token somewhere, and what is drawn and learned from there on is another sample of the same run.
    arrays, others = np.load(found / "evaluation.npz"), np.load(expected / "evaluation.npz")
    for name in ("reference_rewards", "reference_gold", "reference_lengths"):
        np.testing.assert_allclose(arrays[name], others[name], rtol=1e-5, atol=1e-5)
    steps, other_steps = (read_metrics(folder / "metrics.jsonl") for folder in (found, expected))
    for name in ("kl", "raw_reward", "calibrated_reward", "loss", "gradient_norm"):
        np.testing.assert_allclose(steps[name][:3], other_steps[name][:3], rtol=1e-3, atol=1e-4)
    assert numbers == pytest.approx(other_numbers, rel=0.1, abs=0.15)
    assert (found / "samples.jsonl").read_text().count("\n") == (expected / "samples.jsonl").read_text().count("\n")


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_one_of_them_writes(undisturbed, tmp_path):
    first, other = run(TRAIN, 2, str(tmp_path / "runs"), str(tmp_path / "cache"), options=COMPILE_FAST, timeout=600)
    assert_same_report(tmp_path / "runs" / "smoke", undisturbed)
    assert "Report:" in first.printed
    # What jax's communication says of itself.
    assert all(line.startswith("[Gloo]") for line in other.printed.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_other_and_one_process_goes_on(undisturbed, tmp_path, victim):
    runs, cache = tmp_path / "runs", tmp_path / "cache"
    job = Job(TRAIN, 2, arguments=(str(runs), str(cache)), options=COMPILE_FAST)
    while not list(runs.glob("smoke/checkpoints/[0-9]*/checksums.json")):
        assert all(process.poll() is None for process in job.processes), job.wait(1)
        time.sleep(0.05)
    os.kill(job.processes[victim].pid, signal.SIGKILL)
    survivor = job.processes[1 - victim]
    survivor.wait(60)
    told = job.wait(1)[1 - victim].errors
    assert survivor.returncode not in (0, -signal.SIGKILL)
    assert survivor.returncode != EXIT_CODE or "goes on from the last checkpoint" in told
    code, _, errors = CommandLine(runs, cache).run("train")
    assert code == 0, errors
    assert_same_report(runs / "smoke", undisturbed)


@pytest.mark.slow
def test_a_process_with_other_options_is_named_by_all(tmp_path):
    program = TRAIN.replace('"smoke",', '"smoke", *extra,')
    options = {"process_0": "extra = []", "process_1": 'extra = ["--policy.kl-budget", "0.5"]'}
    job = Job(program, 2, arguments=(str(tmp_path / "runs"), str(tmp_path / "cache")), **options)
    for ended in job.wait(120):
        assert ended.code == 2
        assert "process 1 on " in ended.errors
        assert "experiment.policy.kl_budget is 0.5, elsewhere 0.75" in ended.errors
    assert not (tmp_path / "runs").exists()
