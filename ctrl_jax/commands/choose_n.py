"""Which N to serve a policy with: what best-of-N wins, where it turns down, and what N responses risk.

Reads files as `judge` does. Win rates are against one response of the reference, so that what they gain from N is what
N buys.
"""

import json
from dataclasses import dataclass

import tyro

from ctrl_jax.commands import figure, scored_files
from ctrl_jax.commands.judge import NO_INTERVAL
from ctrl_jax.commands.scored_files import Files
from ctrl_jax.report.choice import Choice, check_shares, choose_n
from ctrl_jax.report.panels import over_n
from ctrl_jax.runtime.console import say, table


@dataclass(frozen=True)
class Options(Files):
    within: float = 0.01
    """The cheapest N is the least whose win rate is at most that below the best."""
    lowest: float = 0.05
    """A response counts as bad that is among that share of the reference's lowest on its prompt."""


def main(arguments: list[str]) -> int:
    return run(tyro.cli(Options, args=arguments, prog="python -m ctrl_jax choose-n", description=__doc__))


def run(options: Options) -> int:
    """Prints win rate and risk by N with what to choose, and draws both.

    Raises:
      InputError: if a file, a function or an option cannot be used.
    """
    check_shares(options.within, options.lowest)
    scores = scored_files.read(options)
    found = choose_n(**scores._asdict(), within=options.within, lowest=options.lowest)
    path = options.picture("choose_n")
    if path is not None:
        figure.write(path, over_n.of_choice(found), options.policy.name)
    if options.json:
        print(json.dumps(found.as_json(), indent=2))
        return 0
    _print(found, options)
    if path is not None:
        say(f"Figure: {path}")
    return 0


def _print(found: Choice, options: Options) -> None:
    judged, risk = found.judge_win_rates, found.risk
    bad = f"one is among the reference's lowest {100 * risk.share:.1f} %"
    columns = ["N", f"best of N wins, by {options.reward}", *([f"by {options.judge}"] if judged else [])]
    rows = [
        [n, str(one), *([str(judged[n])] if judged else []), str(risk.counted[n]), f"{risk.of_reference(n):.3f}"]
        for n, one in found.win_rates.items()
    ]
    rows += [
        [n, "", *([""] if judged else []), f"{one} *", f"{risk.of_reference(n):.3f}"]
        for n, one in risk.extrapolated.items()
    ]
    title = f"{options.policy}: against one response of {options.reference}, {found.prompts} prompts, 95 % intervals"
    table(title, [*columns, f"of N, {bad}", "of the reference's N"], rows)
    if risk.is_tied:
        say(
            f"Values tie at the threshold: {risk.own:.1%} of the reference's own responses are at it or below, and the "
            "risk is that of one of these. Give a judge that tells them apart, or another --lowest.",
            style="yellow",
        )
    if risk.extrapolated:
        say("* extrapolated: the share of such responses is taken to follow a Beta law over prompts.")
    elif not risk.seen:
        say("No response of the policy is among them, so nothing is said of more responses than were sampled.")
    elif len(found.win_rates) == 1:
        say("One response a prompt does not show how prompts differ, so nothing is said of more of them.")
    if any(one.low is None for one in (*found.win_rates.values(), *judged.values(), *risk.counted.values())):
        say(NO_INTERVAL)
    by = options.judge or options.reward
    say(f"Best by {by}: N = {found.best}. Cheapest within {found.within:g} of it: N = {found.cheapest}. {_turn(found)}")
    if (stop := found.early_stop) is not None:
        say(
            f"Drawn one by one until one is among the reference's highest {100 * stop.share:.1f} %, at most "
            f"{max(found.win_rates)}, {stop.draws.mean:.1f} responses in the mean are as near to it: {stop.deciding}. "
            "That takes the reference's rewards on the prompt, which best-of-N does without."
        )


def _turn(found: Choice) -> str:
    largest = max(found.win_rates)
    if found.decline is None:
        return f"The win rate does not turn down up to N = {largest}."
    shown = f"from N = {found.best} to {largest} it loses {found.decline} (an interval for the best of so many N)"
    return f"It turns down: {shown}." if found.turns_down else f"It does not show that it turns down: {shown}."
