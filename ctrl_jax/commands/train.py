"""The whole path: the stages that are missing, the policy's training, its evaluation and its report."""

from typing import TYPE_CHECKING

from ctrl_jax.commands.options import Options, read

if TYPE_CHECKING:
    from ctrl_jax.pipeline.run import Run


def main(arguments: list[str]) -> int:
    asked = read("train", Options, arguments)
    from ctrl_jax.commands.launch import started

    with started(asked) as run:
        align(run)
    return 0


def align(run: "Run") -> None:
    """Runs the stages that are missing and prints the main numbers; of several hosts the first writes the report."""
    from ctrl_jax.commands import report, summary
    from ctrl_jax.pipeline import evaluate, train
    from ctrl_jax.runtime import hosts

    with run.claimed():
        evaluation = evaluate.read(run) or evaluate.run(run, train.run(run))
        summary.print_run(run, evaluation, report.write(run.work_dir) if hosts.first() else None)
