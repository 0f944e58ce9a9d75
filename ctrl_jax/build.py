"""Configuration to models, optimisers and the jitted, device-mapped steps. The only place that jits and shards.

Each step below is per-device code, mapped with `jax.shard_map` inside `jax.jit`: what `jax.pmap` has become. Parameters
are replicated (`P()`), whatever leads with B is split over `data`. Sampling and scoring need no communication; a loss
is summed over the devices as (sum, weight) *inside* the differentiated function, so that the gradient of the replicated
parameters, which shard_map sums over the devices by itself, is the gradient of the global mean.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ctrl_jax import config
from ctrl_jax.errors import InputError
from ctrl_jax.models import decoder, reward
from ctrl_jax.steps import calibration, kl, kl_budget, logprobs, policy_gradient, preference, sampling, win_rate
from ctrl_jax.steps.masked import Mean, length_mask, masked_mean
from ctrl_jax.theory import ideal, optimal, procedures, transforms
from ctrl_jax.types import (
    Examples,
    Params,
    Policy,
    PreferencePairs,
    Prompts,
    Responses,
    RewardApply,
    Rollouts,
    Transform,
)

Metrics = dict[str, jax.Array]

Step = Callable[..., tuple["TrainState", Metrics]]
"""A jitted update of a state, which it takes over (donation): use the one it returns."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes."""

    step: jax.Array
    """[] int32: updates made."""
    params: Params
    optimizer: optax.OptState
    budget: kl_budget.State | None = None
    """The KL controller of policy training."""


class Models(NamedTuple):
    decoder: decoder.Decoder
    reward_model: reward.RewardModel
    policy: Policy
    reward: RewardApply


class Frozen(NamedTuple):
    """What policy training reads and never changes."""

    reference: Params
    reward: Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyBatch:
    prompts: Prompts
    reference_rewards: jax.Array
    """[B, K] raw rewards of reference responses, each row ascending."""


def models(model: config.Model, vocabulary_size: int) -> Models:
    language_model = decoder.Decoder(model, vocabulary_size)
    reward_model = reward.RewardModel(model, vocabulary_size)
    return Models(language_model, reward_model, decoder.policy(language_model), reward.reward_apply(reward_model))


def stage_key(seed: int, stage: str) -> jax.Array:
    """The key of a stage; step, prompt and sample are folded into it in turn."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


def _example(prompt_length: int = 1, response_length: int = 2) -> tuple[Prompts, Responses]:
    prompts = Prompts(jnp.zeros((1, prompt_length), jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.uint32))
    return prompts, Responses(jnp.zeros((1, 1, response_length), jnp.int32), jnp.ones((1, 1), jnp.int32))


def init_policy(parts: Models, mesh: Mesh, key: jax.Array) -> Params:
    init = jax.jit(
        lambda key: parts.decoder.init(key, *_example())["params"], out_shardings=jax.NamedSharding(mesh, P())
    )
    return init(key)


def init_reward(parts: Models, mesh: Mesh, key: jax.Array, policy_params: Params) -> Params:
    def init(key: jax.Array) -> Params:
        return parts.reward_model.init(key, *_example())["params"]

    params = jax.jit(init, out_shardings=jax.NamedSharding(mesh, P()))(key)
    return reward.from_policy(params, policy_params)


def supervised_optimizer(stage: config.Supervised) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, stage.learning_rate, stage.warmup_steps, stage.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))


def policy_optimizer(policy: config.Policy) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, policy.learning_rate, policy.warmup_steps, policy.steps, 0.1 * policy.learning_rate
    )
    return optax.chain(optax.clip_by_global_norm(policy.max_gradient_norm), optax.adam(schedule, b2=0.99))


def init_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, budget: kl_budget.State | None = None
) -> TrainState:
    # The parameters are copied: the step donates its state, and they may live on as the reference.
    init = jax.jit(
        lambda params: TrainState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimizer.init(params), budget
        ),
        out_shardings=jax.NamedSharding(mesh, P()),
    )
    return init(params)


def _values(metrics: dict[str, Mean]) -> Metrics:
    """Global means from every device's (sum, weight)."""
    return {name: mean.across("data").value for name, mean in metrics.items()}


def _update(
    state: TrainState, optimizer: optax.GradientTransformation, loss: Callable[[Params], tuple[Mean, Any]]
) -> tuple[Params, optax.OptState, Metrics, Any]:
    """One update on a loss of (sum, weight) over all devices: (params, optimizer state, metrics, auxiliary)."""

    def global_loss(params: Params) -> tuple[jax.Array, Any]:
        mean, auxiliary = loss(params)
        return mean.across("data").value, auxiliary

    (value, auxiliary), gradients = jax.value_and_grad(global_loss, has_aux=True)(state.params)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradients)}
    return optax.apply_updates(state.params, updates), optimizer_state, metrics, auxiliary


def _supervised_step(
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    loss: Callable[[Params, Examples], tuple[Mean, dict[str, Mean]]],
) -> Step:
    def step(state: TrainState, batch: Examples) -> tuple[TrainState, Metrics]:
        params, optimizer_state, metrics, means = _update(state, optimizer, lambda params: loss(params, batch))
        return TrainState(state.step + 1, params, optimizer_state), metrics | _values(means)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    return jax.jit(mapped, donate_argnums=0)


def sft_step(parts: Models, mesh: Mesh, optimizer: optax.GradientTransformation) -> Step:
    """(state, demonstrations) to (state, metrics): maximum likelihood of the response tokens."""

    def loss(params: Params, batch: Examples) -> tuple[Mean, dict[str, Mean]]:
        features = parts.policy.apply(params, batch.prompts, batch.responses)
        log_probs = logprobs.token_log_probs(parts.policy.unembed, params, features, batch.responses.tokens)
        mask = length_mask(batch.responses.lengths, log_probs.shape[-1])
        return masked_mean(-log_probs, mask), {}

    return _supervised_step(mesh, optimizer, loss)


def reward_model_step(parts: Models, mesh: Mesh, optimizer: optax.GradientTransformation) -> Step:
    """(state, preference pairs) to (state, metrics): the Bradley-Terry likelihood."""

    def loss(params: Params, batch: PreferencePairs) -> tuple[Mean, dict[str, Mean]]:
        rewards = parts.reward(params, batch.prompts, batch.responses)
        chosen, rejected = rewards[:, 0], rewards[:, 1]
        return preference.bradley_terry(chosen, rejected), {"accuracy": preference.accuracy(chosen, rejected)}

    return _supervised_step(mesh, optimizer, loss)


def sampler(
    parts: Models, mesh: Mesh, *, num_samples: int, max_length: int, eos_id: int, temperature: float
) -> Callable[[Params, Prompts, jax.Array], Rollouts]:
    """(params, prompts, key) to Rollouts."""

    def sample(params: Params, prompts: Prompts, key: jax.Array) -> Rollouts:
        return sampling.sample(
            parts.policy, params, prompts, key,
            num_samples=num_samples, max_length=max_length, eos_id=eos_id, temperature=temperature,
        )  # fmt: skip

    return jax.jit(jax.shard_map(sample, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P("data")))


def scorer(parts: Models, mesh: Mesh) -> RewardApply:
    """(reward params, prompts, responses) to raw rewards [B, N]."""
    return jax.jit(jax.shard_map(parts.reward, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data")))


def kl_of_responses(
    parts: Models, mesh: Mesh, *, temperature: float
) -> Callable[[Params, Params, Rollouts], jax.Array]:
    """(policy params, reference params, rollouts of the policy) to the exact KL of each response [B, N], nats."""

    def measure(params: Params, reference: Params, rollouts: Rollouts) -> jax.Array:
        return kl.per_sequence(compare(parts, params, reference, rollouts, temperature).kl, rollouts.responses.lengths)

    return jax.jit(jax.shard_map(measure, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P("data")))


def compare(
    parts: Models, params: Params, reference: Params, rollouts: Rollouts, temperature: float
) -> logprobs.Comparison:
    """Policy and reference on the policy's rollouts; per-device code, to be traced in a step."""
    apply, unembed = parts.policy.apply, parts.policy.unembed
    features = apply(params, rollouts.prompts, rollouts.responses)
    reference_features = apply(reference, rollouts.prompts, rollouts.responses)
    return logprobs.compare(
        unembed, params, features, reference, reference_features, rollouts.responses.tokens, temperature=temperature
    )


def transform_of(policy: config.Policy, num_references: int) -> Transform | None:
    """Φ on its range [0, 1], or None for `raw`. An infinite Φ stops half a reference response before its end."""
    if policy.transform == "raw":
        return None
    if policy.transform == "optimal":
        phi: Transform = optimal.optimal_transform(procedures.parse(policy.procedure), kl=policy.kl_budget)
    else:
        phi = transforms.parse(policy.transform)
    return transforms.normalized(phi, edge=0.5 / num_references)


def starting_beta(policy: config.Policy, phi: Transform | None, reference_rewards: jax.Array) -> float:
    """β at which the ideal policy has the KL budget: of Φ on ranks, or for raw rewards of the reference's sample."""
    if policy.beta is not None:
        return policy.beta
    if phi is not None:
        return ideal.at_kl(phi, policy.kl_budget).beta
    return _empirical_beta(reference_rewards, policy.kl_budget)


def _empirical_beta(rewards: jax.Array, budget: float) -> float:
    """β with E_x KL(tilted || uniform) = budget, the K reference responses of a prompt tilted by exp(r / β)."""

    def mean_kl(beta: jax.Array) -> jax.Array:
        log_weights = jax.nn.log_softmax(rewards / beta, axis=-1)
        return (jnp.exp(log_weights) * (log_weights + jnp.log(rewards.shape[-1]))).sum(-1).mean()

    if budget >= math.log(rewards.shape[-1]):
        raise InputError(
            f"The KL budget is {budget} nats, but {rewards.shape[-1]} reference responses a prompt give β only up to "
            f"{math.log(rewards.shape[-1]):.2f}; lower the budget or raise --calibration.samples-per-prompt."
        )
    spread = float(jnp.std(rewards, axis=-1).mean())
    if spread == 0:
        raise InputError(
            "The reward model gives all reference responses of every prompt the same reward; nothing can be learned "
            "from it. Train it longer (--reward-model.steps) or on more data (--data.dialogues)."
        )
    low, high = jnp.log(1e-3 * spread), jnp.log(1e3 * spread)
    bisect = jax.jit(lambda low, high: jax.lax.fori_loop(0, 50, halve, (low, high)))

    def halve(_: jax.Array, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = (low + high) / 2
        # The KL falls as β grows.
        too_far = mean_kl(jnp.exp(middle)) > budget
        return jnp.where(too_far, middle, low), jnp.where(too_far, high, middle)

    return float(jnp.exp(bisect(low, high)[0]))


def policy_step(
    parts: Models,
    mesh: Mesh,
    policy: config.Policy,
    phi: Transform | None,
    optimizer: optax.GradientTransformation,
    *,
    key: jax.Array,
    max_length: int,
    eos_id: int,
) -> Step:
    """(state, frozen, batch) to (state, metrics): sample, score, calibrate, transform, and one policy gradient."""
    procedure = procedures.parse(policy.procedure)

    def step(state: TrainState, frozen: Frozen, batch: PolicyBatch) -> tuple[TrainState, Metrics]:
        budget = state.budget
        assert budget is not None, "policy training starts from init_state with a KL controller: kl_budget.init"
        beta = budget.beta
        rollouts = sampling.sample(
            parts.policy, state.params, batch.prompts, jax.random.fold_in(key, state.step),
            num_samples=policy.samples_per_prompt, max_length=max_length, eos_id=eos_id, temperature=policy.temperature,
        )  # fmt: skip
        responses = rollouts.responses
        raw = parts.reward(frozen.reward, batch.prompts, responses)
        calibrated = calibration.calibrate_sorted(raw, batch.reference_rewards)
        transformed = raw if phi is None else phi(calibrated)

        def loss(params: Params) -> tuple[Mean, logprobs.Comparison]:
            comparison = compare(parts, params, frozen.reference, rollouts, policy.temperature)
            mean = policy_gradient.exact_kl_loss(
                comparison.log_probs, comparison.kl, transformed, responses.lengths, beta=beta
            )
            return mean, comparison

        params, optimizer_state, metrics, comparison = _update(state, optimizer, loss)

        def over_responses(values: jax.Array) -> Mean:
            return masked_mean(values, None)

        def sequence_kl(estimator: Callable[[jax.Array, jax.Array], jax.Array]) -> Mean:
            per_token = estimator(comparison.log_probs, comparison.reference_log_probs)
            return over_responses(kl.per_sequence(per_token, responses.lengths))

        mask = length_mask(responses.lengths, max_length)
        exact_kl = kl.per_sequence(comparison.kl, responses.lengths)
        means = {
            "kl": over_responses(exact_kl),
            "kl_k1": sequence_kl(kl.k1),
            "kl_k2": sequence_kl(kl.k2),
            "kl_k3": sequence_kl(kl.k3),
            "raw_reward": over_responses(raw),
            "calibrated_reward": over_responses(calibrated),
            "transformed_reward": over_responses(transformed),
            "response_length": over_responses(responses.lengths.astype(jnp.float32)),
            "sampler_scorer_gap": masked_mean(jnp.abs(comparison.log_probs - rollouts.log_probs), mask),
        }
        if min(policy.samples_per_prompt, batch.reference_rewards.shape[1]) >= procedure.num_samples:
            means["win_rate"] = over_responses(win_rate.win_rate(raw, batch.reference_rewards, procedure))
        metrics |= _values(means)
        metrics["kl_standard_error"] = kl.estimate(exact_kl).across("data").standard_error
        metrics["beta"] = beta
        budget = kl_budget.update(budget, metrics["kl"])
        return TrainState(state.step + 1, params, optimizer_state, budget), metrics

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
    return jax.jit(mapped, donate_argnums=0)
