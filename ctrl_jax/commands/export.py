"""The trained policy, merged or its adapter alone, or the reward model, as a directory that other tools serve."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ctrl_jax.commands.options import Options as RunOptions
from ctrl_jax.commands.options import read
from ctrl_jax.config import expand_user


@dataclass(frozen=True)
class Options(RunOptions):
    output: Path | None = None
    """The directory to write; by default `export`, `export-adapter` or `export-reward` in the work directory."""
    format: Literal["merged", "adapter", "reward"] = "merged"
    """The whole policy; its LoRA adapter in PEFT's form; or the reward model as a sequence classifier, with the rewards
    of the reference's responses to the training prompts."""

    def __post_init__(self) -> None:
        expand_user(self, "output")


DEFAULT_OUTPUT = {"merged": "export", "adapter": "export-adapter", "reward": "export-reward"}
"""Directories of a work directory."""


def main(arguments: list[str]) -> int:
    asked = read("export", Options, arguments)
    from ctrl_jax.commands.launch import started
    from ctrl_jax.pipeline import align, export, export_reward
    from ctrl_jax.pipeline.run import prepare

    form = asked.options.format
    output = asked.options.output or asked.work_dir / DEFAULT_OUTPUT[form]
    with started(asked) as workspace:
        if form == "reward":
            export_reward.check(workspace.experiment, output)
            with workspace.claimed():
                export_reward.run(prepare(workspace), output)
            return 0
        export.check(workspace.experiment, output, form)
        with workspace.claimed():
            run = prepare(workspace)
            aligned = align.policy(run)
        export.run(run, aligned, output, form)
    return 0
