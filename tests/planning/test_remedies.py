import shlex
from dataclasses import replace

import tyro

from ctrl_jax.commands import plan
from ctrl_jax.commands.flags import spelled
from ctrl_jax.config import PpoClip
from ctrl_jax.models import costs
from ctrl_jax.planning import phases, remedies, sizes


def applied(experiment, remedy):
    """The experiment and devices that a remedy's options ask for, as the command line reads them."""
    arguments = shlex.split(" ".join(spelled(f"`{field}={value}`") for field, value in remedy.options.items()))
    options = tyro.cli(plan.Options, default=plan.Options(experiment), args=arguments)
    return options.experiment, options.devices


def test_remedies_are_options_that_do_make_it_fit(large):
    stage = "policy"
    needed = phases.peak(phases.policy_training(phases.stages(large, 1)))
    capacity = 0.7 * needed
    found = remedies.remedies(large, 1, capacity, stage)
    assert {field for remedy in found for field in remedy.options} >= {"model.rematerialize", "policy.prompts_per_step"}
    for remedy in found:
        experiment, devices = applied(large, remedy)
        held = phases.peak(phases.policy_training(phases.stages(experiment, devices)))
        assert held == remedy.held <= capacity
    # The mildest: twice as many prompts would not fit.
    [batch] = [applied(large, remedy)[0] for remedy in found if "policy.prompts_per_step" in remedy.options]
    twice = replace(batch, policy=replace(batch.policy, prompts_per_step=2 * batch.policy.prompts_per_step))
    assert phases.peak(phases.policy_training(phases.stages(twice, 1))) > capacity


def test_where_no_change_helps_alone_they_are_put_together(large):
    # Its float32 reference, policy, moments and reward model alone are 4 × 4 bytes a parameter.
    capacity = 8.0 * costs.parameters(sizes.sizes(large).policy)
    [together] = remedies.remedies(large, 1, capacity, "policy")
    assert len(together.options) > 1
    experiment, devices = applied(large, together)
    assert phases.peak(phases.policy_training(phases.stages(experiment, devices))) == together.held <= capacity
    # The plan splits no parameters: less than their bfloat16 copy is never enough.
    assert remedies.remedies(large, 1, capacity / 8, "policy") == []


def test_smaller_batches_still_divide_into_minibatches(large):
    given = replace(large, policy=PpoClip(prompts_per_step=32, minibatches=8, micro_batches=1))
    needed = phases.peak(phases.policy_training(phases.stages(given, 1)))
    found = remedies.remedies(given, 1, 0.7 * needed, "policy")
    sizes = [
        remedy.options["policy.prompts_per_step"] for remedy in found if "policy.prompts_per_step" in remedy.options
    ]
    assert all(size % 8 == 0 for size in sizes)
    assert found
