"""A folder that is written whole: its permissions, and what a kill leaves of it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ctrl_jax.errors import InputError
from ctrl_jax.models.weights import new_folder


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_have_the_permissions_that_the_umask_says(tmp_path, umask):
    original = tmp_path / "tokenizer.json"
    original.write_text("{}")
    original.chmod(0o400)
    with new_folder(tmp_path / "export") as partial:
        save_file({"x": np.ones(3, np.float32)}, partial / "model.safetensors")
        (partial / "config.json").write_text("{}")
        (partial / original.name).write_bytes(original.read_bytes())
        (partial / original.name).chmod(0o400)
    written = sorted(path.name for path in (tmp_path / "export").iterdir())
    assert written == ["config.json", "model.safetensors", "tokenizer.json"]
    assert mode(tmp_path / "export") == 0o777 & ~umask
    assert {mode(path) for path in (tmp_path / "export").iterdir()} == {0o666 & ~umask}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "tokenizer.json"]


WRITING = """
import sys, time
from pathlib import Path
from ctrl_jax.models.weights import new_folder
with new_folder(Path(sys.argv[1])) as partial:
    (partial / "model.safetensors").write_bytes(b"half")
    (partial / "more").mkdir()
    print("written", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    folder = tmp_path / "export"
    process = subprocess.Popen([sys.executable, "-c", WRITING, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "written\n"
        with pytest.raises(InputError, match=f"Another process is writing {folder}"), new_folder(folder):
            pass
        (partial,) = tmp_path.iterdir()
        assert (partial / "model.safetensors").exists()  # the other's work is not touched
    finally:
        process.kill()
        process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".export.partial"]
    with new_folder(folder) as partial:
        (partial / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "export") as partial:
        (partial / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
