"""A trace of a few policy steps, with the time of each of their parts."""

from dataclasses import dataclass

from ctrl_jax.commands.options import Options as RunOptions
from ctrl_jax.commands.options import read


@dataclass(frozen=True)
class Options(RunOptions):
    steps: int = 3
    """Steps to time, and as many to trace."""

    @property
    def needs_stages(self) -> bool:
        return False


def main(arguments: list[str]) -> int:
    asked = read("profile", Options, arguments)
    from ctrl_jax.commands.launch import started
    from ctrl_jax.planning import profile

    with started(asked) as run:
        profile.run(run.experiment, run.mesh, run.work_dir, steps=asked.options.steps)
    return 0
