"""Win rates of a policy against its reference, of responses that any engine sampled: unbiased, with 95 % intervals.

Two files of JSON lines have a row a prompt: {"prompt": ..., "responses": [...], "rewards": [...]}. Both sides are
decoded by the same procedure, such as best-of-4, and intervals are over prompts.
"""

import json
from dataclasses import dataclass

import tyro

from ctrl_jax.commands import figure, scored_files
from ctrl_jax.commands.scored_files import Files
from ctrl_jax.report.judgement import Judgement, judge
from ctrl_jax.report.names import procedure_order
from ctrl_jax.report.panels import over_n
from ctrl_jax.runtime.console import say, table
from ctrl_jax.theory import procedures

NO_INTERVAL = "There is no interval of fewer than 5 prompts, nor where all prompts are equal."


@dataclass(frozen=True)
class Options(Files):
    procedures: tuple[str, ...] = ()
    """What decodes both sides, such as `best_of_4`; by default one sample, and best and worst of 2, 4, 8 ... as far as
    both sides have responses."""


def main(arguments: list[str]) -> int:
    return run(tyro.cli(Options, args=arguments, prog="python -m ctrl_jax judge", description=__doc__))


def run(options: Options) -> int:
    """Prints the win rates, and draws them over N.

    Raises:
      InputError: if a file, a function or a procedure cannot be used.
    """
    asked = [procedures.parse(name) for name in options.procedures]
    scores = scored_files.read(options, asked)
    found = judge(**scores._asdict(), procedures=asked or None)
    path = options.picture("judge")
    panels = over_n.of_judgement(found)
    if path is not None and panels:
        figure.write(path, panels, options.policy.name)
    if options.json:
        print(json.dumps(found.as_json(), indent=2))
        return 0
    _print(found, options)
    if path is not None:
        say(f"Figure: {path}" if panels else "No figure: there is no best-of-N or worst-of-N to draw over N.")
    return 0


def _print(found: Judgement, options: Options) -> None:
    ours, theirs = found.samples
    columns = ["", f"win rate by {options.reward}", *([f"by {options.judge}"] if found.judge_win_rates else [])]
    rows = [
        [name, str(found.win_rates[name]), *([str(found.judge_win_rates[name])] if found.judge_win_rates else [])]
        for name in sorted(found.win_rates, key=procedure_order)
    ]
    sizes = f"{found.prompts} prompts, {ours} and {theirs} responses to each"
    table(f"{options.policy} against {options.reference}: {sizes}, 95 % intervals over prompts", columns, rows)
    say(
        f"Calibrated reward: a response of the policy ranks at {found.calibrated_reward} among the reference's; one of "
        f"the reference's own at .5. {100 * found.ties:.1f} % of the pairs of responses tie, and count one half."
    )
    if any(one.low is None for one in (*found.win_rates.values(), *found.judge_win_rates.values())):
        say(NO_INTERVAL)
