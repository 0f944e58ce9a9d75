"""What a module's fingerprint covers, on small packages of files."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from ctrl_jax.runtime import imports

FILES = {
    "rewards": "import json, helpers\nimport package.deep.leaf\nfrom package import sibling\nimport numpy as np",
    "helpers": "def f():\n    import lazy\n    from package import relative",
    "lazy": "X = 1",
    "loaded": "X = 1",
    "unused": "X = 1",
    "package/__init__": "",
    "package/sibling": "import importlib\nloaded = importlib.import_module('loaded')",
    "package/relative": "from . import cousin\nfrom .deep.leaf import *\nfrom .. import beyond",
    "package/cousin": "try:\n    import optional\nexcept ImportError:\n    optional = None",
    "package/deep/__init__": "VALUE = 1",
    "package/deep/leaf": "from ..cousin import optional\nfrom package.deep import VALUE",
}
COVERED = {
    *("rewards", "helpers", "lazy", "loaded", "package", "package.sibling", "package.relative", "package.cousin"),
    *("package.deep", "package.deep.leaf"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, source in FILES.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:  # the packages above a module are imported by the look for it
        if name.partition(".")[0] in {name.partition("/")[0] for name in FILES}:
            del sys.modules[name]


def test_it_covers_every_file_and_the_versions_of_packages(folder):
    found = imports.sources("rewards", folder)
    assert set(found) == COVERED | {"numpy", "optional"}
    assert found["numpy"] == f"numpy {version('numpy')}"
    assert found["optional"] == "absent"
    assert imports.sources("rewards", folder) == found
    assert str(folder) not in sys.path


@pytest.mark.parametrize("name", [name for name in FILES if name != "unused"])
def test_a_change_of_any_of_them_is_seen_and_named(folder, name):
    before = imports.sources("rewards", folder)
    path = folder / f"{name}.py"
    path.write_text(f"{path.read_text()}\n# another")
    after = imports.sources("rewards", folder)
    assert [one for one in after if before[one] != after[one]] == [name.removesuffix("/__init__").replace("/", ".")]


def test_what_is_not_imported_is_not_of_it(folder):
    before = imports.sources("rewards", folder)
    (folder / "unused.py").write_text("X = 2")
    assert imports.sources("rewards", folder) == before
    assert "unused" not in before


def test_an_optional_package_that_comes_is_seen(folder):
    before = imports.sources("rewards", folder)
    (folder / "optional.py").write_text("X = 1")
    assert imports.sources("rewards", folder)["optional"] != before["optional"]


def test_a_package_installed_in_place_is_known_by_its_files(folder):
    """As this project is in its own environment: its version stays while it is worked on."""
    (folder / "rewards.py").write_text("from ctrl_jax.data.language import gold_reward")
    found = imports.sources("rewards", folder)
    assert {"ctrl_jax.data.language", "ctrl_jax.data.phrases"} <= set(found)
    assert not any(known.startswith("ctrl_jax ") for known in found.values())


@pytest.mark.parametrize("source", ["def (", "\0", "import rewards", "from ....... import x", "import .x"])
def test_a_source_that_is_odd_is_known_by_its_text(folder, source):
    (folder / "rewards.py").write_text(source)
    assert set(imports.sources("rewards", folder)) == {"rewards"}


def test_no_module_is_run_by_the_look_at_it(folder):
    (folder / "rewards.py").write_text("import lazy\nprint('run')")
    (folder / "lazy.py").write_text("print('run')")
    look = f"imports.sources('rewards', Path({str(folder)!r}))"
    program = f"from pathlib import Path\nfrom ctrl_jax.runtime import imports\n{look}"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.parametrize("name", ["", "no_such_module", "folder/rewards", "rewards.py", "json"])
def test_what_is_no_file_of_ones_own_has_nothing(folder, name):
    assert set(imports.sources(name, folder)) <= {name, "rewards", *COVERED, "numpy", "optional"}
