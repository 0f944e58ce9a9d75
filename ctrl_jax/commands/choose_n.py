"""Which N to serve a policy with: what best-of-N wins, where it turns down, and what N responses risk.

Reads files as `judge` does. Win rates are against one response of the reference, so that what they gain from N is what
N buys.
"""

import json
from dataclasses import dataclass

import tyro

from ctrl_jax.commands import scored_files
from ctrl_jax.commands.scored_files import Files
from ctrl_jax.report import pictures
from ctrl_jax.report.choice import Choice, choose_n
from ctrl_jax.report.panels import over_n
from ctrl_jax.runtime.console import say, table
from ctrl_jax.runtime.stages import write_bytes


@dataclass(frozen=True)
class Options(Files):
    within: float = 0.01
    """The cheapest N is the least whose win rate is at most that below the best."""
    bad_rank: float = 0.05
    """A response counts as bad where its rank among the reference's is at most that."""


def main(arguments: list[str]) -> int:
    return run(tyro.cli(Options, args=arguments, prog="python -m ctrl_jax choose-n", description=__doc__))


def run(options: Options) -> int:
    """Prints win rate and risk by N with what to choose, and draws both.

    Raises:
      InputError: if a file, a function or an option cannot be used.
    """
    scores = scored_files.read(options)
    found = choose_n(**scores._asdict(), within=options.within, bad_rank=options.bad_rank)
    path = options.picture("choose_n")
    if path is not None:
        kind = path.suffix.removeprefix(".")
        panels = over_n.of_choice(found)
        write_bytes(path, pictures.draw(panels, (kind,), columns=2, title=options.policy.name)[kind])
    if options.json:
        print(json.dumps(found.as_json(), indent=2))
        return 0
    _print(found, options)
    if path is not None:
        say(f"Figure: {path}")
    return 0


def _print(found: Choice, options: Options) -> None:
    judged, risk = found.judge_win_rates, found.risk
    bad = f"a response ranks at {risk.rank:g} or below"
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
    table(title, [*columns, f"of N, {bad}", "the reference's"], rows)
    if risk.extrapolated:
        say("* extrapolated: the share of bad responses follows a Beta law over prompts (report/risk.py).")
    elif not risk.seen:
        say("None of the policy's responses is bad, so nothing can be said of more of them than were sampled.")
    by = options.judge or options.reward
    say(f"Best by {by}: N = {found.best}. Cheapest within {found.within:g} of it: N = {found.cheapest}. {_turn(found)}")


def _turn(found: Choice) -> str:
    largest = max(found.win_rates)
    if found.decline is None:
        return f"The win rate does not turn down up to N = {largest}."
    shown = f"from N = {found.best} to {largest} it loses {found.decline}"
    return f"It turns down: {shown}." if found.turns_down else f"It does not show that it turns down: {shown}."
