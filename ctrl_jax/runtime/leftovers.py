"""A job that fails before it made anything leaves no folder behind."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from ctrl_jax.runtime import hosts

BOOKKEEPING = ("lock", "config.json", "environment.json", "stage.json")
"""What a job writes before it makes anything."""


@contextlib.contextmanager
def removed_on_failure(work_dir: Path, stages_dir: Path) -> Iterator[None]:
    """Where the block raises, removes what it left without a result: the claim on `work_dir`, new empty stages.

    A work directory that had its claim before is left alone. A new one stays where the job has made something in it or
    a stage of its own; data is no result, it may have been what the job refused. What another process holds stays.
    """
    had_claim, had_folder = (work_dir / "config.json").exists(), work_dir.exists()
    before = set(stages_dir.glob("*"))
    missing = {folder for place in (work_dir, stages_dir) for folder in (place, *place.parents) if not folder.exists()}
    try:
        yield
    except BaseException:
        if hosts.first():
            new = set(stages_dir.glob("*")) - before
            for stage in new:
                if not _made(stage):
                    _remove(stage)
            results = any(stage.exists() and not stage.name.startswith("data-") for stage in new)
            if not had_claim and not results and not _made(work_dir):
                _remove(work_dir)
                if had_folder:
                    work_dir.mkdir(exist_ok=True)
            for folder in sorted(missing, key=lambda folder: len(folder.parts), reverse=True):
                with contextlib.suppress(OSError):  # not empty, or never made
                    folder.rmdir()
        raise


def _made(folder: Path) -> bool:
    return any(
        path.is_file()
        and path.stat().st_size > 0
        and path.name not in BOOKKEEPING
        and not path.name.startswith("events.out.tfevents")
        for path in folder.rglob("*")
    )


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "lock").open("a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where another process works there
        shutil.rmtree(folder)
