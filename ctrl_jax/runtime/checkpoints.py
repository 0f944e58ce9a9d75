"""Checkpoints of everything a job needs to go on as if it had never stopped; a thin layer over Orbax.

The layer adds: a checkpoint of another configuration or structure is refused by name; every file's checksum is
checked before it is read (Orbax restores some flipped bits in silence), and a damaged checkpoint is reported and set
aside; and the best is kept beside the newest. Orbax can do the last, but reads the metrics of every checkpoint at its
start for it, and stops at those of a damaged one.
"""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import checksums, hosts, preemption
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import write_json

State = TypeVar("State")
CHECKSUMS = "checksums.json"
"""The seal of a checkpoint (checksums.py)."""


class Checkpoints:
    """The newest `keep` checkpoints of one job and its best one, in the folders `<directory>/<step>`.

    A checkpoint counts once its checksums are written, which comes last. Saving is synchronous: once `save` returns, a
    kill cannot take the checkpoint away, and the arrays may be donated. That costs about 100 ms for 1.5 MB on two
    cores, against 15 ms to hand it to a thread.
    """

    def __init__(self, directory: Path, *, fingerprint: str, keep: int = 2):
        """
        Args:
          directory: made if missing.
          fingerprint: of all that the state depends on (stages.fingerprint); a checkpoint with another is refused.
          keep: how many of the newest stay, besides the best.
        """
        self._directory = Path(directory).absolute()
        self._fingerprint = fingerprint
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None, enable_async_checkpointing=False, cleanup_tmp_directories=True
            ),
        )
        self._keep = keep
        self._scores: dict[int, float] = {}

    def save(self, step: int, state: Any, data: dict[str, Any], *, score: float = -math.inf) -> None:
        """Saves the state after `step` steps.

        Args:
          step: greater than that of every checkpoint in the directory.
          state: any pytree of arrays, typed random keys included.
          data: what is not an array, as JSON: the data iterator's position.
          score: the checkpoint with the highest one stays, and of several the newest.
        """
        arrays = _by_name(state)
        description = {
            "fingerprint": self._fingerprint,
            "structure": {name: _shape(array) for name, array in arrays.items()},
            "data": data,
            "score": score if math.isfinite(score) else None,
        }
        with _quiet():
            saved = self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), data=ocp.args.JsonSave(description))
            )
        if not saved:
            # Orbax declines in silence.
            raise RuntimeError(
                f"Step {step} is not after {self._manager.latest_step()}, the newest in {self._directory}."
            )
        if hosts.first():
            folder = self._directory / str(step)
            write_json(folder / CHECKSUMS, checksums.sealed(folder, _files(folder), {"step": step}))
        self._scores[step] = score
        steps = sorted(self._manager.all_steps())
        best = max(steps, key=lambda step: (self._score(step), step))
        for old in steps[: -self._keep]:
            if old != best:
                self._manager.delete(old)

    def restore(self, abstract_state: State) -> tuple[int, State, dict[str, Any]] | None:
        """The newest checkpoint that is whole as (step, state, data), or None where there is none.

        Those that are not whole are reported, and moved to `damaged-<step>`.

        Args:
          abstract_state: the pytree to fill, of arrays or of `jax.ShapeDtypeStruct`s, with the shardings wanted, which
            need not be those that were saved; without one, an array goes to the first device.

        Raises:
          InputError: if the newest checkpoint is one of another configuration or structure.
        """
        if hosts.first():
            self._set_damaged_aside()
        hosts.wait("damaged checkpoints are set aside")
        self._manager.reload()
        step = self._manager.latest_step()
        if step is None:
            return None
        description = self._read(step, "data", ocp.args.JsonRestore())
        targets = _by_name(abstract_state)
        self._check_fits(step, description, targets)
        # Without a sharding Orbax asks for the devices it was saved from, which may not be here.
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        targets = {
            name: jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=target.sharding or first)
            for name, target in targets.items()
        }
        arrays = self._read(step, "state", ocp.args.StandardRestore(targets))
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in targets])
        return step, state, description["data"]

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _read(self, step: int, item: str, args: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]

    def _score(self, step: int) -> float:
        if step not in self._scores:
            try:
                self._scores[step] = float(self._read(step, "data", ocp.args.JsonRestore())["score"])
            except Exception:  # damaged, without a score, or of an older version
                preemption.check()  # or Orbax has made it of a signal
                self._scores[step] = -math.inf
        return self._scores[step]

    def _set_damaged_aside(self) -> None:
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self._directory / str(step)
            reason = _damage(folder)
            if reason is None:
                return
            place, number = folder.with_name(f"damaged-{step}"), 1
            while place.exists():
                place, number = folder.with_name(f"damaged-{step}-{number}"), number + 1
            os.rename(folder, place)
            say(
                f"The checkpoint {folder} is damaged: {reason}. It is set aside as "
                f"{place.name}, and the one before it is used, or the start where there is none.",
                style="yellow",
            )

    def _check_fits(self, step: int, description: dict[str, Any], targets: dict[str, Any]) -> None:
        saved = description.get("fingerprint")
        if saved != self._fingerprint:
            raise InputError(
                f"The checkpoint {self._directory / str(step)} was saved by another configuration (fingerprint "
                f"{saved}, now {self._fingerprint}). Go back to that configuration, or move {self._directory} away to "
                "start anew."
            )
        old, new = description["structure"], {name: _shape(target) for name, target in targets.items()}
        differing = [
            f"{name}: {old.get(name, 'absent')} → {new.get(name, 'absent')}"
            for name in dict.fromkeys([*old, *new])
            if old.get(name) != new.get(name)
        ]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise InputError(
                f"The checkpoint {self._directory / str(step)} has another structure than this program's state: "
                f"{', '.join(differing[:3])}{more}. It was saved by another version of the program: go back to that, "
                f"or move {self._directory} away to start anew."
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, Orbax does not print the traceback of what it raises as well."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        absl.setLevel(level)


def _by_name(tree: Any) -> dict[str, Any]:
    """The leaves by their paths: Orbax sees one flat dict, whatever the types of the nodes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _shape(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files."""
    seal = folder / CHECKSUMS
    if not seal.exists():
        return f"{CHECKSUMS} is missing, so that it was not finished"
    broken = checksums.broken(seal)
    if broken == [CHECKSUMS]:
        return f"{CHECKSUMS} cannot be read"
    if broken:
        return f"{broken[0]} is {'not what was written' if (folder / broken[0]).exists() else 'missing'}"
    step = checksums.about(seal)["step"]
    return None if folder.name == str(step) else f"it is the checkpoint of step {step}"


def _files(folder: Path) -> list[str]:
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != CHECKSUMS and not path.name.endswith(".tmp")
    ]
