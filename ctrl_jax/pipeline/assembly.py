"""Networks, algorithms and the pure steps, put together to compiled programs on a mesh."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ctrl_jax import config
from ctrl_jax.algorithms.bradley_terry import BradleyTerry
from ctrl_jax.algorithms.bradley_terry_ensemble import BradleyTerryEnsemble
from ctrl_jax.algorithms.constrained import Constrained
from ctrl_jax.algorithms.ctrl import Ctrl
from ctrl_jax.algorithms.protocol import Algorithm, Source
from ctrl_jax.algorithms.sft import Sft
from ctrl_jax.decoding import order, tree
from ctrl_jax.decoding.decoder import Decoded
from ctrl_jax.decoding.tree import Tree
from ctrl_jax.devices import accelerators
from ctrl_jax.devices.programs import Metrics, Step, TrainState, batch_spec, folder, reader, training_step
from ctrl_jax.errors import InputError
from ctrl_jax.models import costs, lora, networks
from ctrl_jax.models.networks import Networks
from ctrl_jax.steps import kl, logprobs, probe, sampling
from ctrl_jax.theory.procedures import Procedure
from ctrl_jax.types import Experience, Params, PolicyBatch, Prompts, Responses, Rollouts, Score


@dataclass(frozen=True)
class PolicyStep:
    """A step of an algorithm that learns from the policy's own responses, in three programs: the reward between them
    may be a function of the host, as those that are constrained are. Where none is, nothing here waits for the host.
    """

    sample: Callable[[Params, Prompts, jax.Array], Rollouts]
    score: Score
    update: Step
    """(state, reference, Experience) to (state, metrics)."""
    key: Callable[[jax.Array], jax.Array]
    """The random key of a step."""
    rank: Score | None = None
    """Ranks [B, N, M] by the rewards that are constrained, where there are any."""

    def __call__(self, state: TrainState, reference: Params, batch: PolicyBatch) -> tuple[TrainState, Metrics]:
        rollouts = self.sample(lora.overlay(reference, state.params), batch.prompts, self.key(state.step))
        return self.update(state, reference, self.experience(batch, rollouts))

    def experience(self, batch: PolicyBatch, rollouts: Rollouts) -> Experience:
        """Scores the responses."""
        given = batch.prompts, rollouts.responses
        return Experience(
            rollouts, self.score(*given), batch.reference_rewards, None if self.rank is None else self.rank(*given)
        )


def update(
    parts: Networks,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    *,
    micro_batches: int | None = None,
) -> Step:
    """The program (state, frozen parameters, batch) to (state, metrics) of any algorithm.

    `micro_batches` are the slices of a device's part of a batch whose activations exist at a time; None chooses.
    """

    def count(batch: Any) -> int:
        read = batch.rollouts if isinstance(batch, Experience) else batch
        num_prompts, samples, length = read.responses.tokens.shape
        shapes = costs.Batch(num_prompts, samples, read.prompts.tokens.shape[-1], length)
        memory = accelerators.memory(mesh.devices.flat[0])
        _, above = costs.split(parts.architecture, parts.lora)
        return micro_batches or costs.default_micro_batches(
            above, shapes, rematerialize=parts.decoder.rematerialize, memory=memory
        )

    return training_step(mesh, optimizer, algorithm, micro_batches=count)


def sft_step(
    parts: Networks, mesh: Mesh, optimizer: optax.GradientTransformation, *, micro_batches: int | None = None
) -> Step:
    """(state, frozen, demonstrations) to (state, metrics)."""
    return update(parts, mesh, optimizer, Sft(parts.policy, chunk_size(parts, mesh)), micro_batches=micro_batches)


def reward_model_step(
    parts: Networks, mesh: Mesh, optimizer: optax.GradientTransformation, *, micro_batches: int | None = None
) -> Step:
    """(state, frozen, preference pairs) to (state, metrics)."""
    return update(parts, mesh, optimizer, BradleyTerry(parts.reward), micro_batches=micro_batches)


def reward_ensemble_step(
    parts: Networks,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    micro_batches: int | None = None,
) -> Step:
    """(state, frozen, preference pairs) to (state, metrics) of a reward model with several heads."""
    algorithm = BradleyTerryEnsemble(parts.reward, parts.members, seed)
    return update(parts, mesh, optimizer, algorithm, micro_batches=micro_batches)


def algorithm_class(policy: config.Policy) -> type[Algorithm]:
    """The algorithm that an experiment chooses by the type of its options."""
    module, name = policy.algorithm.split(":")
    found: type[Algorithm] = getattr(importlib.import_module(f"ctrl_jax.algorithms.{module}"), name)
    return found


def is_on_policy(policy: config.Policy) -> bool:
    """Whether the algorithm learns from the policy's own responses, whose rewards are calibrated."""
    return algorithm_class(policy).source is Source.POLICY


def learns_from_stored(policy: config.Policy) -> bool:
    """Whether the algorithm learns from the reference's stored responses, whose rewards are calibrated too."""
    return algorithm_class(policy).source is Source.REFERENCE


def is_calibrated(experiment: config.Experiment) -> bool:
    """Whether the policy's training or its start learns from calibrated rewards."""
    policy = experiment.policy
    return is_on_policy(policy) or learns_from_stored(policy) or experiment.start is not None


def updates(policy: config.Policy) -> tuple[int, int]:
    """(epochs, minibatches): how often a step of the training learns from its batch, and in how many parts."""
    made = algorithm_class(policy)
    return getattr(policy, "epochs", made.epochs), getattr(policy, "minibatches", made.minibatches)


def check_it_samples(policy: config.Policy, command: str) -> None:
    """Raises InputError for an algorithm that samples nothing, whose steps the command does not know."""
    if not is_on_policy(policy):
        raise InputError(
            f"`{command}` takes the steps of a training apart into sampling, scoring and an update by them, but "
            f"{policy.algorithm.rpartition(':')[2]} samples nothing; give an experiment that trains on the policy's "
            "own responses."
        )


def algorithm(
    parts: Networks,
    mesh: Mesh,
    policy: config.Policy,
    *,
    beta: float | None,
    num_references: int,
    eos_ids: tuple[int, ...],
    goes_on: bool = False,
) -> Algorithm:
    """The algorithm of an experiment, under its constraints where there are any. Each of its fields gets the value that
    is offered here under its name, or else that of the option.

    Args:
      parts: the networks.
      mesh: devices.
      policy: options, whose type chooses the algorithm.
      beta: the weight of the KL to start with.
      num_references: K reference rewards a prompt, where rewards are calibrated.
      eos_ids: tokens that end a response.
      goes_on: whether the training begins where a start ended.
    """
    objective = policy.objective
    offered = {
        "policy": parts.policy,
        "transformed": objective.transformed(num_references),
        "procedure": objective.procedure,
        "beta": beta,
        "hold_beta": policy.beta is not None,
        "goes_on": goes_on,
        "eos_ids": eos_ids,
        "chunk_size": chunk_size(parts, mesh),
        "width": parts.architecture.width,
    }
    kind = algorithm_class(policy)
    names = [field.name for field in dataclasses.fields(cast(Any, kind))]
    made = kind(**{name: offered[name] if name in offered else getattr(policy, name) for name in names})
    return Constrained(cast(Ctrl, made), policy.floors) if policy.floors else made


def policy_step(
    parts: Networks,
    mesh: Mesh,
    policy: config.Policy,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    score: Score,
    *,
    key: jax.Array,
    max_length: int,
    eos_ids: tuple[int, ...],
    rank: Score | None = None,
) -> PolicyStep:
    """(state, reference, batch) to (state, metrics): sample, score, and update; `rank` as in PolicyStep."""
    sample = sampler(
        parts,
        mesh,
        num_samples=policy.samples_per_prompt,
        max_length=max_length,
        eos_ids=eos_ids,
        temperature=policy.temperature,
    )
    step = update(parts, mesh, optimizer, algorithm, micro_batches=policy.micro_batches)
    return PolicyStep(sample, score, step, folder(mesh, key), rank)


def sampler(
    parts: Networks, mesh: Mesh, *, num_samples: int, max_length: int, eos_ids: tuple[int, ...], temperature: float
) -> Callable[[Params, Prompts, jax.Array], Rollouts]:
    """(params, prompts, key) to Rollouts."""

    def sample(params: Params, prompts: Prompts, key: jax.Array) -> Rollouts:
        return sampling.sample(
            parts.policy, networks.cast(parts, params), prompts, key,
            num_samples=num_samples, max_length=max_length, eos_ids=eos_ids, temperature=temperature,
        )  # fmt: skip

    return reader(mesh, sample, (batch_spec(mesh), P()), batch_spec(mesh))


def decoder(
    parts: Networks,
    mesh: Mesh,
    by: Procedure | Tree,
    *,
    max_length: int,
    eos_ids: tuple[int, ...],
    temperature: float,
) -> Callable[[Params, Prompts, jax.Array, Score], Decoded]:
    """(params, prompts, key, score) to one response a prompt, as the decoders of `decoding` make it.

    Its parts are programs of their own, as `score` may be a function of the host.
    """
    batch = batch_spec(mesh)
    given: dict[str, Any] = {"max_length": max_length, "eos_ids": eos_ids, "temperature": temperature}
    if isinstance(by, Tree):
        by.check_length(max_length)
        plain = tree.programs(by, parts.policy, **given)
        grown: Any = tree.Growth(_state_spec(batch), batch)

        def cast(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda params, *others: function(networks.cast(parts, params), *others)

        made = tree.Programs(
            reader(mesh, cast(plain.start), (batch, P()), grown),
            reader(mesh, cast(plain.grow), (grown, P()), grown, donate=(1,)),
            reader(mesh, plain.keep, (grown, batch), grown, num_params=0, donate=(0,)),
            reader(mesh, plain.best, (grown, batch), batch, num_params=0),
        )
        return lambda params, prompts, key, score: tree.search(
            by, made, params, score, prompts, key, max_length=max_length
        )
    sample = sampler(parts, mesh, num_samples=by.num_samples, **given)

    pick = reader(mesh, functools.partial(order.pick, by), (batch, batch, batch, P()), batch, num_params=0)
    return lambda params, prompts, key, score: order.run(by, sample, pick, params, score, prompts, key)


def _state_spec(batch: Any) -> Any:
    return sampling.State(batch, P(), batch, batch, batch, batch)  # type: ignore[arg-type]


def streamer(
    parts: Networks,
    mesh: Mesh,
    *,
    num_samples: int,
    max_length: int,
    eos_ids: tuple[int, ...],
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Callable[[Params, Prompts, jax.Array], sampling.State], Callable[[Params, sampling.State], sampling.State]]:
    """The sampler token by token: (params, prompts, key) to a state, and (params, state) to the next.

    The second takes over the state that it is given (donation): use the one it returns.
    """
    law: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    def start(params: Params, prompts: Prompts, key: jax.Array) -> sampling.State:
        return sampling.start(
            parts.policy, params, prompts, key,
            num_samples=num_samples, max_length=max_length, eos_ids=eos_ids, **law,
        )  # fmt: skip

    def advance(params: Params, state: sampling.State) -> sampling.State:
        return sampling.advance(parts.policy, params, state, eos_ids=eos_ids, **law)

    batch = batch_spec(mesh)
    specs = _state_spec(batch)
    return reader(mesh, start, (batch, P()), specs), reader(mesh, advance, (specs,), specs, donate=(1,))


def pooled_features(parts: Networks, mesh: Mesh) -> Callable[[Params, Prompts, Responses], jax.Array]:
    """(params, prompts, responses [B, N]) to the mean features of each response [B, N, D] (probe.py)."""

    def pooled(params: Params, prompts: Prompts, responses: Responses) -> jax.Array:
        return probe.pooled_features(parts.policy, params, prompts, responses)

    batch = batch_spec(mesh)
    return reader(mesh, pooled, (batch, batch), batch)


def reward_features(parts: Networks, mesh: Mesh) -> Callable[[Params, Prompts, Responses], jax.Array]:
    """(a decoder's params, prompts, responses [B, N]) to what the reward model's head reads, [B, N, D] float32."""
    batch = batch_spec(mesh)
    return reader(mesh, parts.features, (batch, batch), batch)


def log_probs(parts: Networks, mesh: Mesh, *, temperature: float) -> Callable[[Params, Prompts, Responses], jax.Array]:
    """(params, prompts, responses) to log-probs of whole responses [B, N], nats, by the law that training scores."""
    chunks = chunk_size(parts, mesh)

    def measure(params: Params, prompts: Prompts, responses: Responses) -> jax.Array:
        return logprobs.of_responses(
            parts.policy, params, prompts, responses, temperature=temperature, chunk_size=chunks
        )

    batch = batch_spec(mesh)
    return reader(mesh, measure, (batch, batch), batch)


def kl_of_responses(
    parts: Networks, mesh: Mesh, *, temperature: float
) -> Callable[[Params, Params, Rollouts], jax.Array]:
    """(policy params, reference params, rollouts of the policy) to the exact KL of each response [B, N], nats."""
    chunks = chunk_size(parts, mesh)

    def measure(params: Params, reference: Params, rollouts: Rollouts) -> jax.Array:
        prompts, responses = rollouts.prompts, rollouts.responses
        comparison = logprobs.compare_policies(
            parts.policy, params, reference, prompts, responses, temperature=temperature, chunk_size=chunks
        )
        return kl.per_sequence(comparison.kl, responses.lengths)

    batch = batch_spec(mesh)
    return reader(mesh, measure, (batch,), batch, num_params=2)


def chunk_size(parts: Networks, mesh: Mesh) -> int:
    """Tokens whose logits exist at a time on a device of the mesh."""
    return costs.chunk_size(parts.architecture.vocabulary_size, accelerators.memory(mesh.devices.flat[0]))
