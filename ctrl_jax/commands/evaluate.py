"""Win rates and KL of the policy, measured again; stages that are missing run first."""

from ctrl_jax.commands.options import Options, read


def main(arguments: list[str]) -> int:
    asked = read("evaluate", Options, arguments)
    from ctrl_jax.commands import summary
    from ctrl_jax.commands.launch import started
    from ctrl_jax.pipeline import align, evaluate
    from ctrl_jax.pipeline.run import prepare

    with started(asked) as workspace, workspace.claimed():
        run = prepare(workspace)
        evaluate.independent_judge(run)  # refused before anything is trained
        summary.print_run(run, evaluate.run(run, align.policy(run)), None)
    return 0
