"""What an experiment's stages do on one device: the work of each phase, and the memory of each program.

Everything follows from shapes. Parameters, gradients and moments are replicated, and batches are split over the devices
(the axis `data` of the mesh), as the steps do it.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

from ctrl_jax.config import Experiment, Lora, Supervised
from ctrl_jax.devices import accelerators
from ctrl_jax.errors import InputError
from ctrl_jax.models import costs
from ctrl_jax.models.costs import Batch, Work
from ctrl_jax.pipeline.divisible import check_batches_divide
from ctrl_jax.pipeline.rollouts import prompts_at_a_time
from ctrl_jax.planning import memory
from ctrl_jax.planning.memory import POLICY_MOMENTS, SUPERVISED_MOMENTS, Memory
from ctrl_jax.planning.sizes import Sizes, sizes
from ctrl_jax.steps import sampling


class Phase(NamedTuple):
    """A part of a step, on one device."""

    name: str
    parts: tuple[Work, ...]
    """Each is limited by one thing."""
    sent: float = 0.0
    """Bytes sent to other devices."""
    repeats: bool = False
    """Whether it computes again what was not kept, which is not counted in the model's FLOPs."""
    program: Literal["sample", "score", "update"] = "update"
    """The program of a policy step that it is a part of."""

    @property
    def work(self) -> Work:
        return sum(self.parts, Work())


class Stage(NamedTuple):
    name: str
    times: int
    """Steps, or batches of responses."""
    phases: tuple[Phase, ...]
    programs: dict[str, Memory]
    """What is held while each of its programs runs; sampling's in its two halves."""
    batch: tuple[str, str] | None = None
    """The part of the experiment and its field that set the batch's size; None where the memory sets it."""


def stages(experiment: Experiment, devices: int, *, device_memory: float | None = accelerators.SMALLEST) -> list[Stage]:
    """Everything that `train` does with networks, the policy's steps among it (`policy training`), for one device.

    Raises:
      InputError: if a batch does not divide by the devices.
    """
    if devices < 1:
        raise InputError(f"--devices is {devices}; ask for at least 1.")
    check_batches_divide(experiment, devices)
    found = sizes(experiment, device_memory)
    made = [_policy(experiment, found, devices)]
    if experiment.reward_model.trained:
        made.insert(0, _supervised("reward model", "reward_model", experiment, found, devices, pairs=True))
    if experiment.sft.steps:
        made.insert(0, _supervised("reference policy (sft)", "sft", experiment, found, devices, pairs=False))
    calibration, evaluation = experiment.calibration, experiment.evaluation
    made.insert(
        -1, _responses("calibration", experiment, found, calibration.prompts, calibration.samples_per_prompt, devices)
    )
    sizes_of_evaluation = (evaluation.prompts, evaluation.responses_per_prompt, devices)
    made.append(_responses("reference evaluation", experiment, found, *sizes_of_evaluation))
    made.append(_responses("policy evaluation", experiment, found, *sizes_of_evaluation, trained=True))
    if evaluation.along:
        samples = evaluation.along_responses or evaluation.responses_per_prompt
        point = _responses(
            "evaluation along the training", experiment, found, evaluation.prompts, samples, devices, trained=True
        )
        made.append(point._replace(times=evaluation.along * point.times))
    return made


def policy_training(made: list[Stage]) -> Stage:
    return next(stage for stage in made if stage.name == "policy training")


def peak(stage: Stage) -> float:
    """Bytes: the most that one of its programs holds."""
    return max(sum(held.values()) for held in stage.programs.values())


def model_flops(stage: Stage) -> float:
    """FLOPs of one step on one device, without what is computed twice to save memory."""
    return sum(phase.work.flops for phase in stage.phases if not phase.repeats)


def policy_batch(experiment: Experiment, devices: int) -> Batch:
    policy, data = experiment.policy, experiment.data
    prompts = policy.prompts_per_step // devices
    return Batch(prompts, policy.samples_per_prompt, data.prompt_length, data.response_length)


def _policy(experiment: Experiment, found: Sizes, devices: int) -> Stage:
    config, batch = experiment.policy, policy_batch(experiment, devices)
    drawing, caches = _sampling(found, batch)
    scoring, read = _scoring(found, batch)
    rematerialize = experiment.model.rematerialize
    update = _update(found, batch, rematerialize, devices)
    slices = memory.micro_batches(config.micro_batches, found, batch, rematerialize)
    activations = memory.update(found, batch, slices, rematerialize, length=batch.response_length - 1, networks=2)
    held = memory.held(found)
    needed = {**caches, "scoring": read, "update": activations}
    programs = {name: {**held, **own} for name, own in needed.items()}
    return Stage(
        "policy training", config.steps, (*drawing, *scoring, *update), programs, batch=("policy", "prompts_per_step")
    )


def _supervised(name: str, part: str, experiment: Experiment, found: Sizes, devices: int, *, pairs: bool) -> Stage:
    """Fine-tuning on demonstrations, or on pairs of responses: those have no logits."""
    config: Supervised = getattr(experiment, part)
    data, lora = experiment.data, found.lora
    prompts = config.batch_size // devices
    batch = Batch(prompts, 2 if pairs else 1, data.prompt_length, data.response_length)
    length = batch.response_length if pairs else batch.response_length - 1
    layers = costs.forward(found.policy, lora, batch, length=length)
    vocabulary = Work() if pairs else _log_probs(found, batch)[1]
    repeated = (*(() if pairs else (vocabulary,)), *((layers,) if experiment.model.rematerialize else ()))
    phases = (
        Phase("forward", (layers, vocabulary)),
        *((Phase("recomputation", repeated, repeats=True),) if repeated else ()),
        *_backward(found, batch, vocabulary, length, devices, SUPERVISED_MOMENTS),
    )
    # What the training starts from lives on beside what is trained.
    held = {what: size for what, size in memory.held(found).items() if what != "reward model"}
    held["trained, float32"] = held.pop("policy, float32")
    held["moments"] *= SUPERVISED_MOMENTS / POLICY_MOMENTS
    rematerialize = experiment.model.rematerialize
    slices = memory.micro_batches(config.micro_batches, found, batch, rematerialize)
    needed = memory.update(found, batch, slices, rematerialize, length=length, networks=0 if pairs else 1)
    return Stage(name, config.steps, phases, {"update": {**held, **needed}}, batch=(part, "batch_size"))


def _responses(
    name: str, experiment: Experiment, found: Sizes, prompts: int, samples: int, devices: int, *, trained: bool = False
) -> Stage:
    """Responses and their scores, in the batches of `rollouts.in_batches`; a policy's with their KL too."""
    data, policy = experiment.data, found.policy
    share = -(-prompts // devices)
    size = min(prompts_at_a_time(policy, data, samples), share)
    batch = Batch(size, samples, data.prompt_length, data.response_length)
    drawing, caches = _sampling(found, batch)
    scoring, read = _scoring(found, batch)
    held = memory.held(found)
    if not trained:
        held = {what: held[what] for what in ("reference", "reward model") if what in held}
    phases = (*drawing, *scoring)
    programs = {name: {**held, **own} for name, own in {**caches, "scoring": read}.items()}
    if trained:
        layers, vocabulary = _log_probs(found, batch)
        phases = (*phases, Phase("exact KL", (layers, vocabulary, layers, vocabulary)))
    return Stage(name, -(-share // size), phases, programs)


def _sampling(found: Sizes, batch: Batch) -> tuple[tuple[Phase, ...], dict[str, Memory]]:
    policy, lora = found.policy, found.lora
    phases = (
        Phase("sampling: prompts", (costs.prefill(policy, lora, batch),), program="sample"),
        Phase("sampling: responses", (costs.decode(policy, lora, batch),), program="sample"),
    )
    caches = costs.prompt_cache(policy, batch) + costs.response_cache(policy, batch)
    rows = sampling.rows_left(batch.prompts, batch.samples, batch.prompt_length, batch.response_length)
    tail = replace(batch, prompts=rows, samples=1)
    copied = costs.prompt_cache(policy, tail) + costs.response_cache(policy, tail)
    # Each sixteenth of the rows that goes on alone again adds its copies: 1 + 1/4 + 1/16 + ... of the first ones.
    decoding = {
        "caches": caches + 4 / 3 * copied,
        "logits": float(costs.logits(policy, batch.responses, copies=costs.DRAWN_COPIES)),
        **memory.cast(found),
    }
    reading = {
        "caches": float(costs.response_cache(policy, batch)),
        "activations": costs.working_set(policy, batch, length=0),
        **memory.cast(found),
    }
    return phases, {"prefill": reading, "decoding": decoding}


def _scoring(found: Sizes, batch: Batch) -> tuple[tuple[Phase, ...], Memory]:
    if found.reward is None:
        return (), {}
    length = batch.response_length
    work = costs.forward(found.reward, found.reward_lora, batch, length=length)
    return (Phase("reward scores", (work,), program="score"),), {
        "activations": costs.working_set(found.reward, batch, length=length)
    }


def _log_probs(found: Sizes, batch: Batch) -> tuple[Work, Work]:
    """(layers, vocabulary) of one network on the responses: their first token is predicted by the prompt."""
    tokens = batch.responses * batch.response_length
    chunks = -(-tokens // memory.chunk(found, tokens))
    layers = costs.forward(found.policy, found.lora, batch, length=batch.response_length - 1)
    return layers, costs.unembed(found.policy, tokens, chunks=chunks)


def _update(found: Sizes, batch: Batch, rematerialize: bool, devices: int) -> tuple[Phase, ...]:
    """Reference and policy on the responses, the gradient, and the optimiser."""
    policy, length = found.policy, batch.response_length - 1
    layers, vocabulary = _log_probs(found, batch)
    reference = (costs.forward(policy, Lora(), batch, length=length), vocabulary)
    return (
        Phase("reference log-probs", reference),
        Phase("policy log-probs", (layers, vocabulary)),
        # Both networks' logits are made again a chunk at a time.
        Phase("recomputation", (vocabulary, vocabulary, *((layers,) if rematerialize else ())), repeats=True),
        *_backward(found, batch, vocabulary, length, devices, POLICY_MOMENTS),
    )


def _backward(
    found: Sizes, batch: Batch, vocabulary: Work, length: int, devices: int, moments: int
) -> tuple[Phase, Phase]:
    lora = found.lora
    layers = costs.backward(found.policy, lora, batch, length=length)
    # A ring: every device sends each byte of the gradient twice, but for its own share.
    sent = 2 * (devices - 1) / devices * costs.FLOAT32 * found.trained
    return (
        Phase("backward", (layers, vocabulary * (1 if lora.rank else 2))),
        Phase("optimiser", (costs.optimizer(found.trained, moments=moments),), sent),
    )
