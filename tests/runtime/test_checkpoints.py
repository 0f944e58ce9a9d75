import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctrl_jax.devices import mesh
from ctrl_jax.errors import InputError
from ctrl_jax.runtime import disk, preemption
from ctrl_jax.runtime.checkpoints import Checkpoints


class Training(NamedTuple):
    params: dict
    optimizer: optax.OptState
    key: jax.Array
    step: jax.Array


def training(step):
    params = {"dense": {"w": jnp.full((8, 3), step + 0.5), "b": jnp.full(3, step, jnp.bfloat16)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    return Training(params, optimizer, jax.random.key(step), jnp.int32(step))


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def open_checkpoints(tmp_path):
    opened = []

    def open_(fingerprint="f00d", **options):
        opened.append(Checkpoints(tmp_path / "checkpoints", fingerprint=fingerprint, **options))
        return opened[-1]

    yield open_
    for checkpoints in opened:
        checkpoints.close()


def test_a_signal_that_orbax_wraps_while_it_reads_scores_costs_no_checkpoint(open_checkpoints, tmp_path, monkeypatch):
    checkpoints = open_checkpoints()
    for step, score in ((1, 9.0), (2, 1.0), (3, 1.0)):
        checkpoints.save(step, training(step), {}, score=score)

    def wrapped(*arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise ValueError("Failed to restore") from error

    again = open_checkpoints()
    monkeypatch.setattr(again, "_read", wrapped)
    with pytest.raises(preemption.Preempted), preemption.raising():
        again.save(4, training(4), {}, score=2.0)
    assert {"1", "2", "3", "4"} <= set(os.listdir(tmp_path / "checkpoints"))
    with pytest.raises(preemption.Preempted), preemption.raising():
        again.restore(training(0))


def test_nothing_saved_is_nothing_restored(open_checkpoints):
    assert open_checkpoints().restore(training(0)) is None


def test_the_newest_comes_back_bit_for_bit_with_its_data(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    for step in (1, 2, 3):
        checkpoints.save(step, training(step), {"next_index": 10 * step, "best": None})
    checkpoints.wait()
    step, state, data = open_checkpoints().restore(jax.eval_shape(lambda: training(0)))
    assert step == 3 and data == {"next_index": 30, "best": None}
    assert_same(state, training(3))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "3"]  # keep=2


def test_a_state_saved_on_four_devices_comes_back_on_two(open_checkpoints):
    weights = {"w": np.arange(16.0).reshape(8, 2)}
    open_checkpoints().save(1, mesh.shard(mesh.make_mesh(4), weights), {})
    target = mesh.shard(mesh.make_mesh(2), {"w": np.zeros((8, 2))})
    _, state, _ = open_checkpoints().restore(target)
    assert state["w"].sharding == target["w"].sharding
    np.testing.assert_array_equal(state["w"], weights["w"])
    _, state, _ = open_checkpoints().restore(jax.eval_shape(lambda: {"w": jnp.zeros((8, 2))}))
    assert state["w"].devices() == {jax.devices()[0]}


def test_saved_arrays_may_be_donated_at_once(open_checkpoints):
    checkpoints = open_checkpoints()
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = jnp.zeros(100_000)
    for step in range(3):
        checkpoints.save(step, {"x": state}, {})
        for _ in range(5):
            state = advance(state)
    step, restored, _ = open_checkpoints().restore({"x": state})
    assert step == 2 and (np.asarray(restored["x"]) == 10).all()


def test_an_older_step_is_not_skipped_in_silence(open_checkpoints):
    checkpoints = open_checkpoints()
    checkpoints.save(5, training(5), {})
    for step in (5, 4):
        with pytest.raises(RuntimeError, match="not after 5"):
            checkpoints.save(step, training(step), {})


def test_a_checkpoint_of_another_configuration_is_refused_naming_both(open_checkpoints, tmp_path):
    open_checkpoints("aaaa").save(1, training(1), {})
    with pytest.raises(InputError, match=r"fingerprint aaaa, now bbbb.*move .*checkpoints away") as error:
        open_checkpoints("bbbb").restore(training(1))
    assert str(tmp_path / "checkpoints") in str(error.value)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"w": jnp.zeros((2, 3))}, r"w: float32\[2, 2\] → float32\[2, 3\]"),
        ({"w": jnp.zeros((2, 2), jnp.bfloat16)}, r"w: float32\[2, 2\] → bfloat16\[2, 2\]"),
        ({"w": jnp.zeros((2, 2)), "b": jnp.zeros(1)}, r"b: absent → float32\[1\]"),
        ({}, r"w: float32\[2, 2\] → absent"),
    ],
)
def test_another_structure_is_refused_naming_both(open_checkpoints, state, expected):
    open_checkpoints().save(1, {"w": jnp.zeros((2, 2))}, {})
    with pytest.raises(InputError, match=rf"{expected}.*move .* away"):
        open_checkpoints().restore(state)


def damage_garbage(step):
    largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"garbage")


def damage_one_bit(step):
    largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))


def damage_description(step):
    [path] = [path for path in (step / "data").iterdir() if path.read_bytes().startswith(b'{"')]
    path.write_text(path.read_text()[:20])


def damage_checksums(step):
    (step / "checksums.json").write_text("{")


def damage_items(step):
    """What a kill in the middle of a delete leaves."""
    shutil.rmtree(step / "state")
    (step / "checksums.json").unlink()


def damage_everything(step):
    shutil.rmtree(step)
    step.mkdir()


@pytest.mark.parametrize(
    "damage",
    [damage_garbage, damage_one_bit, damage_description, damage_checksums, damage_items, damage_everything],
)
def test_a_damaged_newest_checkpoint_is_told_and_set_aside(open_checkpoints, tmp_path, damage, capfd):
    state = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    checkpoints = open_checkpoints()
    checkpoints.save(10, state, {"next": 1})
    checkpoints.save(20, state, {"next": 2})
    newest = tmp_path / "checkpoints" / "20"
    damage(newest)
    left = sorted(path.name for path in newest.rglob("*"))
    checkpoints = open_checkpoints()
    step, restored, data = checkpoints.restore(state)
    assert step == 10 and data == {"next": 1}
    np.testing.assert_array_equal(restored["w"], state["w"])
    printed = capfd.readouterr()
    assert f"{newest} is damaged" in printed.out and "set aside as damaged-20" in printed.out
    assert "Traceback" not in printed.err  # tensorstore's own, of a file that is read in spite of its damage
    assert sorted(path.name for path in (newest.with_name("damaged-20")).rglob("*")) == left
    # Its step can be taken again, and be damaged again.
    checkpoints.save(20, state, {"next": 3})
    assert open_checkpoints().restore(state)[2] == {"next": 3}
    damage(newest)
    assert open_checkpoints().restore(state)[0] == 10
    assert newest.with_name("damaged-20-1").exists()


def test_where_all_are_damaged_nothing_is_restored(open_checkpoints, tmp_path):
    for step in (10, 20):
        open_checkpoints().save(step, training(1), {})
        damage_garbage(tmp_path / "checkpoints" / str(step))
    assert open_checkpoints().restore(training(1)) is None
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["damaged-10", "damaged-20"]


def test_the_best_stays_beside_the_newest_over_restarts_and_damage(open_checkpoints, tmp_path):
    def kept():
        return sorted(int(name) for name in os.listdir(tmp_path / "checkpoints"))

    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.2, 5: 0.9, 6: 0.3, 7: 0.4}
    for step, score in scores.items():
        if step in (4, 6):
            checkpoints = open_checkpoints()  # which has to read the scores
        elif step == 1:
            checkpoints = open_checkpoints()
        checkpoints.save(step, {"w": jnp.zeros(2)}, {}, score=score)
        if step == 4:
            assert kept() == [2, 3, 4]
    # Of two that are best the newer one.
    assert kept() == [5, 6, 7]
    shutil.rmtree(tmp_path / "checkpoints" / "5" / "data")  # as a kill within its deletion would
    checkpoints = open_checkpoints()
    assert checkpoints.restore({"w": jnp.zeros(2)})[0] == 7
    checkpoints.save(8, {"w": jnp.zeros(2)}, {})
    assert kept() == [7, 8]


def test_a_full_disk_leaves_the_last_checkpoint_and_the_next_attempt_succeeds(open_checkpoints, small_files, capfd):
    state = {"w": jax.random.normal(jax.random.key(0), (300, 300))}
    checkpoints = open_checkpoints()
    checkpoints.save(1, state, {"next": 1})
    with small_files(100_000), pytest.raises(Exception) as error:
        checkpoints.save(2, state, {"next": 2})
    told = disk.explain(error.value)
    assert "/checkpoints/2.orbax-checkpoint-tmp/" in told.split(" could not be written: File too large ")[0]
    assert "run the same command again" in told
    assert "Traceback" not in capfd.readouterr().err  # Orbax's own
    checkpoints = open_checkpoints()
    step, restored, data = checkpoints.restore(state)
    assert step == 1 and data == {"next": 1}
    np.testing.assert_array_equal(restored["w"], state["w"])
    checkpoints.save(2, state, {"next": 2})
    assert open_checkpoints().restore(state)[0] == 2


def test_a_kill_at_any_moment_loses_no_finished_save(open_checkpoints, tmp_path):
    program = f"""
import itertools, pathlib, numpy as np, jax
from ctrl_jax.runtime.checkpoints import Checkpoints
checkpoints = Checkpoints(pathlib.Path({str(tmp_path / "checkpoints")!r}), fingerprint="f00d")
state = lambda step: {{"w": jax.numpy.full((200, 200), step), "b": jax.numpy.arange(9) * step}}
restored = checkpoints.restore(state(0))
for step in itertools.count(1 if restored is None else restored[0] + 1):
    checkpoints.save(step, state(step), {{"step": step}})
    print(step, flush=True)
"""
    chance = random.Random(0)
    expected = 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert int(process.stdout.readline()) == expected + 1  # it resumed from the last one
        time.sleep(chance.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        acknowledged = [expected + 1, *(int(line) for line in process.stdout.read().split())][-1]
        assert process.wait() == -signal.SIGKILL

        step, state, data = open_checkpoints().restore({"w": jnp.zeros((200, 200), int), "b": jnp.zeros(9, int)})
        # One save more may have been finished than was said; one that was not is set aside.
        assert step in (acknowledged, acknowledged + 1) and data == {"step": step}
        assert (np.asarray(state["w"]) == step).all()
        np.testing.assert_array_equal(state["b"], np.arange(9) * step)
        expected = step


def test_data_is_json(open_checkpoints, tmp_path):
    open_checkpoints().save(1, training(1), {"iterator": {"next_index": 3}})
    [path] = [path for path in (tmp_path / "checkpoints" / "1" / "data").iterdir() if path.read_text().startswith("{")]
    assert json.loads(path.read_text())["data"] == {"iterator": {"next_index": 3}}
