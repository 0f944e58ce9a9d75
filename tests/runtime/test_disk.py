import errno
import os

import pytest

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
    with pytest.raises(InputError, match=rf"{tmp_path}/{below}: .*another place: --runs-dir, --work-dir"):
        disk.check_writable(tmp_path / below)


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    # The tests may run as root, whom no permission stops.
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=rf"{tmp_path}: Read-only file system"):
        disk.check_writable(tmp_path)
