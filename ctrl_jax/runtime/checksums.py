"""Checksums of what is finished: a *seal* is a JSON file beside other files, written last, with the sha256 of each.

It has a checksum of itself too, so that a seal that is damaged, or `{}`, counts as none.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import hosts


def sealed(folder: Path, names: Iterable[str], about: Any) -> dict[str, Any]:
    """What to write as the seal of the files `names`, paths relative to `folder`; `about` is any JSON to go with it."""
    seal = {"about": about, "files": {name: of_file(folder / name) for name in sorted(names)}}
    return {**seal, "sha256": _of_json(seal)}


def broken(seal: Path) -> list[str]:
    """The names of the files that are missing or not what was written; of a seal that is none, its own name alone."""
    contents = _read(seal)
    if contents is None:
        return [seal.name]
    return [name for name, expected in contents["files"].items() if _of_regular(seal.parent / name) != expected]


def about(seal: Path) -> Any:
    """The `about` of a seal.

    Raises:
      InputError: if it is missing or damaged.
    """
    contents = _read(seal)
    if contents is None:
        raise InputError(f"{seal} is missing or damaged. The same command makes it anew.")
    return contents["about"]


def of_file(path: Path) -> str:
    """The sha256 of a file of any size, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_arrays(tree: Any) -> str:
    """The sha256 of a tree of arrays: names, types, shapes and bytes. All processes have to call it together."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.asarray(hosts.fetch(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _of_regular(path: Path) -> str | None:
    try:
        return of_file(path) if path.is_file() else None  # a pipe would never end
    except OSError:
        return None


def _of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read(seal: Path) -> dict[str, Any] | None:
    try:
        if not seal.is_file():
            return None
        contents = json.loads(seal.read_bytes())
        whole = contents.pop("sha256") == _of_json(contents) and contents.keys() == {"about", "files"}
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return None
    return contents if whole else None
