"""The time and memory of an experiment on devices that need not be here."""

from ctrl_jax.commands.options import read_name


def main(arguments: list[str]) -> int:
    named, rest = read_name("plan", arguments)
    from ctrl_jax.planning import plan

    return plan.main(named.name, named.experiment, list(rest))
