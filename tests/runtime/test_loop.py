"""The training loop on a step that a test can see through."""

import contextlib
import itertools
import os
import re
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctrl_jax.algorithms.sft import Sft
from ctrl_jax.commands.experiments import load_experiment
from ctrl_jax.data.pipelines import batches
from ctrl_jax.devices import parameters, programs
from ctrl_jax.devices.mesh import make_mesh, replicate
from ctrl_jax.devices.programs import TrainState
from ctrl_jax.errors import InputError
from ctrl_jax.models import lora, networks
from ctrl_jax.pipeline import assembly, optimizers, replay
from ctrl_jax.rewards.reward import scorer
from ctrl_jax.runtime import loop, preemption
from ctrl_jax.runtime.checkpoints import Checkpoints
from ctrl_jax.runtime.compilations import compilations
from ctrl_jax.runtime.loop import lowest_loss, open_training
from ctrl_jax.runtime.metrics import MetricWriter, read_metrics
from ctrl_jax.runtime.preemption import Preempted
from ctrl_jax.runtime.stages import read_arrays, write_arrays
from ctrl_jax.types import PolicyBatch, Prompts

DATA = np.arange(1, 9, dtype=np.float32)


def train(
    directory, mesh, *, steps=6, every=2, diverges_at=None, data=None, before=None, score=lowest_loss,
    opened=open_training, rest_at=(), rested=None,
):  # fmt: skip
    """Sums its batches into the parameter."""

    def step(state, batch):
        loss = batch.sum()
        if diverges_at is not None:
            loss = jnp.where(state.step + 1 == diverges_at, jnp.nan, loss)
        metrics = {"loss": loss, "gradient_norm": loss, "gradient_norms": loss[None]}
        return programs.Change({"final_norm": {"scale": -batch.sum()[None]}}), metrics

    optimizer, params = optax.sgd(1.0), {"final_norm": {"scale": jnp.zeros(1)}}
    step = programs.guarded(mesh, optimizer, step, Sft(None, 1).guarded)

    def counted(state, batch):
        if before is not None:
            before(int(state.step) + 1)
        return step(state, batch)

    with opened(
        "sum",
        replicate(mesh, TrainState(jnp.int32(0), params, optimizer.init(params))),
        batches(DATA, batch_size=8, seed=0) if data is None else data,
        metrics=Sft.metrics,
        devices=programs.Devices(mesh),
        steps=steps,
        checkpoint_every=every,
        directory=directory,
        fingerprint="sum",
        rest_at=rest_at,
    ) as training:
        take(training, counted, score, rested)
    return float(training.state.params["final_norm"]["scale"][0])


def take(training, step, score=lowest_loss, rested=None):
    """The loop as pipeline/train.py has it."""
    for update in training.updates(step):
        training.refuse_unsound(update)
        rows = training.report(update)
        if update.at_rest and rested is not None:
            rested[update.step] = float(training.state.params["final_norm"]["scale"][0])
        training.save(update, score=score(rows))


def test_takes_its_steps_and_goes_on_where_it_stopped(tmp_path, mesh):
    assert train(tmp_path, mesh, steps=4) == 4 * DATA.sum()
    assert train(tmp_path, mesh, steps=7) == 7 * DATA.sum()
    np.testing.assert_array_equal(read_metrics(tmp_path / "metrics.jsonl")["step"], np.arange(1, 8))
    assert train(tmp_path, mesh, steps=7) == 7 * DATA.sum()


def checkpoints(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize("diverges_at", [1, 3, 4, 6])
def test_a_step_that_is_not_finite_is_kept_and_not_made(tmp_path, mesh, diverges_at):
    """The state before it is the newest checkpoint, though a later step was dispatched; from there it goes on."""
    with pytest.raises(InputError, match=rf"sum: step {diverges_at} was not made: the loss is nan.*smaller") as error:
        train(tmp_path, mesh, diverges_at=diverges_at)
    assert "(in 1 of 1 parameters, final_norm.scale the first)" in str(error.value)
    assert checkpoints(tmp_path)[-1] == diverges_at - 1
    kept = read_arrays(tmp_path / "failed" / f"step-{diverges_at}.npz")
    assert sorted(kept["all"]) == sorted(DATA)
    np.testing.assert_array_equal(read_metrics(tmp_path / "metrics.jsonl")["step"], np.arange(1, diverges_at))
    assert train(tmp_path, mesh) == 6 * DATA.sum()


@pytest.mark.parametrize("first_bad", [3, None])
def test_replay_takes_the_kept_batch_from_the_kept_state(tmp_path, mesh, capsys, first_bad):
    with pytest.raises(InputError):
        train(tmp_path, mesh, diverges_at=3)
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_arrays(tmp_path / "failed" / "step-3.npz", all=DATA * 10)
    with pytest.raises(replay.Replayed):
        train(tmp_path, mesh, diverges_at=first_bad, opened=replay.open_training)
    printed = capsys.readouterr().out
    assert "sum, step 3 again" in printed
    assert ("First to go wrong: loss." in printed) == (first_bad is not None)
    assert ("Every quantity is finite" in printed) == (first_bad is None)
    if first_bad is None:
        assert f"{10 * DATA.sum():.4g}" in printed, "it is the batch that was kept"
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(contents)


def test_a_training_without_a_failed_step_is_not_replayed(tmp_path, mesh):
    with pytest.raises(InputError, match=r"no failed step to replay.* at step 0 of 6"):
        train(tmp_path, mesh, opened=replay.open_training)
    train(tmp_path, mesh, steps=4)
    with pytest.raises(InputError, match="at step 4 of 6"):
        train(tmp_path, mesh, opened=replay.open_training)
    assert train(tmp_path, mesh, steps=4, opened=replay.open_training) == 4 * DATA.sum()


def test_a_reward_that_fails_leaves_the_step_to_be_taken_again(tmp_path, mesh):
    def fail(step):
        if step == 4:
            raise InputError("The reward broken:reward returned nan for response 3.")

    with pytest.raises(InputError, match="sum: step 4 was not made: The reward broken:reward returned nan"):
        train(tmp_path, mesh, before=fail)
    assert checkpoints(tmp_path)[-1] == 3
    assert train(tmp_path, mesh) == 6 * DATA.sum()


def test_an_update_is_reported_after_the_next_is_dispatched_and_at_once_before_a_checkpoint(tmp_path, mesh):
    """So that the devices never wait for the host to read."""
    happened = []
    write, save = MetricWriter.write, Checkpoints.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MetricWriter,
            "write",
            lambda self, step, values: happened.append(f"read {step}") or write(self, step, values),
        )
        patch.setattr(
            Checkpoints,
            "save",
            lambda self, step, *a, **o: happened.append(f"save {step}") or save(self, step, *a, **o),
        )
        train(tmp_path, mesh, steps=5, every=3, before=lambda step: happened.append(f"dispatch {step}"))
    assert happened == [
        "dispatch 1", "dispatch 2", "read 1", "dispatch 3", "read 2", "read 3", "save 3",
        "dispatch 4", "dispatch 5", "read 4", "read 5", "save 5",
    ]  # fmt: skip


def test_the_state_rests_at_further_steps_and_comes_to_the_same_end(tmp_path, mesh):
    rested = {}
    assert train(tmp_path, mesh, every=4, rest_at=(1, 3), rested=rested) == 6 * DATA.sum()
    assert rested == {step: step * DATA.sum() for step in (1, 3, 4, 6)}


def test_a_row_of_metrics_has_how_far_the_parameters_moved(tmp_path, mesh):
    train(tmp_path, mesh, steps=4)
    moved = read_metrics(tmp_path / "metrics.jsonl")["largest_update"]
    np.testing.assert_array_equal(moved, [DATA.sum()] * 4)


def test_sigterm_saves_the_step_at_hand_and_the_same_call_goes_on(tmp_path, mesh):
    def terminate(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="sum: step 3 of 6 is saved"):
        train(tmp_path, mesh, before=terminate)
    assert checkpoints(tmp_path) == [2, 3]
    assert train(tmp_path, mesh) == 6 * DATA.sum()
    np.testing.assert_array_equal(read_metrics(tmp_path / "metrics.jsonl")["step"], np.arange(1, 7))


def test_a_step_in_which_ctrl_c_was_swallowed_is_not_kept(tmp_path, mesh):
    """As by a reward function that catches everything, and returns something else than it would have."""

    def interrupt(step):
        if step == 4:
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), preemption.raising():
        train(tmp_path, mesh, before=interrupt)
    assert checkpoints(tmp_path) == [2]
    assert train(tmp_path, mesh) == 6 * DATA.sum()


def test_an_error_that_a_signal_became_is_no_step_that_failed(tmp_path, mesh):
    def interrupt(step):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            raise InputError("the reward returned None") from None

    with pytest.raises(KeyboardInterrupt), preemption.raising():
        train(tmp_path, mesh, before=interrupt)
    assert not (tmp_path / "failed").exists()


def test_a_checkpoint_counts_only_on_rows_that_are_on_disk(tmp_path, mesh, monkeypatch):
    synced, saved = {}, {}
    fsync, save = os.fsync, Checkpoints.save

    def noted(descriptor):
        fsync(descriptor)
        file = os.fstat(descriptor)
        synced[file.st_ino] = file.st_size

    def saving(self, step, *arguments, **options):
        rows = (tmp_path / "metrics.jsonl").stat()
        saved[step] = synced.get(rows.st_ino) == rows.st_size
        save(self, step, *arguments, **options)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Checkpoints, "save", saving)
    train(tmp_path, mesh)
    assert saved == {2: True, 4: True, 6: True}


def test_a_clock_that_jumps_changes_nothing(tmp_path, mesh, monkeypatch):
    jumps = itertools.cycle([1e9, 2e9, 0.0, 1.5e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    assert train(tmp_path, mesh, steps=3) == 3 * DATA.sum()
    assert train(tmp_path, mesh) == 6 * DATA.sum()
    seconds = read_metrics(tmp_path / "metrics.jsonl")["seconds"]
    assert (seconds >= 0).all() and seconds.max() < 600


def test_the_best_checkpoint_stays_whatever_interrupts(tmp_path, mesh):
    """The score is of the last rows, those before an interruption too: it peaks at step 4."""

    def score(recent):
        assert [row["step"] for row in recent] == [*range(max(1, recent[-1]["step"] - 4), recent[-1]["step"] + 1)]
        return -abs(recent[-1]["step"] - 4)

    train(tmp_path, mesh, steps=6, score=score)
    train(tmp_path, mesh, steps=10, score=score)
    assert checkpoints(tmp_path) == [4, 8, 10]


class Growing:
    """Batches of which some are longer than those before."""

    def __init__(self, *sizes):
        self.sizes = iter(sizes)

    def __next__(self):
        return np.ones(next(self.sizes), np.float32)

    def get_state(self):
        return {}


@pytest.mark.parametrize(("sizes", "told"), [((8, 8, 8, 8), []), ((8, 8, 16, 24), [3]), ((16, 8, 8, 8), [2])])
def test_a_step_that_compiles_again_is_told_once(tmp_path, mesh, capsys, sizes, told):
    assert train(tmp_path, mesh, steps=4, data=Growing(*sizes)) == sum(sizes)
    printed = " ".join(capsys.readouterr().out.split())
    assert [int(step) for step in re.findall(r"step (\d+) compiled `[^`]*step[^`]*` again", printed)] == told
    assert printed.count("again") == len(told)


def test_the_steps_of_the_smoke_run_compile_each_program_once(tmp_path, monkeypatch, request):
    jax.config.update("jax_disable_most_optimizations", True)  # nearly all of the time is LLVM's
    request.addfinalizer(lambda: jax.config.update("jax_disable_most_optimizations", False))
    experiment = load_experiment("smoke").experiment()
    settings, mesh = experiment.policy, make_mesh(1)
    parts = networks.create(experiment.model.architecture(512), experiment.model.lora)
    reference = parameters.init_decoder(parts, mesh, jax.random.key(0))
    reward = lora.overlay(*parameters.adapt_reward(parts, mesh, jax.random.key(1), reference))
    score, optimizer = scorer(parts, mesh), optimizers.policy(settings)
    algorithm = assembly.algorithm(parts, mesh, settings, beta=0.2, num_references=16, eos_ids=(1,))
    step = assembly.policy_step(
        parts, mesh, settings, algorithm, optimizer, lambda *batch: score(reward, *batch),
        key=jax.random.key(2), max_length=experiment.data.response_length, eos_ids=(1,),
    )  # fmt: skip
    size = experiment.calibration.prompts
    prompts = Prompts(np.ones((size, 40), np.int32), np.full(size, 7, np.int32), np.arange(size, dtype=np.uint32))
    rewards = np.zeros((size, 16), np.float32)
    compiled = []

    @contextlib.contextmanager
    def counted():
        with compilations() as found:
            yield found
        compiled.append(sorted(found))

    monkeypatch.setattr(loop, "compilations", counted)
    with open_training(
        "smoke",
        programs.init_state(reference, optimizer, mesh, algorithm.start()),
        batches(PolicyBatch(prompts, rewards), batch_size=settings.prompts_per_step, seed=0),
        metrics=algorithm.metrics,
        devices=programs.Devices(mesh),
        steps=4,
        checkpoint_every=2,
        directory=tmp_path,
        fingerprint="smoke",
    ) as training:
        take(training, lambda state, batch: step(state, reference, batch))
    first, *others = compiled
    assert len(first) >= 4 and {"sample", "update"} <= {name.removeprefix("jit(").rstrip(")") for name in first}
    assert others == [[]] * 3, "after the first step, at checkpoints, and behind them"
