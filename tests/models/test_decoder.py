import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ctrl_jax.config import Lora, Model
from ctrl_jax.models import decoder, lora, reward
from ctrl_jax.steps import logprobs, sampling
from ctrl_jax.steps.masked import length_mask
from ctrl_jax.types import Prompts, Responses

pytestmark = pytest.mark.usefixtures("compile_fast")

V, B, N, SIZE, T = 13, 8, 3, 6, 5
CONFIG = Model(width=16, layers=2, heads=4, kv_heads=2, mlp_width=24)
LENGTHS = jnp.array([1, 2, 3, 4, 5, 6, 6, 2])
KEYS = jax.random.split(jax.random.key(0), 4)
PROMPTS = Prompts(jax.random.randint(KEYS[0], (B, SIZE), 0, V), LENGTHS, jnp.arange(B, dtype=jnp.uint32))
RESPONSES = Responses(jax.random.randint(KEYS[1], (B, N, T), 0, V), jax.random.randint(KEYS[2], (B, N), 1, T + 1))


def build(config=CONFIG):
    model = decoder.Decoder(config.architecture(V))
    params = jax.jit(model.init)(KEYS[3], PROMPTS, RESPONSES)["params"]
    # Norm scales start at 1: moved, so that leaving one out would show.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(KEYS[3], len(leaves))
    params = tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])
    return model, params


def oracle(config, params, tokens):
    """A Llama decoder over one unpadded sequence in numpy, by its definition: logits [T, V] after each token."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def rotate(x):
        half = x.shape[-1] // 2
        out = np.empty_like(x)
        for t in range(len(x)):
            for i in range(half):
                angle = t / config.rope_theta ** (i / half)
                a, b = x[t, :, i], x[t, :, i + half]
                out[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
                out[t, :, i + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    size, dim = len(tokens), config.width // config.heads
    x = params["embedding"]["embedding"][tokens] * np.sqrt(config.width)
    for layer in range(config.layers):
        block = params[f"layers_{layer}"]
        h = norm(x, block["attention_norm"]["scale"])
        q = rotate((h @ block["q_proj"]["kernel"]).reshape(size, config.heads, dim))
        k = rotate((h @ block["k_proj"]["kernel"]).reshape(size, config.kv_heads, dim))
        v = (h @ block["v_proj"]["kernel"]).reshape(size, config.kv_heads, dim)
        out = np.zeros((size, config.heads, dim))
        for head in range(config.heads):
            kv = head // (config.heads // config.kv_heads)
            for t in range(size):
                scores = q[t, head] @ k[: t + 1, kv].T / np.sqrt(dim)
                weights = np.exp(scores - scores.max())
                out[t, head] = weights @ v[: t + 1, kv] / weights.sum()
        x = x + out.reshape(size, -1) @ block["o_proj"]["kernel"]
        h = norm(x, block["mlp_norm"]["scale"])
        gate = h @ block["gate_proj"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ block["up_proj"]["kernel"])) @ block["down_proj"]["kernel"]
    x = norm(x, params["final_norm"]["scale"])
    return x @ (params["embedding"]["embedding"].T if config.tied_embeddings else params["head"]["kernel"])


@pytest.mark.parametrize(
    "changes", [{}, {"tied_embeddings": False}, {"kv_heads": 4}, {"kv_heads": 1, "rope_theta": 100.0}], ids=str
)
def test_logits_are_the_definitions(changes):
    config = Model(**{**CONFIG.__dict__, **changes})
    model, params = build(config)
    logits = jax.jit(model.apply)({"params": params}, PROMPTS, RESPONSES)
    for b in (0, 3, 5):
        for n in range(N):
            length = int(LENGTHS[b])
            sequence = np.concatenate([PROMPTS.tokens[b, :length], RESPONSES.tokens[b, n]])
            expected = oracle(config, params, sequence)[length - 1 : length - 1 + T]
            np.testing.assert_allclose(logits[b, n], expected, atol=1e-4)


def test_padding_changes_nothing():
    model, params = build()
    apply = jax.jit(model.apply)
    logits = apply({"params": params}, PROMPTS, RESPONSES)
    garbage = jnp.where(length_mask(LENGTHS, SIZE), PROMPTS.tokens, (PROMPTS.tokens + 5) % V)
    longer = Prompts(jnp.pad(garbage, ((0, 0), (0, 4)), constant_values=7), LENGTHS, PROMPTS.ids)
    np.testing.assert_allclose(apply({"params": params}, longer, RESPONSES), logits, atol=1e-5)


def test_a_response_does_not_see_the_others_nor_what_follows():
    model, params = build()
    apply = jax.jit(model.apply)
    logits = apply({"params": params}, PROMPTS, RESPONSES)
    alone = Responses(RESPONSES.tokens[:, 1:2], RESPONSES.lengths[:, 1:2])
    np.testing.assert_allclose(apply({"params": params}, PROMPTS, alone)[:, 0], logits[:, 1], atol=1e-5)
    changed = Responses(RESPONSES.tokens.at[..., 3:].add(1) % V, RESPONSES.lengths)
    np.testing.assert_allclose(apply({"params": params}, PROMPTS, changed)[:, :, :4], logits[:, :, :4], atol=1e-5)


def test_sampling_with_the_cache_scores_as_the_full_forward_pass():
    model, params = build()
    policy = decoder.policy(model)

    @jax.jit
    def sample_and_score(params):
        rollouts = sampling.sample(policy, params, PROMPTS, KEYS[0], num_samples=4, max_length=7, eos_ids=(0,))
        features = policy.apply(params, PROMPTS, rollouts.responses)
        return rollouts, logprobs.token_log_probs(policy.unembed, params, features, rollouts.responses.tokens)

    rollouts, scored = sample_and_score({"params": params})
    mask = length_mask(rollouts.responses.lengths, 7)
    np.testing.assert_allclose(jnp.where(mask, scored, 0), rollouts.log_probs, atol=1e-5)
    assert len(np.unique(rollouts.responses.lengths)) > 1


def test_a_reward_is_the_same_alone_in_a_batch_and_with_more_padding():
    model = reward.RewardModel(CONFIG.architecture(V))
    params = jax.jit(model.init)(KEYS[3], PROMPTS, RESPONSES)["params"]
    params = {"params": params}
    params["params"]["head"] = {"kernel": jax.random.normal(KEYS[0], (CONFIG.width, 1)), "bias": jnp.ones(1)}
    apply = jax.jit(reward.reward_apply(model))
    together = apply(params, PROMPTS, RESPONSES)
    garbage = jnp.where(length_mask(RESPONSES.lengths, T), RESPONSES.tokens, (RESPONSES.tokens + 3) % V)
    padded = Responses(jnp.pad(garbage, ((0, 0), (0, 0), (0, 3))), RESPONSES.lengths)
    np.testing.assert_allclose(apply(params, PROMPTS, padded), together, atol=1e-5)
    for b in (4,):
        one = jax.tree.map(lambda x, b=b: x[b : b + 1], PROMPTS)
        length = int(RESPONSES.lengths[b, 2])
        alone = Responses(RESPONSES.tokens[b : b + 1, 2:3, :length], RESPONSES.lengths[b : b + 1, 2:3])
        np.testing.assert_allclose(apply(params, one, alone)[0, 0], together[b, 2], atol=1e-5)
    assert np.std(together) > 0.1


def test_each_head_of_an_ensemble_is_a_reward_model():
    sizes, members = CONFIG.architecture(V), 3
    single, ensemble = reward.RewardModel(sizes), reward.RewardEnsemble(sizes, members=members)
    params = jax.jit(single.init)(KEYS[3], PROMPTS, RESPONSES)["params"]
    kernel, bias = jax.random.normal(KEYS[0], (CONFIG.width, members)), jnp.arange(members, dtype=jnp.float32)
    heads = {"params": {"trunk": params["trunk"], "heads": {"kernel": kernel, "bias": bias}}}
    together = jax.jit(reward.reward_apply(ensemble))(heads, PROMPTS, RESPONSES)
    apply = jax.jit(reward.reward_apply(single))
    for member in range(members):
        head = {"kernel": kernel[:, member : member + 1], "bias": bias[member : member + 1]}
        alone = apply({"params": params | {"head": head}}, PROMPTS, RESPONSES)
        np.testing.assert_allclose(together[..., member], alone, atol=1e-5)


def test_padding_changes_no_gradient():
    model, params = build()
    mask = length_mask(RESPONSES.lengths, T)

    def loss(params, prompts, responses):
        law = jax.nn.log_softmax(model.apply({"params": params}, prompts, responses))
        chosen = jnp.take_along_axis(law, RESPONSES.tokens[..., None], -1)[..., 0]
        return jnp.where(mask, chosen, 0).sum()

    gradient = jax.jit(jax.grad(loss))
    clean = gradient(params, PROMPTS, RESPONSES)
    garbage = jnp.where(length_mask(LENGTHS, SIZE), PROMPTS.tokens, (PROMPTS.tokens + 5) % V)
    responses = Responses(jnp.where(mask, RESPONSES.tokens, (RESPONSES.tokens + 2) % V), RESPONSES.lengths)
    other = gradient(params, Prompts(garbage, LENGTHS, PROMPTS.ids), responses)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), clean, other)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(clean))


def test_sharded_is_single_device(mesh):
    model, params = build()

    def loss(params, prompts, responses, axis_name=None):
        mean = jnp.tanh(model.apply({"params": params}, prompts, responses)).sum()
        return mean if axis_name is None else jax.lax.psum(mean, axis_name)

    single = jax.jit(jax.value_and_grad(loss))(params, PROMPTS, RESPONSES)
    mapped = jax.shard_map(
        lambda *arguments: jax.value_and_grad(loss)(*arguments, "data"),
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P(), P()),
    )
    sharded = jax.jit(mapped)(params, PROMPTS, RESPONSES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), sharded, single)


def test_an_adapter_is_the_merged_weights_and_starts_as_none():
    settings = Lora(rank=3, alpha=5.0, targets=("q_proj", "v_proj", "down_proj"))
    _, params = build()
    model = decoder.Decoder(CONFIG.architecture(V), settings)
    apply = jax.jit(model.apply)
    adapters = lora.init(params, settings, KEYS[1])
    plain = apply({"params": params}, PROMPTS, RESPONSES)
    np.testing.assert_array_equal(apply({"params": params, "lora": adapters}, PROMPTS, RESPONSES), plain)

    adapters = jax.tree.map(lambda x: x + 0.3, adapters)
    adapted = apply({"params": params, "lora": adapters}, PROMPTS, RESPONSES)
    assert jnp.abs(adapted - plain).max() > 0.1
    merged = lora.merge(params, adapters, settings)
    np.testing.assert_allclose(apply({"params": merged}, PROMPTS, RESPONSES), adapted, atol=2e-4)
    kernel, adapter = params["layers_1"]["v_proj"]["kernel"], adapters["layers_1"]["v_proj"]
    np.testing.assert_allclose(
        merged["layers_1"]["v_proj"]["kernel"], kernel + 5 / 3 * adapter["a"] @ adapter["b"], atol=1e-6
    )
    assert merged["layers_1"]["k_proj"] is params["layers_1"]["k_proj"]


def test_what_was_trained_lies_over_what_was_frozen():
    frozen = {"params": {"trunk": {"x": 1}, "head": {"y": 2}}}
    trained = {"params": {"head": {"y": 3}}, "lora": {"trunk": {"a": 4}}}
    expected = {"params": {"trunk": {"x": 1}, "head": {"y": 3}}, "lora": {"trunk": {"a": 4}}}
    assert lora.overlay(frozen, trained) == expected
    assert lora.overlay({}, trained) == trained


def test_a_rematerialised_decoder_has_the_same_parameters_values_and_gradients():
    plain, params = build()
    again = decoder.Decoder(plain.architecture, rematerialize=True)

    def loss(model):
        return jax.jit(
            jax.value_and_grad(lambda params: jnp.sin(model.apply({"params": params}, PROMPTS, RESPONSES)).sum())
        )

    (value, gradient), (other_value, other_gradient) = loss(plain)(params), loss(again)(params)
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    for (path, expected), found in zip(
        jax.tree.leaves_with_path(gradient), jax.tree.leaves(other_gradient), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_a_bfloat16_model_are_not_rounded_to_it(tied):
    sizes = dataclasses.replace(CONFIG, tied_embeddings=tied, dtype="bfloat16").architecture(V)
    model = decoder.Decoder(sizes)
    variables = jax.jit(model.init)(KEYS[3], PROMPTS, RESPONSES)
    logits = jax.jit(model.apply)(variables, PROMPTS, RESPONSES)
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradients_of_logits_are_products_in_the_model_s_own_type(dtype):
    features, kernel, cotangent = (
        jax.random.normal(key, shape) for key, shape in zip(KEYS[:3], [(2, 3, 8), (8, 16), (2, 3, 16)], strict=True)
    )
    given = features.astype(dtype), kernel.astype(dtype)
    logits, pull = jax.vjp(decoder.exact_product, *given)
    gradients = pull(cotangent)
    assert logits.dtype == jnp.float32
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
    expected = cotangent @ kernel.T, jnp.einsum("abd,abv->dv", features, cotangent)
    for found, wanted in zip((logits, *gradients), (features @ kernel, *expected), strict=True):
        np.testing.assert_allclose(
            found, wanted, rtol=1e-5 if dtype == "float32" else 3e-2, atol=1e-5 if dtype == "float32" else 5e-2
        )
    products = [
        equation for equation in jax.make_jaxpr(pull)(cotangent).eqns if equation.primitive is jax.lax.dot_general_p
    ]
    assert len(products) == 2
    assert all(operand.aval.dtype == dtype for product in products for operand in product.invars)
