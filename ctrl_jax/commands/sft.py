"""The reference policy alone."""

from ctrl_jax.commands.options import Options, read


def main(arguments: list[str]) -> int:
    asked = read("sft", Options, arguments)
    from ctrl_jax.commands.launch import started
    from ctrl_jax.pipeline import sft

    with started(asked) as run:
        sft.run(run)
    return 0
