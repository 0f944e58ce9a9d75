"""Configuration to models, optimisers and the jitted, device-mapped steps. The only place that jits and shards.

Each step below is per-device code, mapped with `jax.shard_map` inside `jax.jit`: what `jax.pmap` has become. Whatever
leads with B is split over the mesh's axes `data` and `fsdp`. Parameters lie as devices/partitioning.py says: a program
gathers what is split over `fsdp` before it is used, and the axis `model` is left to the compiler. Where both have one
device, sampling and scoring need no communication.

A loss is a (sum, weight), and so is its gradient: both are added up over a device's micro-batches, then over the
devices, and divided once. By itself shard_map would sum the gradient of replicated parameters over the devices for
every micro-batch anew; so a device differentiates by parameters that it takes for its own (`pcast`). The update by the
gradient is no per-device code: its norm is that of all parts.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ctrl_jax import config
from ctrl_jax.data.pipelines import batches
from ctrl_jax.devices import accelerators, partitioning
from ctrl_jax.devices.mesh import BATCH_AXES
from ctrl_jax.models import costs, decoder, lora, reward
from ctrl_jax.models.architecture import Architecture
from ctrl_jax.steps import calibration, kl, kl_budget, logprobs, policy_gradient, preference, sampling, win_rate
from ctrl_jax.steps.masked import Mean, length_mask, masked_mean
from ctrl_jax.theory.objective import Transformed
from ctrl_jax.types import (
    Examples,
    Params,
    Policy,
    PreferencePairs,
    Prompts,
    Responses,
    RewardApply,
    Rollouts,
)

Metrics = dict[str, jax.Array]

Step = Callable[..., tuple["TrainState", Metrics]]
"""A jitted update of a state, which it takes over (donation): use the one it returns."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes."""

    step: jax.Array
    """[] int32: updates made. Of a state that is halted, ~updates, which is negative (`guarded`)."""
    params: Params
    """What is trained, which `lora.overlay` lays over what is frozen: all of a network, or its adapter (and head)."""
    optimizer: optax.OptState
    budget: kl_budget.State | None = None
    """The KL controller of policy training."""


GUARDED = ("raw_reward", "kl", "loss", "gradient_norm")
"""Metrics that must be finite for a step's update to be made, where it has them, in the order of their computation."""


def last_sound(state: TrainState) -> TrainState:
    """A state that was halted, as it was after its last update."""
    return replace(state, step=jnp.maximum(state.step, ~state.step))


class Change(NamedTuple):
    """What a step changes its state by."""

    gradients: Params
    budget: kl_budget.State | None = None
    """The KL controller after the step."""


def guarded(mesh: Mesh, optimizer: optax.GradientTransformation, step: Callable[..., tuple[Change, Metrics]]) -> Step:
    """The compiled update by what `step` tells, which changes nothing where a metric that is guarded is not finite.

    It halts the state then: no later step changes it either, for the host, which reads metrics late, has dispatched
    more steps by the time it knows.

    The metric `first_rows` holds the first row of every parameter behind the step, one after the other: a training
    whose rows no longer change is still. (To compare all parameters with those before would have XLA copy them.)
    """

    def take(state: TrainState, change: Change) -> TrainState:
        updates, optimizer_state = optimizer.update(change.gradients, state.optimizer, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state, change.budget)

    def halt(state: TrainState, _: Change) -> TrainState:
        return replace(state, step=jnp.minimum(state.step, ~state.step))

    @functools.wraps(step)
    def update(state: TrainState, *arguments: Any) -> tuple[TrainState, Metrics]:
        change, metrics = step(state, *arguments)
        finite = jnp.stack([jnp.isfinite(metrics[name]) for name in GUARDED if name in metrics])
        # A branch, not a choice between two states: that would copy the state, which is donated.
        new = jax.lax.cond(finite.all() & (state.step >= 0), take, halt, state, change)
        # Where it was before, or the next step would be another program.
        new = jax.lax.with_sharding_constraint(new, partitioning.shardings(mesh, new))
        return new, metrics | {"first_rows": _first_rows(mesh, new.params)}

    return jax.jit(update, donate_argnums=0)


def first_rows(mesh: Mesh, params: Params) -> jax.Array:
    """The metric `first_rows` of parameters that no step has changed yet."""
    return jax.jit(functools.partial(_first_rows, mesh))(params)


def _first_rows(mesh: Mesh, params: Params) -> jax.Array:
    rows = [jnp.ravel(x[:1] if x.ndim > 1 else x) for x in jax.tree.leaves(params)]
    # Each gathered where it is split: joined first, parts of devices would change places.
    return jnp.concatenate(jax.lax.with_sharding_constraint(rows, jax.NamedSharding(mesh, P())))


Score = Callable[[Prompts, Responses], Any]
"""Raw rewards [B, N] of responses; a jitted reward model, or a function of the host."""


class Models(NamedTuple):
    architecture: Architecture
    lora: config.Lora
    decoder: decoder.Decoder
    reward_model: reward.RewardModel
    policy: Policy
    reward: RewardApply


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyBatch:
    prompts: Prompts
    reference_rewards: jax.Array
    """[B, K] raw rewards of reference responses, or [B, Q] quantiles of them; each row ascending."""


class Ranked(NamedTuple):
    """A step's rewards beside the reference's."""

    calibrated: jax.Array
    """[B, N]."""
    win_rate: jax.Array | None
    """[B] under the policy's procedure; None where there are too few rewards to tell it."""


@dataclass(frozen=True)
class PolicyStep:
    """A step of policy training, in three programs: the reward between them may be a function of the host.

    Where it is not, nothing here waits for the host.
    """

    sample: Callable[[Params, Prompts, jax.Array], Rollouts]
    score: Score
    update: Step
    key: Callable[[jax.Array], jax.Array]
    """The random key of a step."""

    def __call__(self, state: TrainState, reference: Params, batch: PolicyBatch) -> tuple[TrainState, Metrics]:
        rollouts = self.sample(lora.overlay(reference, state.params), batch.prompts, self.key(state.step))
        rewards = self.score(batch.prompts, rollouts.responses)
        return self.update(state, reference, rollouts, rewards, batch.reference_rewards)


def models(
    architecture: Architecture, adapters: config.Lora, *, rematerialize: bool = False, fused_attention: bool = False
) -> Models:
    """The networks of an architecture; `fused_attention` as `attention.has_kernel` finds it on their mesh."""
    language_model = decoder.Decoder(architecture, adapters, rematerialize, fused_attention)
    reward_model = reward.RewardModel(architecture, adapters, rematerialize, fused_attention)
    return Models(
        architecture,
        adapters,
        language_model,
        reward_model,
        decoder.policy(language_model),
        reward.reward_apply(reward_model),
    )


def draws() -> dict[str, Any]:
    """What tells whether the same keys still draw the same numbers: jax's settings, and some numbers that they draw.

    Versions of jax, numpy and grain are not part of it: most of them draw alike, and where one does not, these numbers
    differ. What rounding may change (a normal number's last digit) enters by its order alone.
    """
    return {**random_settings(), "drawn": _drawn(*random_settings().values())}


def random_settings() -> dict[str, Any]:
    """jax's settings that change what is drawn. Asks no device."""
    names = ("jax_default_prng_impl", "jax_threefry_partitionable", "jax_enable_x64")
    return {name: getattr(jax.config, name) for name in names}


@functools.cache
def _drawn(*settings: Any) -> list[Any]:
    """Numbers as the steps draw them, once for each of jax's `settings`."""
    key = jax.random.fold_in(jax.random.key(0), 1)
    return [
        np.asarray(jax.random.uniform(key, (2,)), np.float64).tolist(),
        np.asarray(jax.random.randint(key, (4,), 0, 1000)).tolist(),
        np.argsort(np.asarray(jax.random.normal(key, (8,)))).tolist(),
        next(batches(np.arange(8), batch_size=8, seed=0)).tolist(),
    ]


def stage_key(seed: int, stage: str) -> jax.Array:
    """The key of a stage; step, prompt and sample are folded into it in turn."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


def _example(prompt_length: int = 1, response_length: int = 2) -> tuple[Prompts, Responses]:
    prompts = Prompts(jnp.zeros((1, prompt_length), jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.uint32))
    return prompts, Responses(jnp.zeros((1, 1, response_length), jnp.int32), jnp.ones((1, 1), jnp.int32))


def init_decoder(parts: Models, mesh: Mesh, key: jax.Array) -> Params:
    """The variables of a decoder from scratch."""
    return _placed(mesh, functools.partial(_initial, parts), key)


def check_parameters_divide(parts: Models, mesh: Mesh) -> None:
    """Raises InputError if a parameter of the decoder cannot be split over the mesh; nothing is made."""
    partitioning.specs(mesh, jax.eval_shape(functools.partial(_initial, parts), jax.random.key(0)))


def _initial(parts: Models, key: jax.Array) -> Params:
    return {"params": parts.decoder.init(key, *_example())["params"]}


def _placed(mesh: Mesh, make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make` returns, a tree with parameters in it, each made where it belongs."""
    lies = partitioning.shardings(mesh, jax.eval_shape(make, *arguments))
    return jax.jit(make, out_shardings=lies)(*arguments)


def adapt_decoder(parts: Models, mesh: Mesh, key: jax.Array, params: Params) -> Params:
    """What is trained when a decoder starts as `params`: its adapter, or all of it."""
    if parts.lora.rank == 0:
        return params
    return {"lora": _init_adapters(parts, mesh, key, params["params"])}


def adapt_reward(parts: Models, mesh: Mesh, key: jax.Array, reference: Params) -> tuple[Params, Params]:
    """(what is frozen, what is trained) of a reward model whose trunk starts as the reference."""
    trunk = reference["params"]
    # Zeros: every response starts with the same reward, whatever the trunk.
    width = parts.architecture.width
    head = _placed(mesh, lambda: {"head": {"kernel": jnp.zeros((width, 1)), "bias": jnp.zeros(1)}})["head"]
    if parts.lora.rank == 0:
        return {}, {"params": {"trunk": trunk, "head": head}}
    adapters = _init_adapters(parts, mesh, key, trunk)
    return {"params": {"trunk": trunk}}, {"params": {"head": head}, "lora": {"trunk": adapters}}


def _init_adapters(parts: Models, mesh: Mesh, key: jax.Array, params: Params) -> Params:
    return _placed(mesh, lambda params, key: lora.init(params, parts.lora, key), params, key)


def merged(parts: Models, params: Params) -> Params:
    """A decoder's variables with its adapter, if it has one, in the weights."""
    if "lora" not in params:
        return params
    # Not one program: it would copy the weights that have no adapter.
    return {"params": lora.merge(params["params"], params["lora"], parts.lora)}


def supervised_optimizer(stage: config.Supervised) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, stage.learning_rate, stage.warmup_steps, stage.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))


def policy_optimizer(policy: config.Policy) -> optax.GradientTransformation:
    """Adam without its first moment (RMSProp with bias correction), so that the KL settles on its budget.

    Momentum is an inertia. It carries the policy past the KL at which reward and penalty balance, and back: with Adam's
    .9 the KL swings by 10 to 15 % for a whole run of 150 steps, even at a constant β, and no controller that sees it
    afterwards can damp that. Batches of hundreds of responses need no averaging over steps. What a step adds at random
    grows with the learning rate, which falls as the square of a cosine for that reason.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, policy.learning_rate, policy.warmup_steps, policy.steps, 0.1 * policy.learning_rate, exponent=2.0
    )
    # The same arithmetic as optax.adam(b1=0), without its copy of the gradient.
    rmsprop = optax.rmsprop(schedule, decay=0.99, eps_in_sqrt=False, bias_correction=True)
    return optax.chain(optax.clip_by_global_norm(policy.max_gradient_norm), rmsprop)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, budget: kl_budget.State | None = None
) -> TrainState:
    def start(params: Params) -> TrainState:
        # Copied, since the step donates its state and they may live on as the reference; and in float32, since in
        # bfloat16 a small update rounds to none.
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), budget)

    return _placed(mesh, start, params)


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """What a batch is split over. Axes of one device are left out: XLA fails on a sum over them beside `model`."""
    return tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)


def _mapped(mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Per-device code over the parts of a batch; the axis `model` is left to the compiler, where it has devices."""
    if not _batch_axes(mesh):
        return function
    axes = set(mesh.axis_names) if mesh.shape["model"] == 1 else set(BATCH_AXES)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes)


def _split(mesh: Mesh, params: Params) -> Any:
    """What a device is given of each parameter: its part along the mapped axes, of which `fsdp` is the only one."""
    return jax.tree.map(
        lambda spec: P(*("fsdp" if axis == "fsdp" else None for axis in spec)), partitioning.specs(mesh, params)
    )


def _whole(params: Params, split: Any) -> Params:
    """Per-device code: the parameters, each from all its parts. The gradient of this adds up and splits again."""

    def gather(part: jax.Array, spec: P) -> jax.Array:
        axes = tuple(spec)
        return jax.lax.all_gather(part, "fsdp", axis=axes.index("fsdp"), tiled=True) if "fsdp" in axes else part

    return jax.tree.map(gather, params, split)


def _reader(
    mesh: Mesh,
    function: Callable[..., Any],
    in_specs: tuple[Any, ...],
    out_specs: Any,
    *,
    num_params: int = 1,
    donate: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """The program of per-device code that only reads parameters, its first `num_params` arguments."""

    @functools.wraps(function)
    def program(*arguments: Any) -> Any:
        split = tuple(_split(mesh, params) for params in arguments[:num_params])

        def on_a_device(*arguments: Any) -> Any:
            return function(*map(_whole, arguments, split), *arguments[num_params:])

        return _mapped(mesh, on_a_device, (*split, *in_specs), out_specs)(*arguments)

    return jax.jit(program, donate_argnums=donate)


def default_micro_batches(sizes: Architecture, batch: costs.Batch, *, rematerialize: bool, memory: float | None) -> int:
    """Into how many slices a device's prompts are cut where the experiment does not say: as few as keep a slice's
    activations under a sixteenth of an accelerator's memory, in bytes, or under 64 MiB on a CPU (None).

    On CPU small slices are fast too: what the backward pass reads is near. Accelerators want large ones.
    """
    most = 2**26 if memory is None else memory / 16

    def fits(count: int) -> bool:
        part = replace(batch, prompts=batch.prompts // count)
        kept = costs.kept_activations(sizes, part, length=batch.response_length, rematerialize=rematerialize)
        return kept <= most

    counts = [count for count in range(1, batch.prompts + 1) if batch.prompts % count == 0]
    return next((count for count in counts if fits(count)), counts[-1])


def _micro_batches(parts: Models, mesh: Mesh, given: int | None, prompts: Prompts, responses: Responses) -> int:
    """Per-device code: how many there are of this device's prompts."""
    num_prompts, samples, length = responses.tokens.shape
    batch = costs.Batch(num_prompts, samples, prompts.tokens.shape[-1], length)
    rematerialize, memory = parts.decoder.rematerialize, accelerators.memory(mesh.devices.flat[0])
    return given or default_micro_batches(parts.architecture, batch, rematerialize=rematerialize, memory=memory)


def _values(mesh: Mesh, metrics: dict[str, Mean]) -> Metrics:
    """Global means from every device's (sum, weight)."""
    return {name: mean.across(_batch_axes(mesh)).value for name, mean in metrics.items()}


def _gradient(
    mesh: Mesh,
    trained: Params,
    loss: Callable[[Params, Any], tuple[Mean, Any]],
    batch: Any,
    micro_batches: int,
    *,
    split: Any,
) -> tuple[Mean, Params, Any]:
    """Per-device code: (loss, sum of its gradients, auxiliary) of a loss of (sum, weight) over all devices.

    The loss sees slices of the batch's prompts, one after the other, so that it holds the activations of one at a time.
    Its auxiliary results come back stacked, [micro-batches, ...].
    """
    axes = _batch_axes(mesh)

    def over_copies(function: Callable[..., Any], tree: Params) -> Params:
        """`function` of each array and of the axes along which devices hold the same part of its parameter."""

        def apply(x: jax.Array, spec: P) -> jax.Array:
            copies = tuple(axis for axis in axes if axis not in tuple(spec))
            return function(x, copies) if copies else x

        return jax.tree.map(apply, tree, split)

    own = over_copies(functools.partial(jax.lax.pcast, to="varying"), trained)

    def add_slice(total: tuple[Mean, Params], part: Any) -> tuple[tuple[Mean, Params], Any]:
        def loss_sum(params: Params) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            mean, auxiliary = loss(_whole(params, split), part)
            return mean.sum, (mean.weight, auxiliary)

        (sum_, (weight, auxiliary)), gradients = jax.value_and_grad(loss_sum, has_aux=True)(own)
        return jax.tree.map(jnp.add, total, (Mean(sum_, weight), gradients)), auxiliary

    start = Mean(jnp.zeros(()), jnp.zeros(())), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), trained)
    if axes:
        start = jax.lax.pcast(start, axes, to="varying")
    slices = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
    (mean, sums), auxiliary = jax.lax.scan(add_slice, start, slices)
    # Over the parts of a parameter, the gradient of `_whole` has added up already.
    return mean.across(axes), over_copies(jax.lax.psum, sums), auxiliary


def _averaged(loss: Mean, sums: Params) -> tuple[Params, Metrics]:
    """The gradient, whose sum goes with the loss's weight, and what is told of both."""
    gradients = jax.tree.map(lambda gradient: Mean(gradient, loss.weight).value, sums)
    # By parameter, in the order of jax.tree.leaves: to tell in which one a gradient went wrong.
    norms = jnp.stack([optax.tree.norm(gradient) for gradient in jax.tree.leaves(gradients)])
    return gradients, {"loss": loss.value, "gradient_norm": optax.tree.norm(gradients), "gradient_norms": norms}


def _supervised_step(
    parts: Models,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    loss: Callable[[Params, Examples], tuple[Mean, dict[str, Mean]]],
    micro_batches: int | None,
) -> Step:
    def step(state: TrainState, frozen: Params, batch: Examples) -> tuple[Change, Metrics]:
        split, split_frozen = _split(mesh, state.params), _split(mesh, frozen)

        def gradient(trained: Params, frozen: Params, batch: Examples) -> tuple[Mean, Params, Metrics]:
            frozen = _whole(frozen, split_frozen)
            mean, sums, means = _gradient(
                mesh,
                trained,
                lambda trained, part: loss(lora.overlay(frozen, trained), part),
                batch,
                _micro_batches(parts, mesh, micro_batches, batch.prompts, batch.responses),
                split=split,
            )
            return mean, sums, _values(mesh, jax.tree.map(lambda x: x.sum(axis=0), means))

        mapped = _mapped(mesh, gradient, (split, split_frozen, P(_batch_axes(mesh))), (P(), split, P()))
        mean, sums, values = mapped(state.params, frozen, batch)
        gradients, metrics = _averaged(mean, sums)
        return Change(gradients), metrics | values

    return guarded(mesh, optimizer, step)


def sft_step(
    parts: Models, mesh: Mesh, optimizer: optax.GradientTransformation, *, micro_batches: int | None = None
) -> Step:
    """(state, frozen, demonstrations) to (state, metrics): maximum likelihood of the response tokens."""

    def loss(params: Params, batch: Examples) -> tuple[Mean, dict[str, Mean]]:
        features = parts.policy.apply(params, batch.prompts, batch.responses)
        log_probs = logprobs.token_log_probs(
            parts.policy.unembed, params, features, batch.responses.tokens, chunk_size=_chunk_size(parts, mesh)
        )
        mask = length_mask(batch.responses.lengths, log_probs.shape[-1])
        return masked_mean(-log_probs, mask), {}

    return _supervised_step(parts, mesh, optimizer, loss, micro_batches)


def reward_model_step(
    parts: Models, mesh: Mesh, optimizer: optax.GradientTransformation, *, micro_batches: int | None = None
) -> Step:
    """(state, frozen, preference pairs) to (state, metrics): the Bradley-Terry likelihood."""

    def loss(params: Params, batch: PreferencePairs) -> tuple[Mean, dict[str, Mean]]:
        rewards = parts.reward(params, batch.prompts, batch.responses)
        chosen, rejected = rewards[:, 0], rewards[:, 1]
        return preference.bradley_terry(chosen, rejected), {"accuracy": preference.accuracy(chosen, rejected)}

    return _supervised_step(parts, mesh, optimizer, loss, micro_batches)


def sampler(
    parts: Models, mesh: Mesh, *, num_samples: int, max_length: int, eos_ids: tuple[int, ...], temperature: float
) -> Callable[[Params, Prompts, jax.Array], Rollouts]:
    """(params, prompts, key) to Rollouts."""

    def sample(params: Params, prompts: Prompts, key: jax.Array) -> Rollouts:
        return sampling.sample(
            parts.policy, _cast(parts, params), prompts, key,
            num_samples=num_samples, max_length=max_length, eos_ids=eos_ids, temperature=temperature,
        )  # fmt: skip

    batch = P(_batch_axes(mesh))
    return _reader(mesh, sample, (batch, P()), batch)


def _cast(parts: Models, params: Params) -> Params:
    """Parameters in the type that they are computed with, where layers cast them: once, and not for every token.

    Vectors stay as they are: norms are computed in float32.
    """
    dtype = parts.architecture.dtype
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)


def scorer(parts: Models, mesh: Mesh) -> RewardApply:
    """(reward params, prompts, responses) to raw rewards [B, N]."""
    batch = P(_batch_axes(mesh))
    return _reader(mesh, parts.reward, (batch, batch), batch)


def kl_of_responses(
    parts: Models, mesh: Mesh, *, temperature: float
) -> Callable[[Params, Params, Rollouts], jax.Array]:
    """(policy params, reference params, rollouts of the policy) to the exact KL of each response [B, N], nats."""

    def measure(params: Params, reference: Params, rollouts: Rollouts) -> jax.Array:
        comparison = compare(parts, mesh, params, reference, rollouts, temperature)
        return kl.per_sequence(comparison.kl, rollouts.responses.lengths)

    batch = P(_batch_axes(mesh))
    return _reader(mesh, measure, (batch,), batch, num_params=2)


def compare(
    parts: Models, mesh: Mesh, params: Params, reference: Params, rollouts: Rollouts, temperature: float
) -> logprobs.Comparison:
    """Policy and reference on the policy's rollouts; per-device code, to be traced in a step."""
    apply, unembed = parts.policy.apply, parts.policy.unembed
    features = apply(params, rollouts.prompts, rollouts.responses)
    reference_features = apply(reference, rollouts.prompts, rollouts.responses)
    return logprobs.compare(
        unembed, params, features, reference, reference_features, rollouts.responses.tokens,
        temperature=temperature, chunk_size=_chunk_size(parts, mesh),
    )  # fmt: skip


def _chunk_size(parts: Models, mesh: Mesh) -> int:
    return chunk_size(parts.architecture.vocabulary_size, accelerators.memory(mesh.devices.flat[0]))


def chunk_size(vocabulary_size: int, memory: float | None) -> int:
    """Tokens whose logits exist at a time, for any vocabulary: 32 MiB of float32 on a CPU (None), or a 64th of an
    accelerator's memory, in bytes; of these `compare` has four.

    The gradient of the output projection is read and written for every chunk.
    """
    most = 2**25 if memory is None else memory / 64
    return max(1, min(4096, int(most / 4 / vocabulary_size)))


def policy_step(
    parts: Models,
    mesh: Mesh,
    policy: config.Policy,
    transformed: Transformed,
    optimizer: optax.GradientTransformation,
    score: Score,
    *,
    key: jax.Array,
    max_length: int,
    eos_ids: tuple[int, ...],
) -> PolicyStep:
    """(state, reference, batch) to (state, metrics): sample, score, and one policy gradient."""
    sample = sampler(
        parts, mesh,
        num_samples=policy.samples_per_prompt, max_length=max_length, eos_ids=eos_ids, temperature=policy.temperature,
    )  # fmt: skip
    update = _policy_update(parts, mesh, policy, transformed, optimizer, eos_ids)
    at_step = jax.jit(functools.partial(jax.random.fold_in, key), out_shardings=jax.NamedSharding(mesh, P()))
    return PolicyStep(sample, score, update, at_step)


def _policy_update(
    parts: Models, mesh: Mesh, policy: config.Policy, transformed: Transformed,
    optimizer: optax.GradientTransformation, eos_ids: tuple[int, ...],
) -> Step:  # fmt: skip
    """(state, reference, rollouts, raw rewards [B, N], reference rewards [B, K]) to (state, metrics)."""
    procedure = policy.objective.procedure

    def rank(raw: jax.Array, reference_rewards: jax.Array) -> Ranked:
        calibrated = calibration.calibrate_sorted(raw, reference_rewards)
        # Unbiased of all K rewards. Of Q quantiles, which are no sample, it is an approximation, off by some n / Q for
        # best-of-n; the evaluation has samples of its own.
        if min(policy.samples_per_prompt, reference_rewards.shape[1]) < procedure.num_samples:
            return Ranked(calibrated, None)
        return Ranked(calibrated, win_rate.win_rate(raw, reference_rewards, procedure))

    def update(
        state: TrainState, reference: Params, rollouts: Rollouts, raw: jax.Array, reference_rewards: jax.Array
    ) -> tuple[Change, Metrics]:
        budget = state.budget
        assert budget is not None, "policy training starts from init_state with a KL controller: kl_budget.init"
        split, split_reference, batch = _split(mesh, state.params), _split(mesh, reference), P(_batch_axes(mesh))
        # Mapped over all axes: where one is left to the compiler, jax 0.10 cannot trace a binary search.
        ranked = jax.shard_map(rank, mesh=mesh, in_specs=(batch, batch), out_specs=batch)(raw, reference_rewards)

        def gradient(
            trained: Params, reference: Params, beta: jax.Array, rollouts: Rollouts, raw: jax.Array, ranked: Ranked
        ) -> tuple[Mean, Params, Metrics]:
            reference, responses = _whole(reference, split_reference), rollouts.responses
            rewards = transformed(raw, ranked.calibrated)

            def loss(trained: Params, part: tuple[Rollouts, jax.Array]) -> tuple[Mean, logprobs.Comparison]:
                rollouts, rewards = part
                comparison = compare(
                    parts, mesh, lora.overlay(reference, trained), reference, rollouts, policy.temperature
                )
                mean = policy_gradient.exact_kl_loss(
                    comparison.log_probs, comparison.kl, rewards, rollouts.responses.lengths, beta=beta
                )
                return mean, comparison

            mean, sums, comparison = _gradient(
                mesh, trained, loss, (rollouts, rewards),
                _micro_batches(parts, mesh, policy.micro_batches, rollouts.prompts, responses), split=split,
            )  # fmt: skip
            comparison = jax.tree.map(lambda x: x.reshape(responses.tokens.shape), comparison)
            return mean, sums, measure(rollouts, comparison, raw, ranked, rewards)

        mapped = _mapped(mesh, gradient, (split, split_reference, P(), batch, batch, batch), (P(), split, P()))
        mean, sums, values = mapped(state.params, reference, budget.beta, rollouts, raw, ranked)
        gradients, metrics = _averaged(mean, sums)
        change = Change(gradients, kl_budget.update(budget, values["kl"]))
        return change, metrics | values | {"beta": budget.beta}

    def measure(
        rollouts: Rollouts, comparison: logprobs.Comparison, raw: jax.Array, ranked: Ranked, rewards: jax.Array
    ) -> Metrics:
        responses = rollouts.responses

        def over_responses(values: jax.Array) -> Mean:
            return masked_mean(values, None)

        def sequence_kl(estimator: Callable[[jax.Array, jax.Array], jax.Array]) -> Mean:
            per_token = estimator(comparison.log_probs, comparison.reference_log_probs)
            return over_responses(kl.per_sequence(per_token, responses.lengths))

        mask = length_mask(responses.lengths, responses.tokens.shape[-1])
        last = jnp.take_along_axis(responses.tokens, responses.lengths[..., None] - 1, axis=-1)[..., 0]
        unfinished = ~jnp.isin(last, jnp.asarray(eos_ids))
        exact_kl = kl.per_sequence(comparison.kl, responses.lengths)
        means = {
            "kl": over_responses(exact_kl),
            "kl_k1": sequence_kl(kl.k1),
            "kl_k2": sequence_kl(kl.k2),
            "kl_k3": sequence_kl(kl.k3),
            "raw_reward": over_responses(raw),
            "constant_rewards": masked_mean((raw.max(axis=1) == raw.min(axis=1)).astype(jnp.float32), None),
            "calibrated_reward": over_responses(ranked.calibrated),
            "transformed_reward": over_responses(rewards),
            "response_length": over_responses(responses.lengths.astype(jnp.float32)),
            "unfinished": over_responses(unfinished.astype(jnp.float32)),
            "sampler_scorer_gap": masked_mean(jnp.abs(comparison.log_probs - rollouts.log_probs), mask),
        }
        if ranked.win_rate is not None:
            means["win_rate"] = over_responses(ranked.win_rate)
        standard_error = kl.estimate(exact_kl).across(_batch_axes(mesh)).standard_error
        return _values(mesh, means) | {"kl_standard_error": standard_error}

    return guarded(mesh, optimizer, update)


def streamer(
    parts: Models,
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

    batch: Any = P(_batch_axes(mesh))
    specs = sampling.State(batch, P(), batch, batch, batch, batch)  # type: ignore[arg-type]
    return _reader(mesh, start, (batch, P()), specs), _reader(mesh, advance, (specs,), specs, donate=(1,))
