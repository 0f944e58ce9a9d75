import errno
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import stages
from ctrl_jax.runtime.stages import Stage, fingerprint


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    names: tuple[str, ...] = ("a", "b")


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    steps: int = 3
    beta: float | None = None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values, json_values)
def test_fingerprints_are_equal_exactly_when_the_canonical_json_is(one, other):
    canonical = [json.dumps(value, sort_keys=True) for value in (one, other)]
    assert (fingerprint(one) == fingerprint(other)) == (canonical[0] == canonical[1])


def test_a_fingerprint_is_12_hex_digits_and_knows_every_field():
    base = Outer()
    assert len(fingerprint(base)) == 12 and int(fingerprint(base), 16) >= 0
    changed = [
        replace(base, steps=4),
        replace(base, beta=0.0),
        replace(base, inner=Inner(rate=np.nextafter(0.1, 1.0))),
        replace(base, inner=Inner(names=("b", "a"))),
        replace(base, beta=float("inf")),
        replace(base, beta=float("nan")),
    ]
    assert len({fingerprint(value) for value in [base, *changed]}) == 1 + len(changed)


def test_a_fingerprint_ignores_the_order_of_keys_and_tuple_or_list():
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint(Outer()) == fingerprint(Outer(inner=Inner()))


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": {3}}, b"x", Outer, np.zeros(2)])
def test_a_fingerprint_refuses_what_it_does_not_know(value):
    with pytest.raises(TypeError, match="no plain form"):
        fingerprint(value)


def test_a_stage_is_found_again_by_its_key_and_is_complete_only_once_finished(tmp_path):
    key = {"config": Outer(), "tokenizer": "abc"}
    stage = Stage.open(tmp_path, "sft", key)
    assert stage.directory == tmp_path / f"sft-{fingerprint(key)}"
    assert json.loads((stage.directory / "stage.json").read_text())["config"]["inner"]["rate"] == 0.1
    assert not stage.complete
    (stage.directory / "checkpoints").mkdir()

    again = Stage.open(tmp_path, "sft", dict(reversed(key.items())))
    assert again == stage and not again.complete
    again.finish({"loss": 1.5})
    assert Stage.open(tmp_path, "sft", key).complete and stage.summary == {"loss": 1.5}

    assert not Stage.open(tmp_path, "sft", {**key, "tokenizer": "abd"}).complete
    with pytest.raises(RuntimeError, match="never written again"):
        stage.finish({"loss": 9.0})
    assert stage.summary == {"loss": 1.5}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {
    "a flipped bit": flipped,
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "{}": lambda data: b"{}",
    "deep": lambda data: b"[" * 100_000,
    "not UTF-8": lambda data: b"\xff\xfe",
    "gone": None,
}


def damage(path, how):
    if DAMAGES[how] is None:
        path.unlink()
    else:
        path.write_bytes(DAMAGES[how](path.read_bytes()))


def finished(root, value=1.5):
    """A stage of two files, one of them in a folder."""
    stage = Stage.open(root, "table", {"a": 1})
    stages.write_arrays(stage.directory / "table.npz", rows=np.full(100, value))
    stages.write_json(stage.directory / "deep" / "more.json", {"value": value})
    stage.finish({"loss": value})
    return stage


def entries(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["table.npz", "deep/more.json", "done.json", "stage.json"])
def test_what_is_damaged_is_named_set_aside_and_made_again(tmp_path, capsys, name, how):
    directory = finished(tmp_path).directory
    damage(directory / name, how)
    stage = Stage.open(tmp_path, "table", {"a": 1})
    with stage.exclusive():
        still = stage.complete
        if not still:
            assert not (directory / "done.json").exists()
            finished(tmp_path)
    assert stages.read_json(directory / "stage.json") == {"a": 1}
    assert stage.whole and stage.summary == {"loss": 1.5}
    printed = capsys.readouterr().out.replace("\n", "")
    if (name, how) == ("done.json", "gone"):
        assert not still  # as a kill before the end leaves it: the job says that it goes on or starts anew
        return
    assert still == (name == "stage.json"), "what stage.json says, the key says as well"
    if (name, how) != ("stage.json", "gone"):
        assert f"{directory} is damaged: " in printed and "set aside in damaged-1" in printed
        assert name.split("/")[0] in printed
        aside = entries(directory / "damaged-1")
        assert set(aside) <= {"done.json", "table.npz", "deep", "stage.json"}
        assert how == "gone" or name.split("/")[0] in aside


def test_a_stage_of_another_key_in_its_place_is_set_aside(tmp_path):
    stage = Stage.open(tmp_path, "table", {"a": 1})
    other = finished(tmp_path / "other", value=9.0)
    for path in (other.directory / "done.json", other.directory / "table.npz"):
        contents = path.read_bytes()
        (stage.directory / path.name).write_bytes(contents)
    seal = stages.read_json(other.directory / "done.json")
    assert seal["about"]["stage"] == stage.directory.name  # of one key: only a seal of another name is no one's
    moved = tmp_path / "table-0123456789ab"
    os.rename(other.directory, moved)
    wrong = Stage(moved, {"a": 2})
    with wrong.exclusive():
        assert not wrong.complete
    assert entries(moved) == ["damaged-1", "stage.json"]
    assert entries(moved / "damaged-1") == ["deep", "done.json", "stage.json", "table.npz"]


def test_a_training_keeps_what_it_resumes_from(tmp_path):
    """A damaged seal or a damaged record costs no checkpoint."""
    stage = Stage.open(tmp_path, "sft", {"a": 1})
    seal = stage.directory / "checkpoints" / "20" / "checksums.json"
    stages.write_json(seal, {"step": 20})
    stages.write_json(stage.directory / "checkpoints" / "10" / "checksums.json", {"step": 10})
    (stage.directory / "metrics.jsonl").write_text('{"step": 1}\n')
    stage.finish({})
    assert stage.files == ["metrics.jsonl", "checkpoints/20/checksums.json"]
    for damaged, left in (("done.json", ["metrics.jsonl"]), ("metrics.jsonl", [])):
        (stage.directory / damaged).write_bytes(b"x")
        with stage.exclusive():
            assert not stage.complete
            assert entries(stage.directory / "checkpoints") == ["10", "20"]
            assert [name for name in entries(stage.directory) if name == "metrics.jsonl"] == left
            stage.finish({})
    seal.write_bytes(b"x")
    with stage.exclusive():
        assert not stage.complete, "what is made of it may be another"
        assert seal.exists(), "checkpoints.py looks after it"


def test_a_stage_that_is_superseded_is_kept(tmp_path):
    stage = finished(tmp_path)
    with stage.exclusive():
        place = stage.supersede()
        assert not stage.complete and entries(place) == ["deep", "done.json", "table.npz"]
        finished(tmp_path, value=2.5)
    assert stage.whole and stage.summary == {"loss": 2.5}
    with stage.exclusive():
        assert stage.supersede().name == "superseded-2"


def test_of_processes_that_want_one_stage_one_runs_it(tmp_path):
    program = f"""
import os, pathlib, time
from ctrl_jax.runtime.stages import Stage
root = pathlib.Path({str(tmp_path)!r})
stage = Stage.open(root, "sft", {{"a": 1}})
(root / f"ready-{{os.getpid()}}").touch()
while len(list(root.glob("ready-*"))) < 3:
    time.sleep(0.01)
with stage.exclusive():
    if not stage.complete:
        (root / f"ran-{{os.getpid()}}").touch()
        time.sleep(0.2)
        stage.finish({{}})
"""
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.glob("ran-*"))) == 1


def test_a_process_that_waits_for_a_stage_says_so(tmp_path):
    program = f"""
import pathlib
from ctrl_jax.runtime.stages import Stage
with Stage.open(pathlib.Path({str(tmp_path)!r}), "sft", {{"a": 1}}).exclusive():
    print("held", flush=True)
"""
    stage = Stage.open(tmp_path, "sft", {"a": 1})
    with stage.exclusive():
        process = subprocess.Popen([sys.executable, "-u", "-c", program], stdout=subprocess.PIPE, text=True)
        told = process.stdout.readline()
    assert told == f"{stage.directory.name} is being made by another process; waiting for it.\n"
    assert process.communicate(timeout=60)[0] == "held\n"


def test_a_work_directory_serves_one_experiment(tmp_path):
    stages.claim(tmp_path, Outer())
    stages.claim(tmp_path, Outer())
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 3
    with pytest.raises(InputError) as error:
        stages.claim(tmp_path, Outer(inner=Inner(rate=0.2), beta=0.5))
    message = str(error.value)
    assert "inner.rate: 0.1 → 0.2" in message and "beta: null → 0.5" in message and "steps" not in message
    assert "`work_dir`" in message and f"move {tmp_path} away" in message


@pytest.mark.parametrize("how", [how for how in DAMAGES if how not in ("gone", "{}")])
def test_a_damaged_claim_is_set_aside_and_written_again(tmp_path, capsys, how):
    stages.claim(tmp_path, Outer())
    damage(tmp_path / "config.json", how)
    if how == "a flipped bit":
        (tmp_path / "config.json").write_bytes(b"\x7b" + b"\x00")
    stages.claim(tmp_path, Outer())
    assert stages.read_json(tmp_path / "config.json")["steps"] == 3
    assert entries(tmp_path) == ["config.json", "damaged-1"]
    assert "config.json cannot be read" in capsys.readouterr().out.replace("\n", "")


def test_of_a_claim_some_fields_may_differ(tmp_path):
    stages.claim(tmp_path, Outer())
    changed = Outer(inner=Inner(rate=0.2), steps=4)
    found = stages.claim(tmp_path, changed, may_differ=lambda names: names)
    assert found == ["inner.rate: 0.1 → 0.2", "steps: 3 → 4"]
    with pytest.raises(InputError, match=r"differs in steps: 3 → 4\. Choose"):
        stages.claim(tmp_path, changed, may_differ=lambda names: names - {"steps"})


def test_a_work_directory_of_other_fields_names_them(tmp_path):
    stages.claim(tmp_path, {"old": 1, "same": {"a": 2}})
    with pytest.raises(InputError, match=r"old: 1 → absent, new: absent → 1\."):
        stages.claim(tmp_path, {"same": {"a": 2}, "new": 1})


def test_files_round_trip_and_nothing_is_left_beside_them(tmp_path):
    path = tmp_path / "deep" / "table.npz"
    stages.write_arrays(path, rewards=np.arange(6).reshape(2, 3), ids=np.array([4], np.uint32))
    read = stages.read_arrays(path)
    np.testing.assert_array_equal(read["rewards"], [[0, 1, 2], [3, 4, 5]])
    assert read["ids"].dtype == np.uint32
    stages.write_json(tmp_path / "deep" / "a.json", {"β": (1, np.float32(0.5)), "bad": float("nan")})
    assert stages.read_json(tmp_path / "deep" / "a.json") == {"β": [1, 0.5], "bad": "nan"}
    assert sorted(os.listdir(tmp_path / "deep")) == ["a.json", "table.npz"]


def test_half_a_character_is_written_and_read_back(tmp_path):
    value = {"command": ["caf\udce9", "\\udce9", "é"]}
    stages.write_json(tmp_path / "x.json", value)
    assert stages.read_json(tmp_path / "x.json") == value


def test_no_two_writers_share_a_temporary_file(tmp_path, monkeypatch):
    """Processes of several hosts or containers may have one number."""
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(old), replace(old, new)))
    for value in range(2):
        stages.write_json(tmp_path / "a.json", value)
    assert len(set(moved)) == 2


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    stages.write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        stages.write_json(path, {"a": 2})
    assert stages.read_json(path) == {"a": 1}


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 99, None]
)
def test_damaged_arrays_are_refused_naming_file_and_fix(tmp_path, damage):
    path = tmp_path / "table.npz"
    stages.write_arrays(path, a=np.arange(1000))
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="Move this file away") as error:
        stages.read_arrays(path)
    assert str(path) in str(error.value)


ROWS = np.arange(12, dtype=np.float32).reshape(6, 2)


def row_file(folder, rows=6):
    return stages.RowFile(folder / "deep" / "table.npy", (rows, 2), np.float32)


def test_rows_are_written_in_turn_and_read_where_they_lie(tmp_path):
    file = row_file(tmp_path)
    assert (file.rows, file.note) == (0, None)
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        file.append(ROWS[start:stop], {"sum": float(ROWS[:stop].sum())})
        assert not (tmp_path / "deep" / "table.npy").exists()
    file.finish()
    assert os.listdir(tmp_path / "deep") == ["table.npy"]
    read = stages.read_rows(tmp_path / "deep" / "table.npy")
    assert isinstance(read, np.memmap) and not read.flags.writeable
    np.testing.assert_array_equal(read, ROWS)


def test_rows_go_on_behind_those_that_are_known_to_be_whole(tmp_path):
    row_file(tmp_path).append(ROWS[:2], "two")
    partial = tmp_path / "deep" / "table.npy.partial"
    # As a kill in the middle of a row leaves it.
    partial.write_bytes(partial.read_bytes() + b"abc")
    file = row_file(tmp_path)
    assert (file.rows, file.note) == (2, "two")
    file.append(ROWS[2:])
    file.finish()
    np.testing.assert_array_equal(stages.read_rows(tmp_path / "deep" / "table.npy"), ROWS)


def test_rows_of_another_shape_or_fewer_than_were_noted_start_anew(tmp_path):
    row_file(tmp_path).append(ROWS[:2])
    assert row_file(tmp_path, rows=7).rows == 0
    row_file(tmp_path).append(ROWS[:2])
    partial = tmp_path / "deep" / "table.npy.partial"
    partial.write_bytes(partial.read_bytes()[:-1])
    assert row_file(tmp_path).rows == 0


@pytest.mark.parametrize("name", ["table.npy.partial", "table.npy.partial.json"])
@pytest.mark.parametrize("how", DAMAGES)
def test_rows_or_a_note_that_are_damaged_start_anew(tmp_path, name, how):
    for start, stop in ((0, 2), (2, 4)):
        row_file(tmp_path).append(ROWS[start:stop], {"sum": float(ROWS[:stop].sum())})
    assert row_file(tmp_path).rows == 4
    damage(tmp_path / "deep" / name, how)
    file = row_file(tmp_path)
    assert (file.rows, file.note) == (0, None)
    file.append(ROWS)
    file.finish()
    np.testing.assert_array_equal(stages.read_rows(tmp_path / "deep" / "table.npy"), ROWS)


def test_too_many_too_few_and_other_rows_are_refused(tmp_path):
    file = row_file(tmp_path)
    file.append(ROWS[:5])
    with pytest.raises(ValueError, match="do not go behind 5"):
        file.append(ROWS[:2])
    with pytest.raises(ValueError, match="do not go behind 5"):
        file.append(ROWS[:1, :1])
    with pytest.raises(RuntimeError, match="5 rows of"):
        file.finish()


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"x" * 999, None])
def test_damaged_rows_are_refused_naming_file_and_fix(tmp_path, damage):
    path = tmp_path / "table.npy"
    np.save(path, ROWS)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="Move this file away") as error:
        stages.read_rows(path)
    assert str(path) in str(error.value)


HOLD = """
import pathlib, time
from ctrl_jax.runtime.stages import exclusive
with exclusive(pathlib.Path({path!r})):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_work_directory_has_one_process_and_a_killed_one_leaves_it_free(tmp_path):
    program = HOLD.format(path=str(tmp_path / "work"))
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    for _ in range(2):
        with pytest.raises(InputError) as error, stages.exclusive(tmp_path / "work"):
            pytest.fail("two processes hold it")
        assert f"is in use by process {holder.pid} on {socket.gethostname()}." in str(error.value)
        assert "another `work_dir`" in str(error.value)
    holder.kill()
    holder.wait()
    for _ in range(2):
        with stages.exclusive(tmp_path / "work"):
            assert (tmp_path / "work" / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, number):
    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(stages.fcntl, "flock", refuse)
    for hold in (stages.exclusive(tmp_path / "work"), stages.locked(tmp_path / "work" / "lock")):
        with pytest.raises(InputError, match=rf"{tmp_path}/work/lock .*`runs_dir`"), hold:
            pytest.fail("it was entered")


def test_a_file_that_a_full_disk_refuses_takes_no_room(tmp_path, small_files):
    stages.write_json(tmp_path / "a.json", {"a": 1})
    with small_files(50), pytest.raises(OSError) as error:
        stages.write_json(tmp_path / "a.json", {"a": "long" * 100})
    assert error.value.filename == str(tmp_path / "a.json")
    assert os.listdir(tmp_path) == ["a.json"] and stages.read_json(tmp_path / "a.json") == {"a": 1}
