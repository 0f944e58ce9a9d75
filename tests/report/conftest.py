import pathlib
import shutil

import pytest

from ctrl_jax.report import svg
from ctrl_jax.report.measurements import Run, read_run
from tests.report import synthetic

NAMES = ("sampling", "best_of_2", "best_of_4", "worst_of_4")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A whole work directory, to be read only."""
    return synthetic.write_work_dir(tmp_path_factory.mktemp("runs") / "bon_helpful", names=NAMES)


@pytest.fixture(scope="session")
def run(finished: pathlib.Path) -> Run:
    return read_run(finished)


@pytest.fixture
def work_dir(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of it, to be spoilt."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "bon_helpful"))


@pytest.fixture
def words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No drawings: what then differs between two pages are their words."""
    monkeypatch.setattr(svg, "element", lambda panel, identifier: "<svg></svg>")
