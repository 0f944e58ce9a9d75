"""The calibration table alone, and the reference policy and the reward, which it is made of."""

from ctrl_jax.commands.options import Options, read


def main(arguments: list[str]) -> int:
    asked = read("calibrate", Options, arguments)
    from ctrl_jax.commands.launch import started
    from ctrl_jax.pipeline import calibrate, reward_model, sft
    from ctrl_jax.pipeline.run import prepare

    with started(asked) as workspace:
        run = prepare(workspace)
        reference = sft.run(run)
        reward = reward_model.run(run, reference).reward
        calibrate.run(run, reference, reward)
    return 0
