"""Compiled programs on a mesh. This room alone jits and shards, and it knows no algorithm: that is an argument.

A pure function is per-device code, mapped with `jax.shard_map` inside `jax.jit`: what `jax.pmap` has become. Whatever
leads with B is split over the mesh's axes `data` and `fsdp`. Parameters are split as partitioning.py says: a program
gathers what is split over `fsdp` before it is used, and the axis `model` is left to the compiler. Where `fsdp` and
`model` have one device each, programs that only read parameters need no communication.

A loss is a (sum, weight), and so is its gradient: both are added up over a device's micro-batches, then over the
devices, and divided once. By itself shard_map would sum the gradient of replicated parameters over the devices for
every micro-batch anew; so a device differentiates by parameters that it takes for its own (`pcast`). The update by the
gradient is no per-device code: its norm is that of all parts.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ctrl_jax.devices import partitioning
from ctrl_jax.devices.mesh import BATCH_AXES, shard
from ctrl_jax.models import lora
from ctrl_jax.steps.masked import Mean
from ctrl_jax.types import Params

Metrics = dict[str, jax.Array]

Step = Callable[..., tuple["TrainState", Metrics]]
"""A compiled step of a state, which it takes over (donation): use the one it returns."""


@dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes."""

    step: jax.Array
    """[] int32: steps made. Once the state is halted (`guarded`), their bitwise inverse, which is negative."""
    params: Params
    """What is trained, which `lora.overlay` lays over what is frozen: all of a network, or its adapter (and head)."""
    optimizer: optax.OptState
    extra: Any = None
    """What the algorithm carries from step to step besides, such as a KL controller."""

    def last_sound(self) -> "TrainState":
        """The state as it was after its last step, if it is halted."""
        return replace(self, step=jnp.maximum(self.step, ~self.step))


# Checkpoints know the extra state by the name of the first that there was.
_KEYS = tuple(jax.tree_util.GetAttrKey(name) for name in ("step", "params", "optimizer", "budget"))
jax.tree_util.register_pytree_with_keys(
    TrainState,
    lambda state: (tuple(zip(_KEYS, (state.step, state.params, state.optimizer, state.extra), strict=True)), None),
    lambda _, children: TrainState(*children),
    lambda state: ((state.step, state.params, state.optimizer, state.extra), None),
)


class Change(NamedTuple):
    """What a step changes its state by."""

    gradients: Params
    extra: Any = None
    """The extra state after the step."""
    share: jax.Array | float = 1.0
    """Of the optimiser's update, how much is made."""


class Trained(NamedTuple):
    """What several updates have made of a state."""

    params: Params
    optimizer: optax.OptState
    extra: Any = None


class Algorithm(Protocol):
    """What a training step asks of an algorithm; algorithms/protocol.py says what each of these is."""

    @property
    def epochs(self) -> int: ...

    @property
    def minibatches(self) -> int: ...

    @property
    def guarded(self) -> Sequence[str]: ...

    @property
    def internal(self) -> Sequence[str]: ...

    def targets(self, batch: Any) -> Any: ...

    def loss(self, params: Params, frozen: Params, batch: Any, targets: Any, extra: Any) -> tuple[Mean, Any]: ...

    def measure(self, batch: Any, targets: Any, auxiliary: Any) -> dict[str, Any]: ...

    def after(self, extra: Any, metrics: Metrics) -> tuple[Any, Metrics]: ...

    def share(self, extra: Any) -> jax.Array | float: ...


def placed(mesh: Mesh, make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make` returns, a tree with parameters in it, each made where it belongs."""
    shardings = partitioning.shardings(mesh, jax.eval_shape(make, *arguments))
    return jax.jit(make, out_shardings=shardings)(*arguments)


def init_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, extra: Any = None) -> TrainState:
    """The state of a training before its first step."""

    def start(params: Params) -> TrainState:
        # Copied, since the step donates its state and they may live on as the reference; and in float32, since in
        # bfloat16 a small update rounds to none.
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), extra)

    return placed(mesh, start, params)


def folder(mesh: Mesh, key: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The program that folds a number on the devices into a random key."""
    return jax.jit(functools.partial(jax.random.fold_in, key), out_shardings=jax.NamedSharding(mesh, P()))


@dataclass(frozen=True)
class Devices:
    """The devices of a mesh as a training's loop uses them (runtime/loop.py)."""

    mesh: Mesh

    def place(self, batch: Any) -> Any:
        """A batch, split over them."""
        return shard(self.mesh, batch)

    def first_rows(self, params: Params) -> jax.Array:
        """The metric `first_rows` of parameters that no step has changed yet."""
        return jax.jit(functools.partial(_first_rows, self.mesh))(params)


def _first_rows(mesh: Mesh, params: Params) -> jax.Array:
    rows = [jnp.ravel(x[:1] if x.ndim > 1 else x) for x in jax.tree.leaves(params)]
    # Each gathered where it is split: joined first, parts of devices would change places.
    return jnp.concatenate(jax.lax.with_sharding_constraint(rows, jax.NamedSharding(mesh, P())))


def guarded(
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    step: Callable[..., tuple[Change | Trained, Metrics]],
    names: Sequence[str],
) -> Step:
    """Jits `step` and makes its change, unless a metric of `names` is not finite: then the state stays as it is.

    The state is halted then: no later step changes it either, for the host reads metrics late, and has dispatched more
    steps by the time it knows.

    The metric `first_rows` holds the first row of every parameter behind the step, one after the other: a training
    whose rows no longer change is still. (To compare all parameters with those before would have XLA copy them.)
    """

    def take(state: TrainState, change: Change | Trained) -> TrainState:
        match change:
            case Change():
                params, optimizer_state = _updated(
                    optimizer, change.gradients, state.params, state.optimizer, share=change.share
                )
            case Trained():
                params, optimizer_state = change.params, change.optimizer
        return TrainState(state.step + 1, params, optimizer_state, change.extra)

    def halt(state: TrainState, _: Change | Trained) -> TrainState:
        return replace(state, step=jnp.minimum(state.step, ~state.step))

    @functools.wraps(step)
    def update(state: TrainState, *arguments: Any) -> tuple[TrainState, Metrics]:
        change, metrics = step(state, *arguments)
        finite = jnp.stack([jnp.isfinite(metrics[name]) for name in names if name in metrics])
        # A branch, not a choice between two states: that would copy the state, which is donated.
        new = jax.lax.cond(finite.all() & (state.step >= 0), take, halt, state, change)
        # Where it was before, or the next step would be another program.
        new = jax.lax.with_sharding_constraint(new, partitioning.shardings(mesh, new))
        return new, metrics | {"first_rows": _first_rows(mesh, new.params)}

    return jax.jit(update, donate_argnums=0)


def _updated(
    optimizer: optax.GradientTransformation,
    gradients: Params,
    params: Params,
    state: optax.OptState,
    *,
    share: jax.Array | float,
) -> tuple[Params, optax.OptState]:
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, optax.tree.scale(share, updates)), state


def training_step(
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    *,
    micro_batches: Callable[[Any], int],
) -> Step:
    """The guarded program (state, frozen parameters, batch) to (state, metrics) of an algorithm's updates by a batch.

    Args:
      mesh: devices.
      optimizer: makes an update of a gradient.
      algorithm: what is learned.
      micro_batches: of a device's part of a batch, into how many slices it is cut for the gradient.
    """

    def update(state: TrainState, frozen: Params, batch: Any) -> tuple[Change | Trained, Metrics]:
        split, split_frozen, part = _split(mesh, state.params), _split(mesh, frozen), batch_spec(mesh)
        # Mapped over all axes: where one is left to the compiler, jax 0.10 cannot trace a binary search.
        targets = jax.shard_map(algorithm.targets, mesh=mesh, in_specs=(part,), out_specs=part)(batch)

        def gradient(
            trained: Params, frozen: Params, extra: Any, batch: Any, targets: Any
        ) -> tuple[Mean, Params, Metrics]:
            frozen = _whole(frozen, split_frozen)

            def loss(trained: Params, slices: tuple[Any, Any]) -> tuple[Mean, Any]:
                return algorithm.loss(lora.overlay(frozen, trained), frozen, *slices, extra)

            mean, sums, auxiliary = _gradient(mesh, trained, loss, (batch, targets), micro_batches(batch), split=split)
            measured = algorithm.measure(batch, targets, auxiliary)
            return mean, sums, {name: found.across(_batch_axes(mesh)).value for name, found in measured.items()}

        def reported(metrics: Metrics) -> Metrics:
            return {name: value for name, value in metrics.items() if name not in algorithm.internal}

        mapped = _mapped(mesh, gradient, (split, split_frozen, P(), part, part), (P(), split, P()))

        def differentiate(params: Params, batch: Any, targets: Any) -> tuple[Params, Metrics]:
            mean, sums, values = mapped(params, frozen, state.extra, batch, targets)
            gradients, metrics = _averaged(mean, sums)
            return gradients, metrics | values

        if algorithm.epochs * algorithm.minibatches == 1:
            gradients, metrics = differentiate(state.params, batch, targets)
            extra, more = algorithm.after(state.extra, metrics)
            return Change(gradients, extra, algorithm.share(extra)), reported(metrics | more)
        params, optimizer_state, metrics = _several(mesh, optimizer, algorithm, differentiate, state, (batch, targets))
        extra, more = algorithm.after(state.extra, metrics)
        return Trained(params, optimizer_state, extra), reported(metrics | more)

    return guarded(mesh, optimizer, update, algorithm.guarded)


def _several(
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    differentiate: Callable[..., tuple[Params, Metrics]],
    state: TrainState,
    batch: Any,
) -> tuple[Params, optax.OptState, Metrics]:
    """(parameters, optimiser's state, metrics) behind all updates by a batch, each by every M-th of its prompts.

    Every M-th, since that is the same choice for any number of devices. Metrics are means over the updates.
    """
    count = algorithm.minibatches
    minibatches = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    share = algorithm.share(state.extra)

    def one(carry: tuple[Params, optax.OptState], index: jax.Array) -> tuple[tuple[Params, optax.OptState], Metrics]:
        params, optimizer_state = carry
        gradients, metrics = differentiate(params, *jax.tree.map(lambda x: x[index], minibatches))
        return _updated(optimizer, gradients, params, optimizer_state, share=share), metrics

    order = jnp.tile(jnp.arange(count), algorithm.epochs)
    (params, optimizer_state), metrics = jax.lax.scan(one, (state.params, state.optimizer), order)
    return params, optimizer_state, jax.tree.map(lambda x: x.mean(axis=0), metrics)


def reader(
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


def batch_spec(mesh: Mesh) -> Any:
    """How a batch is split."""
    return P(_batch_axes(mesh))


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
    Its auxiliary arrays, which lead with prompts, come back joined.
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
    auxiliary = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), auxiliary)
    # Over the parts of a parameter, the gradient of `_whole` has added up already.
    return mean.across(axes), over_copies(jax.lax.psum, sums), auxiliary


def _averaged(loss: Mean, sums: Params) -> tuple[Params, Metrics]:
    """The gradient, whose sum goes with the loss's weight, and the metrics of both."""
    gradients = jax.tree.map(lambda gradient: Mean(gradient, loss.weight).value, sums)
    # By parameter, in the order of jax.tree.leaves: to see in which one a gradient went wrong.
    norms = jnp.stack([optax.tree.norm(gradient) for gradient in jax.tree.leaves(gradients)])
    return gradients, {"loss": loss.value, "gradient_norm": optax.tree.norm(gradients), "gradient_norms": norms}
