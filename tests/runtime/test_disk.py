import errno
import os
import resource
import shutil
import uuid

import numpy as np
import pytest
import safetensors.numpy
from matplotlib.figure import Figure

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import disk


def full(path="/data/runs/metrics.jsonl"):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def chained(outer, inner):
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    "error",
    [
        full(),
        chained(RuntimeError("a library's own"), full()),
        ValueError("EXHAUSTED: writing \"w/0.0\" to '/data/runs/metrics.jsonl': No space left on device [errno 28]"),
    ],
)
def test_a_full_disk_is_told_with_the_path_and_the_room(error):
    told = disk.explain(error)
    assert told.startswith("/data/runs/metrics.jsonl could not be written: No space left on device (")
    assert "are free there" in told and "run the same command again" in told
    assert len(told.splitlines()) == 1


def test_a_path_with_spaces_is_told_whole():
    told = disk.explain(ValueError("writing '/data/my runs/metrics.jsonl': No space left on device"))
    assert told.startswith("/data/my runs/metrics.jsonl could not be written")


def test_the_mark_behind_a_path_is_none_of_it():
    told = disk.explain(ValueError("RESOURCE_EXHAUSTED: /data/a.array_record; No space left on device"))
    assert told.startswith("/data/a.array_record could not be written")


def test_the_room_is_that_of_the_files_own_disk(monkeypatch, tmp_path):
    asked = []

    def usage(place):
        asked.append(place)
        return shutil._ntuple_diskusage(3 * 2**20, 3 * 2**20, 0)

    monkeypatch.setattr(disk.shutil, "disk_usage", usage)
    told = disk.explain(full(tmp_path / "missing" / "metrics.jsonl"))
    assert asked == [str(tmp_path)] and "(0 MiB of 3 MiB are free there)" in told
    # What is copied is read from one disk and does not fit on the other.
    copy = OSError(errno.ENOSPC, "No space left on device", "/models/tokenizer.json", None, f"{tmp_path}/export/a.json")
    assert disk.explain(copy).startswith(f"{tmp_path}/export/a.json could not be written")
    assert asked == [str(tmp_path)] * 2
    assert disk.explain(OSError(errno.ENOSPC, "", b"/data/x")).startswith("/data/x could not")


def save_figure(path):
    Figure().savefig(path, format="png")


def save_tensors(path):
    safetensors.numpy.save_file({"a": np.zeros(10**6)}, path)


def write_arrays(path):
    np.savez(path, a=np.zeros(10**6))


@pytest.mark.parametrize("write", [save_figure, save_tensors, write_arrays])
def test_a_writer_that_names_no_file_is_told_without_another_disks_room(write, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(Exception) as failed:
            write(tmp_path / "file.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = disk.explain(failed.value)
    assert "File too large" in told
    assert told.startswith(f"{tmp_path}/file") or ("are free there" not in told and "does not say which" in told)


def test_a_full_disk_in_a_group_of_errors_is_found():
    group = BaseExceptionGroup("of several tasks", [ValueError("a task"), chained(RuntimeError("another"), full())])
    assert "/data/runs/metrics.jsonl could not be written" in disk.explain(group)


def test_other_errors_are_not_explained():
    assert disk.explain(ValueError("a bug in /some/file.py")) is None
    assert disk.explain(OSError(errno.EIO, "Input/output error")) is None


def test_an_error_that_was_handled_does_not_explain_a_later_one():
    with pytest.raises(KeyError) as found:
        try:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), "/runs/made")
        except FileExistsError:
            raise KeyError("a bug") from None
    assert disk.explain(found.value) is None


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    disk.check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


@pytest.mark.parametrize("below", ["file/work", "file"])
def test_a_path_below_a_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=rf"{tmp_path}/{below}: .*another place: `runs_dir`, `work_dir`"):
        disk.check_writable(tmp_path / below)


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    # The tests may run as root, whom no permission stops.
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=rf"{tmp_path}: Read-only file system"):
        disk.check_writable(tmp_path)


def test_what_a_kill_left_of_a_file_is_removed_and_nothing_else(tmp_path):
    now = 1e9
    left = [f".metrics.jsonl.{uuid.uuid4().hex}.tmp", f"sft-12/.done.json.{uuid.uuid4().hex}.tmp"]
    kept = ["metrics.jsonl", ".mine.tmp", "table.npy.partial", f"{uuid.uuid4().hex}.tmp", "sft-12/done.json"]
    young = f".young.{uuid.uuid4().hex}.tmp"
    (tmp_path / "sft-12").mkdir()
    for name in (*left, *kept, young):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (now - (60 if name == young else 7200),) * 2)
    disk.remove_leftovers(tmp_path, now=now)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*kept, young}
