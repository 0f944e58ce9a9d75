"""The step again at which a training stopped as not finite, with the first quantity that went wrong."""

from ctrl_jax.commands.options import Options, read


def main(arguments: list[str]) -> int:
    asked = read("replay", Options, arguments)
    from ctrl_jax.commands.launch import started
    from ctrl_jax.pipeline import replay
    from ctrl_jax.pipeline.run import prepare

    with started(asked) as workspace, workspace.claimed():
        replay.run(prepare(workspace))
    return 0
