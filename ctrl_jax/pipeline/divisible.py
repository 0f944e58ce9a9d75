"""Whether an experiment's batches can be split over the devices, and how many devices a CPU is divided into."""

from ctrl_jax.config import Experiment
from ctrl_jax.errors import InputError

PROMPTS_A_CORE = 8
"""The fewest of a policy step that are worth a device of their own."""


def cpu_devices(experiment: Experiment, cores: int) -> int:
    """How many devices to make of a CPU's cores: for a model from scratch one a core, as far as batches divide.

    A model from a directory gets one device: its products are large enough for all cores, and bound by the reading of
    its weights, which several devices would each do.
    """
    if experiment.model.path is not None:
        return 1
    at_most = min(cores, experiment.policy.prompts_per_step // PROMPTS_A_CORE)
    return next((devices for devices in range(at_most, 1, -1) if _divide(experiment, devices)), 1)


def _divide(experiment: Experiment, devices: int) -> bool:
    try:
        check_batches_divide(experiment, devices)
    except InputError:
        return False
    return True


def check_batches_divide(experiment: Experiment, devices: int) -> None:
    """Refuses batches that cannot be split over the devices, or a device's share into its micro-batches.

    Raises:
      InputError: with the option, and the nearest sizes that can.
    """
    sft, reward, policy = experiment.sft, experiment.reward_model, experiment.policy
    trainings = experiment.trainings.items()
    batches = [
        (section, option, size, micro_batches or 1)
        for section, option, size, micro_batches, used in (
            ("sft", "batch_size", sft.batch_size, sft.micro_batches, sft.steps > 0),
            ("reward_model", "batch_size", reward.batch_size, reward.micro_batches, reward.trained),
            *((name, "prompts_per_step", one.prompts_per_step, one.micro_batches, True) for name, one in trainings),
        )
        if used
    ]
    uneven = [(f"{section}.{option}", size) for section, option, size, _ in batches if size % devices]
    if len(uneven) > 1:
        given = ", ".join(f"`{option}` is {size}" for option, size in uneven)
        mended = " ".join(f"`{option}={size + devices - size % devices}`" for option, size in uneven)
        raise InputError(
            f"{given}, which do not divide by the {devices} devices.",
            field=uneven[0][0],
            value=uneven[0][1],
            remedy=f"Give {mended}, or choose `devices`.",
        )
    for option, size in uneven:
        above = size + devices - size % devices
        nearest = f"{above - devices} or {above}" if above > devices else f"{above}"
        raise InputError(
            f"`{option}` is {size}, which does not divide by the {devices} devices.",
            field=option,
            value=size,
            remedy=f"Make it {nearest}, or choose `devices`.",
        )
    share, minibatches = policy.prompts_per_step // devices, getattr(policy, "minibatches", 1)
    if minibatches > 1 and share % (minibatches * (policy.micro_batches or 1)):
        raise InputError(
            f"Policy.minibatches is {minibatches} and Policy.micro_batches {policy.micro_batches or 1}, into which the "
            f"{share} prompts of a device ({policy.prompts_per_step} on {devices} devices) do not divide.",
            field="policy.minibatches",
            value=minibatches,
            remedy=f"Make `policy.prompts_per_step` a multiple of {devices * minibatches}.",
        )
    for section, option, size, micro_batches in batches:
        share = size // devices
        if share % micro_batches:
            fitting = [str(count) for count in range(1, share + 1) if share % count == 0]
            raise InputError(
                f"`{section}.micro_batches` is {micro_batches}, into which the {share} prompts of a device "
                f"(`{section}.{option}` {size} on {devices} devices) do not divide.",
                field=f"{section}.micro_batches",
                value=micro_batches,
                remedy=f"Make it one of {', '.join(fitting)}.",
            )
