"""The whole path: whatever stages are missing, the policy's training, evaluation and report."""

from ctrl_jax.commands import report, summary
from ctrl_jax.pipeline import evaluate, train
from ctrl_jax.pipeline.run import Run
from ctrl_jax.runtime import hosts


def run(run: Run) -> None:
    """Does what of it is missing, and prints the main numbers; of several hosts the first writes the report."""
    with run.claimed():
        evaluation = evaluate.read(run) or evaluate.run(run, train.run(run))
        summary.print_run(run, evaluation, report.run(run.work_dir) if hosts.first() else None)
