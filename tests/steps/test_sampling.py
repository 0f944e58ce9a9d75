from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import stats

from ctrl_jax.steps import logprobs, sampling
from ctrl_jax.types import Prompts, Responses
from tests.steps import fakes

pytestmark = pytest.mark.usefixtures("compile_fast")

PARAMS = fakes.params(jax.random.key(0))


def sample(params, prompts, key, num_samples, temperature=1.0, eos_ids=(fakes.EOS,), top_k=None, top_p=None):
    return jitted(params, prompts, key, num_samples, temperature, eos_ids, top_k, top_p)


@partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def jitted(params, prompts, key, num_samples, temperature, eos_ids, top_k, top_p):
    return sampling.sample(
        fakes.policy,
        params,
        prompts,
        key,
        num_samples=num_samples,
        max_length=fakes.LENGTH,
        eos_ids=eos_ids,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


def truncated(law, top_k, top_p):
    """The law of a token by the definition: the k likeliest, then the likeliest that together have p of those."""
    order = sorted(range(len(law)), key=lambda token: -law[token])[:top_k]
    kept, total = [], sum(law[token] for token in order)
    for token in order:
        if top_p is not None and kept and sum(law[other] for other in kept) / total >= top_p:
            break
        kept.append(token)
    return np.array([law[token] if token in kept else 0.0 for token in range(len(law))]) / sum(law[kept])


@pytest.mark.parametrize(("top_k", "top_p"), [(2, None), (1, None), (None, 0.6), (None, 0.01), (2, 0.7), (9, 1.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_truncated_laws_are_the_definitions(top_k, top_p, temperature):
    logits = np.random.default_rng(0).normal(size=(40, 7))
    law = np.exp(logits / temperature)
    law /= law.sum(-1, keepdims=True)
    expected = np.stack([truncated(row, top_k, top_p) for row in law])
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    np.testing.assert_allclose(np.exp(logprobs.sampling_law(jnp.asarray(logits), **options)), expected, atol=1e-6)
    across = logprobs.sampling_law(jnp.asarray(logits).T, **options, axis=0)
    np.testing.assert_allclose(np.exp(across).T, expected, atol=1e-6)


def test_a_top_p_of_one_keeps_every_token():
    """Of many tokens, whose probabilities a float32 sum adds up to 1 before the last of them."""
    logits = 3 * np.random.default_rng(1).normal(size=(8, 4096)).astype(np.float32)
    law = logprobs.sampling_law(jnp.asarray(logits), temperature=1.0, top_p=1.0)
    np.testing.assert_array_equal(law, logprobs.sampling_law(jnp.asarray(logits), temperature=1.0))


def test_tokens_as_likely_as_the_last_that_is_kept_are_kept():
    law = logprobs.sampling_law(jnp.log(jnp.array([0.4, 0.2, 0.2, 0.2])), temperature=1.0, top_k=2)
    np.testing.assert_allclose(jnp.exp(law), [0.4, 0.2, 0.2, 0.2], atol=1e-6)


@pytest.mark.parametrize(("top_k", "top_p"), [(2, None), (None, 0.8), (2, 0.7)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_responses_follow_a_truncated_law(top_k, top_p, temperature):
    """Chi-square of 20,000 responses a prompt against the product of the truncated laws, at a 1e-4 level."""
    responses = fakes.every_response()
    rollouts = sample(PARAMS, fakes.prompts(0, 1), jax.random.key(11), 20_000, temperature, (fakes.EOS,), top_k, top_p)
    tables = np.asarray(jax.nn.softmax(PARAMS / temperature), np.float64)
    for row in range(2):
        expected = []
        for tokens, length in zip(np.asarray(responses.tokens[0]), np.asarray(responses.lengths[0]), strict=True):
            laws = [truncated(fakes.logits(tables, row, tokens[:t]), top_k, top_p) for t in range(length)]
            expected.append(np.prod([law[token] for law, token in zip(laws, tokens, strict=False)]))
        expected = np.array(expected)
        drawn = np.asarray(rollouts.responses.tokens[row])
        same = (drawn[:, None] == np.asarray(responses.tokens[0])[None]).all(-1)
        observed = same.sum(0)
        assert expected.sum() == pytest.approx(1)
        assert not observed[expected == 0].any()
        assert (expected == 0).any()
        enough = expected * 20_000 >= 5
        counts, means = observed[enough], expected[enough] * 20_000
        statistic = ((counts - means) ** 2 / means).sum()
        assert stats.chi2.sf(statistic, max(1, enough.sum() - 1)) > 1e-4
        # The log-probs that come with the samples are those of the law that drew them.
        np.testing.assert_allclose(
            np.asarray(rollouts.log_probs[row]).sum(-1), np.log(expected[same.argmax(-1)]), atol=1e-5
        )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_responses_follow_the_law_of_the_model(temperature):
    """Chi-square of 20,000 responses a prompt against the probabilities of all responses, at a 1e-4 level."""
    responses = fakes.every_response()
    rollouts = sample(PARAMS, fakes.prompts(0, 1), jax.random.key(1), 20_000, temperature)
    for row, prompt in enumerate((0, 1)):
        log_probs = fakes.log_prob_of(PARAMS, fakes.prompts(prompt), responses, temperature)
        expected = np.exp(np.asarray(log_probs[0], np.float64))
        same = (np.asarray(rollouts.responses.tokens[row])[:, None] == np.asarray(responses.tokens[0])[None]).all(-1)
        assert (same.sum(-1) == 1).all()
        observed = same.sum(0)
        np.testing.assert_array_equal(
            np.asarray(rollouts.responses.lengths[row]), np.asarray(responses.lengths[0])[same.argmax(-1)]
        )
        enough = expected * 20_000 >= 5
        pooled = np.append(expected[enough], expected[~enough].sum())
        counts = np.append(observed[enough], observed[~enough].sum())
        possible = pooled > 0
        assert (counts[~possible] == 0).all()
        counts, wanted = counts[possible], 20_000 * pooled[possible]
        assert stats.chi2.sf(((counts - wanted) ** 2 / wanted).sum(), len(wanted) - 1) > 1e-4


def test_log_probs_are_the_scorers():
    rollouts = sample(PARAMS, fakes.prompts(0, 1), jax.random.key(2), 50, 0.8)
    responses = rollouts.responses
    features = fakes.policy.apply(PARAMS, rollouts.prompts, responses)
    scored = logprobs.token_log_probs(fakes.policy.unembed, PARAMS, features, responses.tokens, temperature=0.8)
    mask = np.arange(fakes.LENGTH)[None, None] < np.asarray(responses.lengths)[..., None]
    np.testing.assert_allclose(np.asarray(rollouts.log_probs), np.where(mask, scored, 0), atol=1e-6)


def test_responses_depend_on_prompt_and_sample_alone():
    """Neither the batch, nor its order, nor how many samples are asked for beside one, change it."""
    key = jax.random.key(3)
    together = sample(PARAMS, fakes.prompts(4, 5, 6), key, 8)
    reordered = sample(PARAMS, fakes.prompts(6, 4), key, 5)
    np.testing.assert_array_equal(reordered.responses.tokens[0], together.responses.tokens[2, :5])
    np.testing.assert_array_equal(reordered.responses.tokens[1], together.responses.tokens[0, :5])
    other_key = sample(PARAMS, fakes.prompts(4, 5, 6), jax.random.key(4), 8)
    assert (np.asarray(other_key.responses.tokens) != np.asarray(together.responses.tokens)).any()


def test_sharded_is_single_device(mesh):
    prompts = fakes.prompts(*range(16))
    single = sample(PARAMS, prompts, jax.random.key(5), 6)
    mapped = jax.shard_map(
        lambda *arguments: sample(*arguments, 6), mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P("data")
    )
    sharded = jax.jit(mapped)(PARAMS, prompts, jax.random.key(5))
    np.testing.assert_array_equal(sharded.responses.tokens, single.responses.tokens)
    np.testing.assert_array_equal(sharded.responses.lengths, single.responses.lengths)
    np.testing.assert_allclose(sharded.log_probs, single.log_probs, atol=1e-6)


def test_sampling_needs_no_communication(mesh):
    mapped = jax.shard_map(
        lambda *arguments: sample(*arguments, 2), mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P("data")
    )
    text = jax.jit(mapped).lower(PARAMS, fakes.prompts(*range(8)), jax.random.key(0)).compile().as_text()
    assert not any(name in text for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


def test_stops_as_soon_as_all_have_ended():
    """Rows end at different steps; the decoder reads no token after which nothing is drawn."""
    lengths = jnp.array([1, 3, 2])
    calls = []

    def features(index):
        # Row b ends at its lengths[b]-th token.
        ends = index + 1 >= lengths
        return jnp.where(ends[:, None], jnp.array([[-1e9, 0.0]]), jnp.array([[0.0, -1e9]]))

    def decode(params, cache, response_cache, prompt_lengths, tokens, index):
        jax.debug.callback(lambda index: calls.append(int(index)), index)
        return jnp.broadcast_to(features(index + 1)[:, None], (3, tokens.shape[1], 2)), response_cache

    policy = fakes.policy._replace(
        prefill=lambda params, prompts: (features(0), prompts.ids), unembed=lambda params, x: x, decode=decode
    )
    prompts = Prompts(jnp.zeros((3, 1), jnp.int32), jnp.ones(3, jnp.int32), jnp.arange(3, dtype=jnp.uint32))
    rollouts = sampling.sample(policy, None, prompts, jax.random.key(0), num_samples=2, max_length=50, eos_ids=(1,))
    jax.effects_barrier()
    np.testing.assert_array_equal(rollouts.responses.lengths, [[1, 1], [3, 3], [2, 2]])
    assert sorted(calls) == [0, 1]


@pytest.mark.parametrize("eos_ids", [(2, 0), (0, 2)])
def test_any_of_several_tokens_ends_a_response(eos_ids):
    """The draws are those with one such token, cut behind the first of either."""
    one = sample(PARAMS, fakes.prompts(0, 1), jax.random.key(7), 200)
    several = sample(PARAMS, fakes.prompts(0, 1), jax.random.key(7), 200, 1.0, eos_ids)
    tokens = np.asarray(one.responses.tokens)
    ends = np.isin(tokens, eos_ids)
    lengths = np.where(ends.any(-1), ends.argmax(-1) + 1, fakes.LENGTH)
    real = np.arange(fakes.LENGTH) < lengths[..., None]
    assert (
        len(np.unique(np.where(real, tokens, -1).reshape(-1, fakes.LENGTH), axis=0)) == 7
    )  # 0, 2, 1 0, 1 2, and 1 1 before any
    np.testing.assert_array_equal(several.responses.lengths, lengths)
    np.testing.assert_array_equal(several.responses.tokens, np.where(real, tokens, eos_ids[0]))
    np.testing.assert_allclose(several.log_probs, np.where(real, one.log_probs, 0), atol=1e-6)


@pytest.mark.parametrize("padding", [0, fakes.EOS])
def test_a_response_has_ended_where_its_last_token_ends_it(padding):
    every = jax.tree.map(np.asarray, fakes.every_response())
    real = np.arange(fakes.LENGTH) < every.lengths[..., None]
    given = Responses(jnp.asarray(np.where(real, every.tokens, padding)), jnp.asarray(every.lengths))
    bodies = [row[:length].tolist() for row, length in zip(every.tokens[0], every.lengths[0], strict=True)]
    np.testing.assert_array_equal(sampling.ended(given, (fakes.EOS,)), [[fakes.EOS in body for body in bodies]])
    np.testing.assert_array_equal(sampling.ended(given, (fakes.EOS, 1)), [[body[-1] in (1, 2) for body in bodies]])


def test_token_by_token_is_the_same():
    """What `start` and `advance` have drawn at each moment is the beginning of what `sample` draws at once."""
    key, options = jax.random.key(8), {"eos_ids": (fakes.EOS,), "temperature": 0.9}
    whole = sample(PARAMS, fakes.prompts(0, 1), key, 4, 0.9)
    start = jax.jit(
        lambda params, *given: sampling.start(
            fakes.policy, params, *given, num_samples=4, max_length=fakes.LENGTH, **options
        )
    )
    advance = jax.jit(lambda params, state: sampling.advance(fakes.policy, params, state, **options))
    lengths = np.asarray(whole.responses.lengths)
    state = start(PARAMS, fakes.prompts(0, 1), key)
    for drawn in range(1, lengths.max() + 1):
        so_far = state.rollouts.responses
        np.testing.assert_array_equal(so_far.lengths, np.minimum(lengths, drawn))
        np.testing.assert_array_equal(so_far.tokens[..., :drawn], whole.responses.tokens[..., :drawn])
        assert bool(state.unfinished) == (drawn < lengths.max())
        if state.unfinished:
            state = advance(PARAMS, state)
    np.testing.assert_array_equal(state.rollouts.responses.tokens, whole.responses.tokens)
    np.testing.assert_array_equal(state.rollouts.log_probs, whole.log_probs)


@pytest.mark.parametrize(
    ("num_samples", "expected_widths"),
    # Of 128 prompts 38 live after 2 and 3 tokens, 18 after 4 to 6, 6 after 7 and 8: reading token t draws token t + 1.
    # Of 512 rows 128 go on, of which 24 live after 7 tokens: a quarter once more.
    [(1, [128] * 3 + [32] * 5), (4, [512] * 3 + [128] * 3 + [32] * 2)],
)
def test_long_tails_are_read_alone_and_change_no_sample(num_samples, expected_widths):
    """The rows that live longest go on in quarters of the batch, and draw what they draw in any batch."""
    widths = []
    lengths = np.array([2] * 90 + [4] * 20 + [7] * 12 + [9] * 6)
    np.random.default_rng(0).shuffle(lengths)
    ends = jnp.asarray(lengths)

    def features(ids, index):
        # Prompt b ends at its lengths[b]-th token; before that it says one of 5 tokens.
        likely = jnp.arange(6)[None] == 5
        return jnp.where(likely == (index + 1 >= ends[ids])[:, None], 0.0, -1e9)

    def decode(params, cache, response_cache, prompt_lengths, tokens, index):
        jax.debug.callback(lambda index: widths.append((tokens.size, int(index))), index)
        at = jnp.broadcast_to(features(cache, index + 1)[:, None], (*tokens.shape, 6))
        # The cache counts what a row has read: a row that got another's would say so.
        read = response_cache.reshape(tokens.shape) + tokens
        return at + 0.1 * jnp.arange(6)[None, None] * (read % 3)[..., None], read.reshape(-1)

    policy = fakes.policy._replace(
        prefill=lambda params, prompts: (features(prompts.ids, 0), prompts.ids),
        start=lambda cache, num_samples, max_length: jnp.zeros(cache.shape[0] * num_samples, jnp.int32),
        unembed=lambda params, x: x,
        decode=decode,
    )

    @jax.jit
    def sample(ids):
        prompts = Prompts(jnp.zeros((len(ids), 1), jnp.int32), jnp.ones(len(ids), jnp.int32), ids)
        key = jax.random.key(0)
        return sampling.sample(policy, None, prompts, key, num_samples=num_samples, max_length=12, eos_ids=(5,))

    whole = sample(jnp.arange(128))
    jax.effects_barrier()
    np.testing.assert_array_equal(whole.responses.lengths, np.repeat(lengths[:, None], num_samples, axis=1))
    assert sorted(widths, key=lambda width: width[1]) == [(width, index) for index, width in enumerate(expected_widths)]
    # Batches of 32 rows, none of which is too long a tail.
    count = 32 // num_samples
    for first in range(0, 128, count):
        part = sample(jnp.arange(first, first + count))
        np.testing.assert_array_equal(part.responses.tokens, whole.responses.tokens[first : first + count])
        np.testing.assert_array_equal(part.responses.lengths, whole.responses.lengths[first : first + count])
        np.testing.assert_array_equal(part.log_probs, whole.log_probs[first : first + count])


def test_a_single_token():
    """T = 1: the prompt alone says it."""
    rollouts = jax.jit(
        lambda params, prompts, key: sampling.sample(
            fakes.policy, params, prompts, key, num_samples=50, max_length=1, eos_ids=(fakes.EOS,)
        )
    )(PARAMS, fakes.prompts(0, 1), jax.random.key(9))
    tokens = np.asarray(rollouts.responses.tokens)[..., 0]
    assert set(tokens.ravel()) == set(range(fakes.VOCABULARY))
    np.testing.assert_array_equal(rollouts.responses.lengths, np.ones((2, 50)))
    law = np.asarray(jax.nn.log_softmax(jnp.stack([fakes.logits(PARAMS, row, []) for row in range(2)])))
    np.testing.assert_allclose(rollouts.log_probs[..., 0], np.take_along_axis(law, tokens, 1), atol=1e-6)


def test_towards_temperature_0_it_is_greedy():
    rollouts = sample(PARAMS, fakes.prompts(0, 1), jax.random.key(6), 20, 1e-4)
    for row in range(2):
        expected = []
        while len(expected) < fakes.LENGTH and fakes.EOS not in expected:
            expected.append(int(fakes.logits(PARAMS, row, expected).argmax()))
        expected += [fakes.EOS] * (fakes.LENGTH - len(expected))
        np.testing.assert_array_equal(rollouts.responses.tokens[row], [expected] * 20)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 512, 1000])
def test_inverse_cdf_inverts_the_cdf(size):
    rng = np.random.default_rng(size)
    probabilities = rng.dirichlet(np.full(size, 0.3), 50).astype(np.float32)
    probabilities[:, rng.integers(size, size=size // 3)] = 0
    probabilities[:, 0] += 1e-6
    cumulative = np.cumsum(probabilities.astype(np.float64), axis=-1)
    edges = np.concatenate([np.zeros((50, 1)), cumulative], axis=-1) / cumulative[:, -1:]
    middles = ((edges[:, 1:] + edges[:, :-1]) / 2).astype(np.float32)
    wide = probabilities > 1e-4  # float32 cannot place a uniform inside a narrower one
    drawn = jax.vmap(sampling.inverse_cdf, (None, 1), 1)(jnp.asarray(probabilities).T, jnp.asarray(middles))
    np.testing.assert_array_equal(np.asarray(drawn)[wide], np.broadcast_to(np.arange(size), drawn.shape)[wide])


def test_inverse_cdf_never_draws_what_has_probability_0():
    """At both ends of the uniforms, where rounding would show."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(300, 0.05), 2000).astype(np.float32)
    probabilities *= rng.random(probabilities.shape) < 0.5
    probabilities[:, 150] += 1e-3
    for uniform in (0.0, np.nextafter(np.float32(1), np.float32(0)), 0.5):
        drawn = np.asarray(sampling.inverse_cdf(jnp.asarray(probabilities).T, jnp.full(2000, uniform, jnp.float32)))
        assert (probabilities[np.arange(2000), drawn] > 0).all()


def test_sums_that_a_device_rounds_out_of_order_draw_nothing_impossible():
    weights = jnp.array([[0.5], [0.0], [0.5], [0.0]])
    above = jnp.nextafter(jnp.float32(0.5), jnp.float32(1))
    cumulative = jnp.array([[0.5], [above], [1.0], [jnp.nextafter(jnp.float32(1), jnp.float32(2))]])
    for target, index in ((0.0, 0), (0.5, 2), (1.0, 2)):
        assert sampling._first_above(jnp.full(1, target, jnp.float32), cumulative, weights).tolist() == [index]


def test_a_tail_goes_on_alone_unless_it_is_small_or_its_prompts_are_long():
    assert sampling.rows_left(64, 4, prompt_length=32, max_length=48) == 64
    assert sampling.rows_left(4, 15, prompt_length=32, max_length=48) == 0
    # 32 copies of the prompt, where 128 responses read one.
    assert sampling.rows_left(1, 128, prompt_length=2048, max_length=128) == 0
