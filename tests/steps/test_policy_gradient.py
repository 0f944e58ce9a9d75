from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ctrl_jax.steps import kl, logprobs, policy_gradient, sampling
from ctrl_jax.steps.masked import length_mask
from ctrl_jax.types import Responses
from tests.steps import fakes

pytestmark = pytest.mark.usefixtures("compile_fast")

BETA = 0.3
PROMPT = fakes.prompts(0)
RESPONSES = fakes.every_response()
KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS, REFERENCE = fakes.params(KEYS[0]), fakes.params(KEYS[1])
REWARDS = jax.random.uniform(KEYS[2], RESPONSES.lengths.shape)


def objective(params):
    """J = Σ_y π(y) (R(y) / β − log π(y) / π_ref(y)), over every response."""
    log_probs = fakes.log_prob_of(params, PROMPT, RESPONSES)
    reference = fakes.log_prob_of(REFERENCE, PROMPT, RESPONSES)
    return (jnp.exp(log_probs) * (REWARDS / BETA - (log_probs - reference))).sum()


def reward_of(tokens):
    """The reward of sampled tokens [B, N, T], looked up among all responses."""
    same = (tokens[:, :, None] == RESPONSES.tokens[:, None]).all(-1)
    return jnp.where(same, jnp.broadcast_to(REWARDS[:, None], same.shape), 0).sum(-1)


def exact_loss(params, tokens, lengths, prompts):
    responses = Responses(tokens, lengths)
    comparison = logprobs.compare(
        fakes.policy.unembed,
        params,
        fakes.policy.apply(params, prompts, responses),
        REFERENCE,
        fakes.policy.apply(REFERENCE, prompts, responses),
        tokens,
    )
    return comparison, policy_gradient.exact_kl_loss(
        comparison.log_probs, comparison.kl, reward_of(tokens), lengths, beta=BETA
    )


def sampled_loss(params, tokens, lengths, prompts):
    comparison, _ = exact_loss(params, tokens, lengths, prompts)
    return comparison, policy_gradient.sampled_kl_loss(
        comparison.log_probs, comparison.reference_log_probs, reward_of(tokens), lengths, beta=BETA
    )


@pytest.mark.parametrize("loss", [exact_loss, sampled_loss])
def test_expectation_over_every_pair_of_responses_is_the_gradient_of_the_objective(loss):
    """With N = 2 the expectation over samples is a sum over all Y² pairs, without Monte Carlo error."""
    count = RESPONSES.lengths.shape[1]
    probabilities = jnp.exp(fakes.log_prob_of(PARAMS, PROMPT, RESPONSES))[0]
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-6)
    first, second = (index.ravel() for index in np.meshgrid(np.arange(count), np.arange(count)))
    weights = probabilities[first] * probabilities[second]
    tokens = jnp.stack([RESPONSES.tokens[0, first], RESPONSES.tokens[0, second]], axis=1)
    lengths = jnp.stack([RESPONSES.lengths[0, first], RESPONSES.lengths[0, second]], axis=1)

    def expected(params):
        def one(tokens, lengths):
            mean = loss(params, tokens[None], lengths[None], PROMPT)[1]
            return mean.sum / mean.weight

        return (weights * jax.vmap(one)(tokens, lengths)).sum()

    estimate, exact = jax.jit(jax.grad(expected))(PARAMS), -jax.jit(jax.grad(objective))(PARAMS)
    assert np.linalg.norm(estimate - exact) < 1e-4 * np.linalg.norm(exact)


def test_sampled_gradient_is_the_gradient_of_the_objective():
    """Through the sampler: 48 batches of 65,536 rollouts, whose spread is the Monte Carlo error, itself under .5 %."""
    prompts = fakes.prompts(*range(0, 128, 2))  # 64 prompts, all of the even table

    def gradient(key):
        responses = sampling.sample(
            fakes.policy, PARAMS, prompts, key, num_samples=1024, max_length=fakes.LENGTH, eos_ids=(fakes.EOS,)
        ).responses
        batch = responses.tokens, responses.lengths, prompts
        return jax.grad(lambda params: exact_loss(params, *batch)[1].value)(PARAMS)

    samples = np.asarray(jax.jit(lambda keys: jax.lax.map(gradient, keys))(jax.random.split(jax.random.key(7), 48)))
    exact = -np.asarray(jax.grad(objective)(PARAMS))
    monte_carlo_error = np.sqrt((samples.var(axis=0, ddof=1) / len(samples)).sum()) / np.linalg.norm(exact)
    error = np.linalg.norm(samples.mean(axis=0) - exact) / np.linalg.norm(exact)
    assert monte_carlo_error < 0.005
    assert error < 0.01


def test_leave_one_out_is_the_mean_of_the_others():
    values = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    expected = np.stack(
        [values[:, i] - np.delete(values, i, axis=1).mean(axis=1) for i in range(values.shape[1])], axis=1
    )
    np.testing.assert_allclose(policy_gradient.leave_one_out(jnp.asarray(values)), expected, atol=1e-6)


@pytest.fixture
def batch():
    prompts = fakes.prompts(*range(8))
    sample = partial(sampling.sample, fakes.policy, num_samples=5, max_length=fakes.LENGTH, eos_ids=(fakes.EOS,))
    responses = jax.jit(sample)(PARAMS, prompts, jax.random.key(1)).responses
    return prompts, responses.tokens, responses.lengths


@pytest.mark.parametrize("loss", [exact_loss, sampled_loss])
def test_padding_changes_neither_loss_nor_gradient(loss, batch):
    prompts, tokens, lengths = batch

    def value(params, tokens):
        # Rewards are looked up by the clean tokens, so that only the loss sees the garbage.
        responses = Responses(tokens, lengths)
        comparison = logprobs.compare(
            fakes.policy.unembed, params, fakes.policy.apply(params, prompts, responses),
            REFERENCE, fakes.policy.apply(REFERENCE, prompts, responses), tokens,
        )  # fmt: skip
        rewards = reward_of(batch[1])
        if loss is exact_loss:
            mean = policy_gradient.exact_kl_loss(comparison.log_probs, comparison.kl, rewards, lengths, beta=BETA)
        else:
            mean = policy_gradient.sampled_kl_loss(
                comparison.log_probs, comparison.reference_log_probs, rewards, lengths, beta=BETA
            )
        return mean.sum / mean.weight

    garbage = jnp.where(length_mask(lengths, fakes.LENGTH), tokens, (tokens + 1) % fakes.VOCABULARY)
    assert (garbage != tokens).any()
    value_and_gradient = jax.jit(jax.value_and_grad(value))
    clean_value, clean_gradient = value_and_gradient(PARAMS, tokens)
    other_value, other_gradient = value_and_gradient(PARAMS, garbage)
    np.testing.assert_allclose(other_value, clean_value, rtol=1e-6)
    np.testing.assert_allclose(other_gradient, clean_gradient, atol=1e-6)


def test_sharded_gradient_is_the_single_device_gradient(mesh, batch):
    prompts, tokens, lengths = batch

    def value(params, tokens, lengths, prompts, axis_name):
        return exact_loss(params, tokens, lengths, prompts)[1].across(axis_name).value

    single = jax.jit(jax.value_and_grad(lambda params: value(params, tokens, lengths, prompts, None)))(PARAMS)
    sharded = jax.jit(
        jax.shard_map(
            lambda params, *rest: jax.value_and_grad(lambda params: value(params, *rest, "data"))(params),
            mesh=mesh,
            in_specs=(P(), P("data"), P("data"), P("data")),
            out_specs=(P(), P()),
        )
    )(PARAMS, tokens, lengths, prompts)
    np.testing.assert_allclose(sharded[0], single[0], rtol=1e-6)
    np.testing.assert_allclose(sharded[1], single[1], atol=1e-6)


def test_rewards_get_no_gradient(batch):
    _, tokens, lengths = batch
    log_probs = jnp.full(tokens.shape, -1.0)
    gradient = jax.grad(
        lambda rewards: policy_gradient.exact_kl_loss(log_probs, log_probs * 0, rewards, lengths, beta=1.0).sum
    )(reward_of(tokens))
    np.testing.assert_array_equal(gradient, 0)


def test_one_rollout_has_no_baseline():
    ones = jnp.ones((2, 1, 3))
    with pytest.raises(AssertionError):
        policy_gradient.exact_kl_loss(ones, ones, ones[..., 0], jnp.ones((2, 1), jnp.int32), beta=1.0)


def test_exact_kl_varies_less_than_sampled_kl():
    """Near the reference with no reward, all of the gradient is the KL's: the exact one has less noise."""
    near = REFERENCE + 0.1 * PARAMS
    prompts = fakes.prompts(*range(0, 512, 2))
    sample = partial(sampling.sample, fakes.policy, num_samples=4, max_length=fakes.LENGTH, eos_ids=(fakes.EOS,))
    responses = jax.jit(sample)(near, prompts, jax.random.key(3)).responses

    def per_prompt(params, estimator):
        features = fakes.policy.apply(params, prompts, responses)
        reference_features = fakes.policy.apply(REFERENCE, prompts, responses)
        c = logprobs.compare(fakes.policy.unembed, params, features, REFERENCE, reference_features, responses.tokens)

        def one(log_probs, other, lengths):
            return estimator(log_probs[None], other[None], jnp.zeros((1, 4)), lengths[None], beta=1.0).value

        other = c.kl if estimator is policy_gradient.exact_kl_loss else c.reference_log_probs
        return jax.vmap(one)(c.log_probs, other, responses.lengths)

    exact, sampled = (
        np.asarray(jax.jit(jax.jacrev(partial(per_prompt, estimator=estimator)))(near)).var(axis=0).sum()
        for estimator in (policy_gradient.exact_kl_loss, policy_gradient.sampled_kl_loss)
    )
    assert exact < sampled


def test_kl_of_the_language_is_the_mean_of_exact_kl():
    """The chain rule that the objective rests on: E Σ_t KL_t = Σ_y π(y) log π(y) / π_ref(y)."""
    log_probs = fakes.log_prob_of(PARAMS, PROMPT, RESPONSES)
    reference = fakes.log_prob_of(REFERENCE, PROMPT, RESPONSES)
    per_token = kl.exact(
        fakes.policy.apply(PARAMS, PROMPT, RESPONSES), fakes.policy.apply(REFERENCE, PROMPT, RESPONSES)
    )
    mean = (jnp.exp(log_probs) * kl.per_sequence(per_token, RESPONSES.lengths)).sum()
    np.testing.assert_allclose(mean, (jnp.exp(log_probs) * (log_probs - reference)).sum(), rtol=1e-5)
