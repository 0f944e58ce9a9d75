"""What the stages of a run do on one device: the work of each phase, and the memory of each program.

Which stages a run makes is pipeline/stages.py's table; here are the sizes of their work. All follows from shapes.
Parameters, gradients and moments are replicated, and batches are split over the devices (the axis `data` of the mesh),
as the steps do it.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

from ctrl_jax.config import ActorCritic, Experiment, Lora, Stored, Supervised
from ctrl_jax.devices import accelerators
from ctrl_jax.errors import InputError
from ctrl_jax.models import costs
from ctrl_jax.models.architecture import Architecture
from ctrl_jax.models.costs import Batch, Work
from ctrl_jax.pipeline import assembly
from ctrl_jax.pipeline.divisible import check_batches_divide
from ctrl_jax.pipeline.rollouts import prompts_at_a_time
from ctrl_jax.pipeline.stages import made_by
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

    def times(self, count: int) -> "Phase":
        """The phase where a step goes through it so many times."""
        return self._replace(parts=tuple(part * count for part in self.parts), sent=count * self.sent)


class Stage(NamedTuple):
    name: str
    """As in pipeline/stages.py; `along` is the evaluation's part that measures the policy along its training."""
    times: int
    """Steps, or batches of responses."""
    phases: tuple[Phase, ...]
    programs: dict[str, Memory]
    """What is held while each of its programs runs; sampling's in its two halves."""
    batch: tuple[str, str] | None = None
    """The part of the experiment and its field that set the batch's size; None where the memory sets it."""


def stages(experiment: Experiment, devices: int, *, device_memory: float | None = accelerators.SMALLEST) -> list[Stage]:
    """Those stages of a run that compute with networks, in the order of the table, for one device; last, `along`.

    Raises:
      InputError: if a batch does not divide by the devices.
    """
    if devices < 1:
        raise InputError(f"`devices` is {devices}", field="devices", value=devices, remedy="ask for at least 1.")
    check_batches_divide(experiment, devices)
    found = sizes(experiment, device_memory)
    made = (_stage(name, experiment, found, devices) for name in made_by(experiment))
    return [*(stage for stage in made if stage is not None), *_along(experiment, found, devices)]


def _stage(name: str, experiment: Experiment, found: Sizes, devices: int) -> Stage | None:
    """A stage by its name in the table; None where it computes with no network."""
    match name:
        case "data":
            return None
        case "reward_model" if experiment.reward_model.linear:
            return _linear(experiment, found, devices)
        case "sft" | "reward_model":
            return _supervised(name, experiment, found, devices)
        case "calibration" | "reference_evaluation" | "evaluation" | "combine" | "combine_test":
            return _responses(name, experiment, found, devices)
        case "reference_judge":
            return _judge(experiment, found, devices) if found.judge else None
        case "start":
            assert experiment.start is not None, "the table asks for it"
            return _stored(name, experiment.start, experiment, found, devices)
        case "policy" if isinstance(experiment.policy, Stored):
            return _stored(name, experiment.policy, experiment, found, devices)
        case "policy":
            return _policy(experiment, found, devices)
    raise AssertionError(f"the stage {name} has no plan")


def policy_training(made: list[Stage]) -> Stage:
    return next(stage for stage in made if stage.name == "policy")


def peak(stage: Stage) -> float:
    """Bytes: the most that one of its programs holds."""
    return max(sum(held.values()) for held in stage.programs.values())


def model_flops(stage: Stage) -> float:
    """FLOPs of one step on one device, without what is computed twice to save memory."""
    return sum(phase.work.flops for phase in stage.phases if not phase.repeats)


def policy_batch(experiment: Experiment, devices: int) -> Batch:
    """A step's prompts with the responses that it learns from: the policy's own, a group of stored ones, or a pair."""
    policy, data = experiment.policy, experiment.data
    pairs = not (assembly.is_on_policy(policy) or assembly.learns_from_stored(policy))
    samples = 2 if pairs else policy.samples_per_prompt
    return Batch(policy.prompts_per_step // devices, samples, data.prompt_length, data.response_length)


def update_batch(experiment: Experiment, devices: int) -> Batch:
    """What one update of a step is made by: all of its batch, or a minibatch."""
    batch, (_, minibatches) = policy_batch(experiment, devices), assembly.updates(experiment.policy)
    return replace(batch, prompts=batch.prompts // minibatches)


def _policy(experiment: Experiment, found: Sizes, devices: int) -> Stage:
    """Sampling and scores once a step, where the algorithm samples, and all of the updates by them."""
    config, rematerialize = experiment.policy, experiment.model.rematerialize
    epochs, minibatches = assembly.updates(config)
    updates, part = epochs * minibatches, update_batch(experiment, devices)
    phases = tuple(phase.times(updates) for phase in _update(found, part, rematerialize, devices))
    slices = memory.micro_batches(config.micro_batches, found, part, rematerialize)
    programs = {
        "update": memory.update(found, part, slices, rematerialize, length=part.response_length - 1, networks=2)
    }
    if isinstance(config, ActorCritic):
        programs["update"]["critic"] = memory.critic(found, update_batch(experiment, devices))
    if updates > 1:
        programs["update"]["parameters and moments between updates"] = memory.trained(found)
    if assembly.is_on_policy(config):
        batch = policy_batch(experiment, devices)
        drawing, caches = _sampling(found, batch)
        scoring, read = _scoring(found.reward, found.reward_lora, batch, "reward scores")
        phases, programs = (*drawing, *scoring, *phases), {**caches, "scoring": read, **programs}
    held = memory.held(found)
    programs = {name: {**held, **own} for name, own in programs.items()}
    return Stage("policy", config.steps, phases, programs, batch=("policy", "prompts_per_step"))


def _stored(name: str, config: Stored, experiment: Experiment, found: Sizes, devices: int) -> Stage:
    """Updates by stored responses, which have their log-probs under the reference already."""
    data, rematerialize, prompts = experiment.data, experiment.model.rematerialize, config.prompts_per_step // devices
    batch = Batch(prompts, config.samples_per_prompt, data.prompt_length, data.response_length)
    length = batch.response_length - 1
    work = _log_probs(found, batch)
    phases = (
        Phase("policy log-probs", (*work.below, work.policy, work.vocabulary)),
        Phase("recomputation", (work.vocabulary, *((work.policy,) if rematerialize else ())), repeats=True),
        *_backward(found, batch, work.vocabulary, length, devices, POLICY_MOMENTS),
    )
    slices = memory.micro_batches(config.micro_batches, found, batch, rematerialize)
    needed = memory.update(found, batch, slices, rematerialize, length=length, networks=1)
    programs = {"update": {**memory.held(found), **needed}}
    return Stage(name, config.steps, phases, programs, batch=(name, "prompts_per_step"))


def _supervised(name: str, experiment: Experiment, found: Sizes, devices: int) -> Stage:
    """Fine-tuning on demonstrations, or on pairs of responses: those have no logits."""
    config: Supervised = getattr(experiment, name)
    pairs, data, lora = name == "reward_model", experiment.data, found.lora
    prompts = config.batch_size // devices
    batch = Batch(prompts, 2 if pairs else 1, data.prompt_length, data.response_length)
    length = batch.response_length if pairs else batch.response_length - 1
    layers = costs.forward(found.policy, lora, batch, length=length)
    above = costs.forward(costs.split(found.policy, lora)[1], lora, batch, length=length)
    vocabulary = Work() if pairs else _log_probs(found, batch).vocabulary
    repeated = (*(() if pairs else (vocabulary,)), *((above,) if experiment.model.rematerialize else ()))
    phases = (
        Phase("forward", (layers, vocabulary)),
        *((Phase("recomputation", repeated, repeats=True),) if repeated else ()),
        *_backward(found, batch, vocabulary, length, devices, SUPERVISED_MOMENTS),
    )
    # What the training starts from lives on beside what is trained.
    held = {what: size for what, size in memory.held(found).items() if what != "reward model"}
    held["trained, float32"] = held.pop("policy, float32")
    held["moments"] *= SUPERVISED_MOMENTS / POLICY_MOMENTS
    if pairs and experiment.reward_model.validation.every:
        held["best so far, float32"] = held["trained, float32"]
    rematerialize = experiment.model.rematerialize
    slices = memory.micro_batches(config.micro_batches, found, batch, rematerialize)
    needed = memory.update(found, batch, slices, rematerialize, length=length, networks=0 if pairs else 1)
    return Stage(name, config.steps, phases, {"update": {**held, **needed}}, batch=(name, "batch_size"))


def _linear(experiment: Experiment, found: Sizes, devices: int) -> Stage:
    """The reference's features of pairs, once; the fit to them is the host's."""
    config, data = experiment.reward_model, experiment.data
    batch = Batch(config.batch_size // devices, 2, data.prompt_length, data.response_length)
    reading, read = _scoring(found.policy, Lora(), batch, "features")
    held = {"reference": memory.held(found)["reference"]}
    programs = {"scoring": {**held, **read}}
    return Stage("reward_model", config.steps, reading, programs)


def _responses(name: str, experiment: Experiment, found: Sizes, devices: int) -> Stage:
    """Responses and their scores; a policy's with their KL and the judge's scores too, kept ones with log-probs."""
    calibration, evaluation = experiment.calibration, experiment.evaluation
    prompts, samples = {
        "calibration": (calibration.prompts, calibration.samples_per_prompt),
        "combine": (calibration.prompts, calibration.samples_per_prompt),
        "combine_test": (evaluation.prompts, calibration.samples_per_prompt),
    }.get(name, (evaluation.prompts, evaluation.responses_per_prompt))
    batch, times = _scored(experiment, found, devices, prompts, samples)
    drawing, caches = _sampling(found, batch)
    scoring, read = _scoring(found.reward, found.reward_lora, batch, "reward scores")
    phases, programs = (*drawing, *scoring), {**caches, "scoring": read}
    if name == "evaluation":
        judging, judged = _scoring(found.judge, Lora(), batch, "judge scores")
        work = _log_probs(found, batch)
        both = (work.policy, work.vocabulary, work.reference, work.vocabulary)
        phases = (*phases, *judging, Phase("exact KL", (*work.below, *both)))
        programs |= {"judging": judged} if judged else {}
    if name == "calibration" and calibration.keep_responses:
        work = _log_probs(found, batch)
        phases = (*phases, Phase("log-probs", (*work.below, work.reference, work.vocabulary)))
    held = memory.of_responses(found, trained=name not in ("calibration", "combine", "combine_test"))
    return Stage(name, times, phases, {program: {**held, **own} for program, own in programs.items()})


def _along(experiment: Experiment, found: Sizes, devices: int) -> list[Stage]:
    """The part of the evaluation that measures the policy along its training, where it is asked for."""
    config = experiment.evaluation
    if not config.along:
        return []
    count = config.along_responses or config.responses_per_prompt
    of_a_point = replace(experiment, evaluation=replace(config, responses_per_prompt=count, along_responses=None))
    one = _responses("evaluation", of_a_point, replace(found, judge=None), devices)
    return [one._replace(name="along", times=config.along * one.times)]


def _judge(experiment: Experiment, found: Sizes, devices: int) -> Stage:
    """A classifier's scores of the reference's responses."""
    evaluation = experiment.evaluation
    batch, times = _scored(experiment, found, devices, evaluation.prompts, evaluation.responses_per_prompt)
    phases, read = _scoring(found.judge, Lora(), batch, "judge scores")
    return Stage("reference_judge", times, phases, {"judging": {**memory.of_responses(found, trained=True), **read}})


def _scored(experiment: Experiment, found: Sizes, devices: int, prompts: int, samples: int) -> tuple[Batch, int]:
    """(a batch of `rollouts.in_batches`, their number)"""
    data, share = experiment.data, -(-prompts // devices)
    size = min(prompts_at_a_time(found.policy, data, samples), share)
    return Batch(size, samples, data.prompt_length, data.response_length), -(-share // size)


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


def _scoring(network: Architecture | None, lora: Lora, batch: Batch, name: str) -> tuple[tuple[Phase, ...], Memory]:
    """By a network; a function of the host is not counted."""
    if network is None:
        return (), {}
    length = batch.response_length
    work = costs.forward(network, lora, batch, length=length)
    return (Phase(name, (work,), program="score"),), {"activations": costs.working_set(network, batch, length=length)}


class _LogProbs(NamedTuple):
    """Policy and reference on responses."""

    below: tuple[Work, ...]
    """The layers below the first that is trained, which both read once; none where all are trained."""
    policy: Work
    """Its layers from there on."""
    reference: Work
    """The same, without the adapters."""
    vocabulary: Work
    """Of one of the two."""


def _log_probs(found: Sizes, batch: Batch) -> _LogProbs:
    """The first token is predicted by the prompt."""
    tokens, length = batch.responses * batch.response_length, batch.response_length - 1
    chunks = -(-tokens // memory.chunk(found, tokens))
    below, above = costs.split(found.policy, found.lora)
    return _LogProbs(
        (costs.forward(below, Lora(), batch, length=length),) if below.layers else (),
        costs.forward(above, found.lora, batch, length=length),
        costs.forward(above, Lora(), batch, length=length),
        costs.unembed(found.policy, tokens, chunks=chunks),
    )


def _update(found: Sizes, batch: Batch, rematerialize: bool, devices: int) -> tuple[Phase, ...]:
    """Reference and policy on the responses, the gradient, and the optimiser."""
    work = _log_probs(found, batch)
    vocabulary, length = work.vocabulary, batch.response_length - 1
    return (
        *(Phase("layers that are not trained", (layers,)) for layers in work.below),
        Phase("reference log-probs", (work.reference, vocabulary)),
        Phase("policy log-probs", (work.policy, vocabulary)),
        # Both networks' logits are made again a chunk at a time.
        Phase("recomputation", (vocabulary, vocabulary, *((work.policy,) if rematerialize else ())), repeats=True),
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
