"""The reward model alone, and the reference policy, from which it starts."""

from ctrl_jax.commands.options import Options, read


def main(arguments: list[str]) -> int:
    asked = read("reward-model", Options, arguments)
    from ctrl_jax.commands.launch import started
    from ctrl_jax.pipeline import reward_model, sft
    from ctrl_jax.pipeline.run import prepare

    with started(asked) as workspace:
        run = prepare(workspace)
        reward_model.run(run, sft.run(run))
    return 0
