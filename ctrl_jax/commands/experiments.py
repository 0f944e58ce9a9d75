"""Experiments by their names, and runs by their folders."""

import difflib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ctrl_jax.commands import address
from ctrl_jax.config import Experiment
from ctrl_jax.errors import InputError
from ctrl_jax.runtime import shipped


@dataclass(frozen=True)
class Named:
    """The experiment behind a name of the command line: a file of experiments, or the work directory of a run."""

    name: str
    experiment: Experiment
    module: ModuleType | None = None
    work_dir: Path | None = None


def find(name: str) -> Named:
    """The experiment of that name, or the run in that folder.

    Raises:
      InputError: if there is neither, or config.json of the run cannot be read.
    """
    folder = Path(os.path.expanduser(name))
    if os.path.exists(folder / "config.json") and not os.path.isfile(f"experiments/{name}.py"):
        return Named(name, address.read_experiment(folder), work_dir=folder)
    module = load_experiment(name)
    shown = Path(name).stem if name.endswith(".py") else name
    return Named(shown, module.experiment(), module=module)


def load_experiment(name: str) -> ModuleType:
    """The module `experiments/<name>.py` below the current folder or of the installed package, or the file at the path
    `name`.

    A name may have a folder of experiments/ before it, `rivals/ipo`, or be a folder whose __init__.py is one: `rivals`.

    Raises:
      InputError: if there is none, with the nearest names.
    """
    path = Path(os.path.expanduser(name)) if name.endswith(".py") else _path(name)
    if not os.path.isfile(path):  # False, not an error, for a name that no system can have
        known = names()
        folder = Path(os.path.expanduser(name))
        if os.path.isdir(folder):
            inside = sorted(str(path.parent) for path in folder.glob("*/config.json"))
            named = f" It has the runs {', '.join(inside)}; name one of them." if inside else ""
            raise InputError(f"{name!r} is a folder without config.json, and so no run.{named}")
        where = (
            f"experiments/ has {', '.join(known)}"
            if known
            else f"There is no folder experiments/ in {Path.cwd()}, and this package brings none"
        )
        raise InputError(
            f"There is no experiment {name!r}.{nearest(name, known)} {where}. A path of a .py file serves too, and so "
            "does the folder of a run; `python -m ctrl_jax runs` lists those."
        )
    spec = importlib.util.spec_from_file_location(f"experiments.{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "experiment"):
        raise InputError(f"{path} has no experiment(); add one that returns a ctrl_jax.config.Experiment.")
    return module


FOLDERS = Path("experiments"), shipped.EXPERIMENTS
"""Where experiments are looked for, in this order."""


def names() -> list[str]:
    """Of all experiments."""
    return sorted({name for folder in FOLDERS for name in _below(folder)})


def _path(name: str) -> Path:
    files = [file for folder in FOLDERS for file in (folder / name / "__init__.py", folder / f"{name}.py")]
    return next((file for file in files if os.path.isfile(file)), files[-1])


def _below(folder: Path) -> Iterator[str]:
    """Names of the experiments below the folder, where rewards and launchers are too."""
    for file in folder.rglob("*.py"):
        if "def experiment(" in file.read_text(encoding="utf-8"):
            whole = file.parent if file.stem == "__init__" else file.with_suffix("")
            yield whole.relative_to(folder).as_posix()


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean train?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=2)
    return f" Did you mean {' or '.join(near)}?" if near else ""
