import pathlib
import shutil

import pytest

from tests.report import synthetic

NAMES = ("sampling", "best_of_2", "best_of_4", "worst_of_4")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A whole work directory, to be read only."""
    return synthetic.write_work_dir(tmp_path_factory.mktemp("runs") / "bon_helpful", names=NAMES)


@pytest.fixture
def work_dir(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of it, to be spoilt."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "bon_helpful"))
