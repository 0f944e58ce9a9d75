"""The trained policy as a directory that other tools serve: merged weights, or the adapter alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ctrl_jax.commands.options import Options as RunOptions
from ctrl_jax.commands.options import read
from ctrl_jax.config import expand_user


@dataclass(frozen=True)
class Options(RunOptions):
    output: Path | None = None
    """The directory to write; by default `export` or `export-adapter` in the work directory."""
    format: Literal["merged", "adapter"] = "merged"
    """The whole model, or its LoRA adapter in PEFT's form."""

    def __post_init__(self) -> None:
        expand_user(self, "output")


DEFAULT_OUTPUT = {"merged": "export", "adapter": "export-adapter"}
"""Directories of a work directory."""


def main(arguments: list[str]) -> int:
    asked = read("export", Options, arguments)
    from ctrl_jax.commands.launch import started
    from ctrl_jax.pipeline import align, export
    from ctrl_jax.pipeline.run import prepare

    form = asked.options.format
    output = asked.options.output or asked.work_dir / DEFAULT_OUTPUT[form]
    with started(asked) as workspace:
        export.check(workspace.experiment, output, form)
        with workspace.claimed():
            run = prepare(workspace)
            aligned = align.policy(run)
        export.run(run, aligned, output, form)
    return 0
