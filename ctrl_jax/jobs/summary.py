"""What a run prints when it ends: where its report is, and its main numbers with intervals."""

from pathlib import Path
from typing import Any

from ctrl_jax.jobs.run import Run
from ctrl_jax.runtime.console import say, table


def print_run(run: Run, evaluation: dict[str, Any], report: Path | None) -> None:
    policy = run.experiment.policy
    wanted = ["sampling", policy.procedure]
    rows = []
    for name in dict.fromkeys(name for name in wanted if name in evaluation["win_rates"]):
        ideal = evaluation["ideal"].get(name, {})
        rows.append(
            [
                f"win rate, {name}",
                estimate(evaluation["win_rates"][name]),
                estimate(evaluation["gold_win_rates"][name]),
                *(f"{ideal[kind]:.3f}" if kind in ideal else "" for kind in ("identity", "transform", "optimal")),
            ]
        )
    kl = evaluation["kl"]
    missed = kl["mean"] / policy.kl_budget - 1
    table(
        f"{run.experiment.name}: Φ = {policy.transform}, on {run.experiment.evaluation.prompts} test prompts, 95 % intervals",
        ["", "reward model", "gold reward", "ideal identity", f"ideal {policy.transform}", "ideal optimal"],
        rows,
    )
    say(f"KL {estimate(kl)} nats per response: {missed:+.1%} of the budget of {policy.kl_budget:g}.")
    quality = evaluation["reward_model"]
    say(
        f"Reward model: accuracy {quality['accuracy']:.3f}, expected calibration error {quality['ece']:.3f}. "
        f"Ties {evaluation['ties']:.2%}."
    )
    if report is not None:
        print_report(report)


def print_report(report: Path) -> None:
    say(f"Report: {report}")


def estimate(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
