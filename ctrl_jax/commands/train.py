"""The whole path: the stages that are missing, the policy's training, its evaluation and its report."""

from typing import TYPE_CHECKING

from ctrl_jax.commands.options import Options, read

if TYPE_CHECKING:
    from ctrl_jax.pipeline.workspace import Workspace


def main(arguments: list[str]) -> int:
    asked = read("train", Options, arguments)
    from ctrl_jax.commands.launch import started

    with started(asked) as workspace:
        align(workspace)
    return 0


def align(workspace: "Workspace") -> None:
    """Runs the stages that are missing and prints the main numbers; of several hosts the first writes the report."""
    from ctrl_jax.commands import report, summary
    from ctrl_jax.pipeline import align
    from ctrl_jax.runtime import hosts

    evaluation = align.run(workspace)
    summary.print_run(workspace, evaluation, report.write(workspace.work_dir) if hosts.first() else None)
