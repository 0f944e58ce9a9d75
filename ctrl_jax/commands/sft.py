"""The reference policy alone."""

from ctrl_jax.commands.options import Options, read


def main(arguments: list[str]) -> int:
    asked = read("sft", Options, arguments)
    from ctrl_jax.commands.launch import started
    from ctrl_jax.pipeline import sft
    from ctrl_jax.pipeline.run import prepare

    with started(asked) as workspace:
        sft.run(prepare(workspace))
    return 0
