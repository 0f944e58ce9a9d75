"""The end of a run on the console: its main numbers with intervals, and the path of its report."""

import shlex
from pathlib import Path

from ctrl_jax.evaluation import Estimate, Evaluation, RewardQuality
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.report.measurements import floor_warnings, reward_warnings, trained_on, unfinished_warning
from ctrl_jax.report.names import short_name
from ctrl_jax.report.statistics import lift_share
from ctrl_jax.runtime.console import say, table
from ctrl_jax.theory import procedures


def print_run(run: Workspace, measured: Evaluation, report: Path | None) -> None:
    experiment, policy = run.experiment, run.experiment.policy
    kl, procedure = measured.kl, procedures.parse(policy.procedure).name
    rows = [["KL, nats per response", str(kl), f"{kl.mean / policy.kl_budget - 1:+.1%} of {policy.kl_budget:g}"]]
    for name in dict.fromkeys((procedure, "sampling")):
        if name in measured.win_rates:
            ideal = measured.ideal[name].transform if name in measured.ideal else None
            rows.append([f"{name} win rate", str(measured.win_rates[name]), f"{ideal:.3f}" if ideal else ""])
        for judge, win_rates in (
            ("gold", measured.gold_win_rates),
            (short_name(measured.judge), measured.judge_win_rates),
        ):
            if name in win_rates:
                rows.append([f"{name} win rate, {judge}", str(win_rates[name]), ""])
    for name, one in measured.floors.items():
        rows.append([f"mean rank by {name}", str(one.mean_rank), f"at least {one.floor:g}"])
    for side, length in measured.response_length.items():
        limit = f"at most {experiment.data.response_length}" if side == "policy" else ""
        rows.append([f"response length of the {side}, tokens", f"{length.mean:.1f}", limit])
    prompts = experiment.evaluation.prompts
    intervals = "95 % intervals" if prompts > 1 else "no interval: 1 prompt"
    title = f"{experiment.name}, Φ = {policy.transform}: {prompts} test prompt{'s' * (prompts > 1)}, {intervals}"
    table(title, ["", "measured", "ideal, budget or floor" if measured.floors else "ideal or budget"], rows)
    ideals = measured.ideal.get(procedure)
    if procedure in measured.win_rates and (
        share := lift_share(measured.win_rates[procedure].mean, ideals.transform if ideals else None)
    ):
        say(f"{share:.0%} of the ideal policy's lift over the reference at this KL.")
    others = ["the gold reward"] * bool(measured.gold_win_rates)
    others += [f"the independent judge {measured.judge}"] * (measured.judge is not None)
    beside = f" Of the same picks, {' and '.join(others)} judge{'s' * (len(others) == 1)} too." if others else ""
    say(f"The win rates are judged by {measured.judged_by}.{beside}")
    if measured.reward_training is not None:
        say(trained_on(measured.reward_training))
    for line in quality(measured.reward_model):
        say(line)
    for line in [*reward_warnings(measured), *floor_warnings(measured)]:
        say(line, style="yellow")
    say(f"Ties in reward between policy and reference: {measured.ties:.2%}.")
    if warning := unfinished_warning(measured, experiment.data.response_length):
        say(warning)
    if report is not None:
        print_report(report)
    print_address(run)


def print_address(run: Workspace) -> None:
    """Prints the command that asks the policy something, which needs no options."""
    say(f"Ask it something: make sample EXP={shlex.quote(str(run.work_dir))}")


def print_report(report: Path) -> None:
    say(f"Report: {report}")


def quality(measured: RewardQuality) -> list[str]:
    """Sentences about how the training reward ranks held-out pairs; none without pairs."""
    if measured.agreements is not None:
        alike = f", and gives {measured.equal} of them two equal rewards" if measured.equal else ""
        return [
            f"The reward function ranks {measured.agreements} of {measured.pairs} held-out pairs as their labels "
            f"do{alike}."
        ]
    if measured.accuracy is None:
        return []
    accuracy = Estimate(measured.accuracy, measured.accuracy_low, measured.accuracy_high)
    pairs = "" if measured.pairs is None else f" on {measured.pairs} held-out pairs"
    calibrated = "" if measured.ece is None else f", expected calibration error {measured.ece:.3f}"
    calibrated += "" if measured.brier is None else f", Brier score {measured.brier:.3f} (a guess has 0.250)"
    found = [f"Reward model: accuracy {accuracy}{pairs}{calibrated}."]
    if measured.margin_length_correlation is not None:
        found.append(
            f"Rank correlation of its margins on these pairs with length: {measured.margin_length_correlation:.3f}."
        )
    return found
