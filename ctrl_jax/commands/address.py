"""The address of a run: its work directory, whose config.json has all options that it was made with."""

import dataclasses
import json
import os
import types
import typing
from pathlib import Path
from typing import Any

from ctrl_jax.config import Experiment, Policy
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import results
from ctrl_jax.runtime.stages import differences

BESIDE_THE_EXPERIMENT = ("versions", "contents")
"""Entries of config.json that are no fields of an experiment."""
JUDGE = "evaluation.judge"
"""The one option that may be given to a finished run, or changed."""


def read_config(work_dir: Path) -> dict[str, Any]:
    """The object in config.json.

    Raises:
      InputError: if it is missing or damaged. It holds options alone: the fix is another copy of it.
    """
    path = work_dir / "config.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read ({error}). It holds the options of this run and nothing else: put back a copy, or "
            "delete this one file and run the command that trained here, which writes it again."
        ) from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} has a {type(tree).__name__} where an experiment must stand.")
    return tree


def read_experiment(work_dir: Path) -> Experiment:
    """The experiment of a work directory, which has passed the checks of every experiment.

    Fields that a newer version has added get their defaults.

    Raises:
      InputError: if config.json is missing or damaged, or another version wrote it with other fields, which it names.
    """
    tree = {name: value for name, value in read_config(work_dir).items() if name not in BESIDE_THE_EXPERIMENT}
    if not tree.keys() & {"name", "data", "policy"}:
        raise InputError(f"{work_dir / 'config.json'} is not of a run; give the folder of one, or an experiment.")
    try:
        return _read(Experiment, tree, "")
    except InputError as error:
        raise InputError(f"{work_dir / 'config.json'}: {error}") from error


def check_versions(work_dir: Path) -> None:
    """Refuses a run that was made by code with other results.

    Raises:
      InputError: naming each stage with both versions.
    """
    from ctrl_jax.pipeline.stages import versions

    others = differences(read_config(work_dir).get("versions") or {}, versions(read_experiment(work_dir)))
    if others:
        changed = ", ".join(f"{name} {old}, now {new}" for name, (old, new) in others.items())
        raise InputError(
            f"{work_dir} was made by another version of ctrl_jax: {changed}. `report` and `runs` still read it; for "
            "the rest use that version (environment.json names its commit), or train anew in another place."
        )


def runs_dir(work_dir: Path) -> Path:
    """The folder that holds a run's `stages/`: as the run recorded, else one folder up, for a point of a sweep two."""
    above = Path(os.path.abspath(work_dir)).parent
    beside = above.parent if above.name.endswith(".sweep") else above
    found = _recorded(work_dir) or beside
    return Path(os.path.relpath(found)) if found.is_relative_to(Path.cwd()) else found


def _recorded(work_dir: Path) -> Path | None:
    """The folder that environment.json names, if it still exists: --work-dir may have been far from --runs-dir."""
    try:
        stages = json.loads((work_dir / "environment.json").read_text(encoding="utf-8"))["stages"]
        path = Path(os.path.abspath(work_dir / stages))
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return path.parent if path.name == "stages" and path.is_dir() else None


def check_unchanged(work_dir: Path, own: Experiment, asked: Experiment) -> None:
    """Refuses options other than those that the run was trained with.

    Raises:
      InputError: with both values of each.
    """
    differing = differences(own, asked)
    allowed = results.may_differ(set(differing)) | {JUDGE}
    changed = {name: pair for name, pair in differing.items() if name not in allowed}
    if changed:
        given = ", ".join(f"--{_option(name)} is {json.dumps(old)} there, not {json.dumps(new)}"
                         for name, (old, new) in changed.items())  # fmt: skip
        raise InputError(
            f"{work_dir} is a run with options of its own: {given}. Leave them out; to train with others, name an "
            "experiment instead of a run."
        )


def _option(name: str) -> str:
    return name.replace("_", "-")


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value`, as `stages.plain` wrote it, as a `kind` again: dataclass, tuple, union, Literal, or plain type."""
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kind = next(one for one in arguments if one is not type(None))
        return _read(kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], item, where) for item in value)
    if origin is typing.Literal and value in arguments:
        return value
    if kind is float and value in ("inf", "-inf", "nan"):
        return float(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308:
        return value  # a whole number stays one: keys distinguish 1 from 1.0
    if kind in (str, bool) and type(value) is kind:
        return value
    if kind is int and type(value) is int and abs(value) < 2**63:
        return value
    raise InputError(f"{where} is {json.dumps(value)[:200]}, where {_shown(kind)} must stand.")


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{where or 'it'} is {json.dumps(value)[:200]}, where an object must stand.")
    if issubclass(kind, Policy) and "algorithm" in value:
        kind, value = _algorithms_options(dict(value), where)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    unknown = [f"{prefix}{name}" for name in value if name not in fields]
    if unknown:
        raise InputError(
            f"This version of ctrl_jax has no {', '.join(unknown)}: another one wrote it. Use that one for this run."
        )
    needed = [
        name
        for name, field in fields.items()
        if field.default is field.default_factory is dataclasses.MISSING and name not in value
    ]
    if needed:
        raise InputError(f"it has no {', '.join(prefix + name for name in needed)}.")
    return kind(**{name: _read(hints[name], item, prefix + name) for name, item in value.items()})


def _algorithms_options(value: dict[str, Any], where: str) -> tuple[type[Policy], dict[str, Any]]:
    """The class of options that belongs to an algorithm, and its fields."""
    name = value.pop("algorithm")
    found = [kind for kind in _below(Policy) if getattr(kind, "algorithm", None) == name]
    if not found:
        raise InputError(f"{where}.algorithm is {name!r}, which this version of ctrl_jax does not have.")
    return found[0], value


def _below(kind: type[Policy]) -> list[type[Policy]]:
    """Its subclasses, and theirs."""
    return [found for one in kind.__subclasses__() for found in (one, *_below(one))]


def _shown(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    return "a list" if typing.get_origin(kind) is tuple else str(getattr(kind, "__name__", kind))
