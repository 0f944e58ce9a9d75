"""Early stopping: which step's parameters a training gives, whatever happened to it on the way."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctrl_jax import config
from ctrl_jax.algorithms.sft import Sft
from ctrl_jax.data.pipelines import ExampleSet
from ctrl_jax.devices import programs
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.evaluation import RewardTraining
from ctrl_jax.pipeline import reward_model, supervised
from ctrl_jax.pipeline.replay import open_training as replay
from ctrl_jax.pipeline.validation import LOSS, Validation
from ctrl_jax.runtime.loop import open_training
from ctrl_jax.runtime.metrics import MetricWriter, read_metrics
from ctrl_jax.runtime.stages import Stage
from ctrl_jax.types import Metric
from tests import assembled
from tests.test_supervised_oracle import BATCH, REWARD_START, bradley_terry, examples, reward

EVERY, PATIENCE, STEPS = 2, 3, 21
START = 10.0


class Training:
    """A parameter that goes down by 1 a step, and what the validation says of it."""

    def __init__(self, folder: Path, losses: dict[int, float], *, devices: int = 1, steps: int = STEPS):
        self.folder, self.losses, self.mesh, self.steps = folder, losses, make_mesh(devices), steps
        self.taken: list[int] = []

    def measure(self, params: Any) -> dict[str, float]:
        """By the step that the parameters are of: they are given after all the steps that they say, and no more."""
        return {LOSS: self.losses.get(round(START - float(params["final_norm"]["scale"][0])), 9.0)}

    def run(self, *, opened: Any = open_training, before: Any = None, patience: int = PATIENCE) -> float:
        """The parameter that is used."""
        optimizer = optax.sgd(1.0)

        def take(state: programs.TrainState, frozen: Any, batch: Any) -> Any:
            loss = batch.mean()
            metrics = {"loss": loss, "gradient_norm": loss, "gradient_norms": loss[None]}
            return programs.Change({"final_norm": {"scale": jnp.ones(1)}}), metrics

        compiled = programs.guarded(self.mesh, optimizer, take, Sft(None, 1).guarded)

        def counted(state: programs.TrainState, *others: Any) -> Any:
            self.taken.append(int(state.step) + 1)
            if before is not None:
                before(self.taken[-1])
            return compiled(state, *others)

        options = config.Supervised(steps=self.steps, batch_size=8, warmup_steps=1, checkpoint_every=5)
        run: Any = SimpleNamespace(
            experiment=SimpleNamespace(seed=0, reward_model=options), mesh=self.mesh, open_training=opened
        )
        validation = Validation(EVERY, patience, self.steps, 1, self.measure, (Metric(LOSS, "nats"),))
        stage = Stage.open(self.folder, "reward_model", {})
        done = supervised.train(
            run, stage, "reward model", "reward_model",
            start={"final_norm": {"scale": jnp.full(1, START)}}, frozen={}, optimizer=optimizer, step=counted,
            examples=np.arange(8, dtype=np.float32), batch_size=8, metrics=Sft.metrics, validation=validation,
        )  # fmt: skip
        return float(done.params["final_norm"]["scale"][0])

    @property
    def rows(self) -> dict[int, float]:
        """The validation losses that the metrics have, by step."""
        (path,) = self.folder.glob("reward_model-*/metrics.jsonl")
        found = read_metrics(path)
        return {int(step): loss for step, loss in zip(found["step"], found[LOSS], strict=True) if np.isfinite(loss)}

    @property
    def checkpoints(self) -> Path:
        (path,) = self.folder.glob("reward_model-*/checkpoints")
        return path


FALLS_AND_RISES = {2: 0.9, 4: 0.7, 6: 0.5, 8: 0.6, 10: 0.5, 12: 0.8}
"""The best is step 6: an equal one later is no better. Three validations later, it stops."""


@pytest.mark.parametrize("devices", [1, 8])
def test_it_stops_when_nothing_is_better_and_uses_the_best(tmp_path, devices):
    training = Training(tmp_path, FALLS_AND_RISES, devices=devices)
    assert training.run() == START - 6
    assert training.taken == list(range(1, 13))
    assert training.rows == pytest.approx(FALLS_AND_RISES)
    assert training.run() == START - 6 and training.taken == list(range(1, 13)), "it is read, and not trained on"


def test_without_a_rise_all_steps_are_made_and_the_last_is_validated_too(tmp_path):
    losses = {step: 1 / step for step in [*range(2, STEPS, 2), STEPS]}
    training = Training(tmp_path, losses)
    assert training.run() == START - STEPS
    assert training.rows == pytest.approx(losses)


def test_one_that_waits_longer_finds_what_comes_later(tmp_path):
    losses = {**FALLS_AND_RISES, 14: 0.4}
    assert Training(tmp_path / "short", losses).run() == START - 6
    assert Training(tmp_path / "long", losses).run(patience=4) == START - 14


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2, 3, 5, 7, 11, 12])
def test_a_killed_one_ends_as_one_that_was_not(tmp_path, at):
    def kill(step: int) -> None:
        if step == at and len(training.taken) == at:
            raise Killed

    training = Training(tmp_path, FALLS_AND_RISES)
    with pytest.raises(Killed):
        training.run(before=kill)
    assert training.run() == START - 6
    assert training.taken[-1] == 12 and training.rows == pytest.approx(FALLS_AND_RISES)


def test_one_that_is_killed_between_its_last_row_and_its_checkpoint_validates_again(tmp_path, monkeypatch):
    write = MetricWriter.write

    def killed(self: MetricWriter, step: int, values: dict[str, float]) -> None:
        write(self, step, values)
        if step == 12:
            raise Killed

    training = Training(tmp_path, FALLS_AND_RISES)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricWriter, "write", killed)
        training.run()
    assert training.run() == START - 6
    assert training.taken == [*range(1, 13), 11, 12]
    assert training.rows == pytest.approx(FALLS_AND_RISES)


def damage(folder: Path) -> None:
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


@pytest.mark.parametrize(("damaged", "taken"), [((12,), [11, 12]), ((10, 12), [*range(1, 13)])])
def test_damaged_checkpoints_are_set_aside_and_it_ends_the_same(tmp_path, damaged, taken, capsys):
    """The two newest are kept: where both are damaged, it starts anew."""
    training = Training(tmp_path, FALLS_AND_RISES)
    training.run()
    for step in damaged:
        damage(training.checkpoints / str(step))
    again = Training(tmp_path, FALLS_AND_RISES)
    assert again.run() == START - 6
    assert again.taken == taken
    assert "is damaged" in capsys.readouterr().out.replace("\n", " ")
    assert again.rows == pytest.approx(FALLS_AND_RISES)


def test_a_replay_reads_one_that_stopped_early_as_done(tmp_path):
    training = Training(tmp_path, FALLS_AND_RISES)
    training.run()
    assert training.run(opened=replay) == START - 6


# The reward model's validation.


def run_of(pairs: Any, mesh: Any, batch_size: int) -> Any:
    options = config.RewardModel(
        batch_size=batch_size, validation=config.Validation(every=EVERY, pairs=BATCH - 1), long_prompts="truncate"
    )
    asked = []

    def found(split: str, *, count: int, long_prompts: str) -> ExampleSet:
        asked.append((split, count, long_prompts))
        return ExampleSet(jax.tree.map(lambda x: x[:count], pairs))

    corpus = SimpleNamespace(pairs=found, prompt_length=2, response_length=3)
    experiment = SimpleNamespace(reward_model=options)
    return SimpleNamespace(experiment=experiment, models=assembled.models(reward), mesh=mesh, corpus=corpus), asked


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 4), (1, BATCH), (1, 64), (8, 8), (8, 16)])
def test_the_validation_of_a_reward_model_is_its_definition(devices, batch_size):
    """15 pairs: the last batch is filled up, and what fills it must not count."""
    pairs = examples(3, samples=2)
    run, asked = run_of(pairs, make_mesh(devices), batch_size)
    validation = reward_model._validation(run, {})
    assert asked == [("validation", BATCH - 1, "truncate")]
    expected, _ = bradley_terry(REWARD_START, jax.tree.map(lambda x: x[: BATCH - 1], pairs))
    found = validation.measure(jnp.asarray(REWARD_START, jnp.float32))
    assert found[LOSS] == pytest.approx(expected["loss"], rel=1e-5)
    assert found[reward_model.ACCURACY] == pytest.approx(expected["accuracy"], abs=1e-6)
    assert (validation.every, validation.patience, validation.size) == (EVERY, 3, BATCH - 1)


def test_what_became_of_a_training_is_read_from_its_metrics(tmp_path, capsys):
    writer = MetricWriter(tmp_path / "stage", resume_step=None)
    for step, loss in enumerate([0.8, 0.6, 0.5, 0.3, 0.1], 1):
        held_out = {2: (0.69, 0.5), 4: (0.65, 0.625), 5: (0.7, 0.75)}.get(step)
        values = {} if held_out is None else dict(zip((LOSS, reward_model.ACCURACY), held_out, strict=True))
        writer.write(step, {"loss": loss, **values})
    writer.close()
    pairs = ExampleSet(examples(0, 2), dropped=5, cut=3)
    stage: Any = SimpleNamespace(directory=tmp_path / "stage")
    validation = Validation(2, 1, 10, 64, partial(dict), ())
    found = reward_model._described(None, SimpleNamespace(seconds=1.0), pairs, stage, validation)
    assert found.training == RewardTraining(BATCH, 3, 5, steps=5, used_step=4, validation_pairs=64)
    columns = {
        "validation_step": [2, 4, 5],
        "validation_training_loss": [0.7, 0.4, 0.1],
        "validation_loss": [0.69, 0.65, 0.7],
        "validation_accuracy": [0.5, 0.625, 0.75],
    }
    assert list(found.curve) == list(columns)
    for name, expected in columns.items():
        np.testing.assert_allclose(found.curve[name], expected, rtol=1e-6)
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "ended at step 5 of 10; that of step 4 is used" in printed
    # Wilson's interval of 40 in 64.
    assert "0.650 nats a pair, where guessing has 0.693, accuracy 0.625 [0.503, 0.733]." in printed
