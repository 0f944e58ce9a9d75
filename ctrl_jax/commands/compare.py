"""Two finished runs on the same prompts: the first less the second, with paired 95 % intervals.

Both must have been evaluated beside the same responses of the reference: then what makes a prompt easy or hard for both
cancels, and the intervals are narrower than those of the runs apart.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ctrl_jax.pipeline import results
from ctrl_jax.report.comparison import Comparison, Difference, compare, sentences
from ctrl_jax.report.measurements import Run, read_run
from ctrl_jax.report.names import procedure_order
from ctrl_jax.runtime.console import say, table


@dataclass(frozen=True)
class Options:
    run: Annotated[Path, tyro.conf.Positional]
    """The folder of a run, such as runs/bon_helpful."""
    baseline: Annotated[Path, tyro.conf.Positional]
    """The folder of the run that it is compared with."""
    json: bool = False
    """Print JSON for programs, and nothing else."""


def main(arguments: list[str]) -> int:
    options = tyro.cli(Options, args=arguments, prog="python -m ctrl_jax compare", description=__doc__)
    run, baseline = (_read(folder) for folder in (options.run, options.baseline))
    found = compare(run, baseline, names=(str(options.run), str(options.baseline)))
    if options.json:
        print(json.dumps(found.as_json(), indent=2))
        return 0
    rows = [
        [name, f"{one.run:.3f}", f"{one.baseline:.3f}", f"{one.difference:+.3f}", one.verdict]
        for name, one in _rows(found)
    ]
    columns = ["", "run", "baseline", "difference", "the difference is"]
    title = f"{found.run} less {found.baseline}: {found.prompts} test prompts, paired 95 % intervals"
    table(title, columns, rows)
    say(sentences(found))
    return 0


def _read(folder: Path) -> Run:
    folder = Path(os.path.expanduser(folder))
    results.check(folder)
    return read_run(folder)


def _rows(found: Comparison) -> Iterator[tuple[str, Difference]]:
    if found.kl is not None:
        yield "KL, nats per response", found.kl
    others = (("gold", found.gold_win_rates), ("the judge", found.judge_win_rates))
    for procedure in sorted(found.win_rates, key=procedure_order):
        yield f"{procedure} win rate", found.win_rates[procedure]
        if procedure in found.at_equal_kl:
            yield f"{procedure} win rate at {found.equal_kl:.3f} nats", found.at_equal_kl[procedure]
        for judge, by_procedure in others:
            if procedure in by_procedure:
                yield f"{procedure} win rate, {judge}", by_procedure[procedure]
