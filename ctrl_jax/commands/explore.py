"""The theory in a page: procedure, N, KL and transform by sliders, with what perfect training would win."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from ctrl_jax.config import expand_user
from ctrl_jax.report import explorer_page
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import write_bytes


@dataclass(frozen=True)
class Options:
    output: Path = Path("runs/explorer.html")
    """The page, one file that needs nothing else."""

    def __post_init__(self) -> None:
        expand_user(self, "output")


def main(arguments: list[str]) -> int:
    options = tyro.cli(Options, args=arguments, prog="python -m ctrl_jax explore", description=__doc__)
    write_bytes(options.output, explorer_page.render().encode())
    say(f"Open {options.output} in a browser.")
    return 0
