import contextlib
import json
import sys
import types

import numpy as np
import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import disk
from ctrl_jax.runtime.metrics import MetricWriter, read_metrics


def write(directory, steps, resume_step=None):
    writer = MetricWriter(directory, resume_step=resume_step)
    for step in steps:
        writer.write(step, {"kl": step / 10})
    writer.close()


def test_rows_are_json_lines_and_read_back_as_columns(tmp_path):
    writer = MetricWriter(tmp_path, resume_step=None)
    writer.write(1, {"kl": np.float32(0.5)})
    # Flushed: a reader, or the state after a kill, has it already.
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "kl": 0.5}
    writer.write(2, {"kl": 0.25, "win_rate": 0.75, "loss": float("nan"), "ratio": float("inf")})
    writer.close()
    columns = read_metrics(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(columns["step"], [1, 2])
    np.testing.assert_array_equal(columns["kl"], [0.5, 0.25])
    np.testing.assert_array_equal(columns["win_rate"], [np.nan, 0.75])
    np.testing.assert_array_equal(columns["loss"], [np.nan, np.nan])
    np.testing.assert_array_equal(columns["ratio"], [np.nan, np.inf])
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_resuming_drops_the_rows_after_the_checkpoint_and_a_torn_line(tmp_path):
    write(tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "k')
    np.testing.assert_array_equal(read_metrics(tmp_path / "metrics.jsonl")["step"], [1, 2, 3, 4, 5])
    write(tmp_path, [4, 5, 6], resume_step=3)
    columns = read_metrics(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(columns["step"], [1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(columns["kl"], np.arange(1, 7) / 10)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_starting_anew_drops_every_row(tmp_path):
    write(tmp_path, [0, 1, 2])
    write(tmp_path, [0])
    np.testing.assert_array_equal(read_metrics(tmp_path / "metrics.jsonl")["step"], [0])


def test_no_file_is_no_rows(tmp_path):
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == ["step"]
    assert read_metrics(tmp_path / "metrics.jsonl")["step"].size == 0


def test_tensorboard_has_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    write(tmp_path, [1, 2])
    [path] = (tmp_path / "tensorboard").iterdir()
    data, position, found = path.read_bytes(), 0, []
    while position < len(data):  # TFRecord: length, its crc, payload, its crc
        length = int.from_bytes(data[position : position + 8], "little")
        event = Event.FromString(data[position + 12 : position + 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        position += 16 + length
    assert found == [(1, "kl", np.float32(0.1)), (2, "kl", np.float32(0.2))]


def test_wandb_is_logged_to_where_asked(tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    options = {}
    fake = types.SimpleNamespace(init=lambda **given: options.update(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = MetricWriter(tmp_path, resume_step=None, wandb=True)
    writer.write(1, {"kl": 0.5})
    writer.close()
    assert logged == [(1, {"kl": 0.5}), "end"]
    assert options["resume"] == "allow" and options["name"] == tmp_path.name


def test_wandb_that_is_not_installed_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="make setup EXTRA=wandb"):
        MetricWriter(tmp_path, resume_step=None, wandb=True)


def test_a_full_disk_is_an_error_at_once_and_the_rows_before_it_stay(tmp_path, small_files):
    writer = MetricWriter(tmp_path, resume_step=None)
    writer.write(1, {"kl": 0.5})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with pytest.raises(OSError) as error, contextlib.closing(writer), small_files(size + 5):
        writer.write(2, {"kl": 0.5})
    assert f"{tmp_path}/metrics.jsonl could not be written" in disk.explain(error.value)
    write(tmp_path, [2], resume_step=1)
    np.testing.assert_array_equal(read_metrics(tmp_path / "metrics.jsonl")["step"], [1, 2])


def test_the_last_rows_are_remembered_over_a_resume(tmp_path):
    write(tmp_path, range(1, 9))
    writer = MetricWriter(tmp_path, resume_step=7)
    writer.write(8, {"kl": 9.0})
    writer.close()
    assert [(row["step"], row["kl"]) for row in writer.recent] == [(4, 0.4), (5, 0.5), (6, 0.6), (7, 0.7), (8, 9.0)]
