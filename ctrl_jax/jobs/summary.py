"""What a run prints when it ends: where its report is, and its main numbers with intervals."""

import shlex
from pathlib import Path
from typing import Any

from ctrl_jax.jobs.run import Run
from ctrl_jax.report.measurements import lift_share
from ctrl_jax.runtime.console import say, table


def print_run(run: Run, evaluation: dict[str, Any], report: Path | None) -> None:
    experiment, policy = run.experiment, run.experiment.policy
    kl, quality = evaluation["kl"], evaluation["reward_model"]
    rows = [
        ["KL, nats per response", estimate(kl), f"{kl['mean'] / policy.kl_budget - 1:+.1%} of {policy.kl_budget:g}"]
    ]
    for name in dict.fromkeys((policy.procedure, "sampling")):
        if name in evaluation["win_rates"]:
            ideal = evaluation["ideal"].get(name, {}).get("transform")
            rows.append([f"{name} win rate", estimate(evaluation["win_rates"][name]), f"{ideal:.3f}" if ideal else ""])
        if name in evaluation["gold_win_rates"]:
            rows.append([f"{name} win rate, gold", estimate(evaluation["gold_win_rates"][name]), ""])
    title = f"{experiment.name}, Φ = {policy.transform}: {experiment.evaluation.prompts} test prompts, 95 % intervals"
    table(title, ["", "measured", "ideal or budget"], rows)
    ideal = evaluation["ideal"].get(policy.procedure, {}).get("transform")
    if policy.procedure in evaluation["win_rates"] and (
        share := lift_share(evaluation["win_rates"][policy.procedure]["mean"], ideal)
    ):
        say(f"{share:.0%} of the ideal policy's lift over the reference at this KL.")
    if quality:
        say(f"Reward model: accuracy {quality['accuracy']:.3f}, expected calibration error {quality['ece']:.3f}.")
    say(f"Ties in reward between policy and reference: {evaluation['ties']:.2%}.")
    if report is not None:
        print_report(report)
    print_address(run)


def print_address(run: Run) -> None:
    """How to ask the policy something, without its options."""
    say(f"Ask it something: make sample EXP={shlex.quote(str(run.work_dir))}")


def print_report(report: Path) -> None:
    say(f"Report: {report}")


def estimate(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
