import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.devices.mesh import make_mesh, shard
from ctrl_jax.devices.programs import batch_spec, reader
from ctrl_jax.steps import probe
from ctrl_jax.steps.rank_correlation import spearman
from ctrl_jax.types import Prompts, Responses
from tests.steps import fakes

PROMPTS, SAMPLES, WIDTH = 40, 8, 12


def data(*, noise: float, seed: int = 0, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Features, and ranks that are a linear map of them but for noise. Each prompt has an offset of its own."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(PROMPTS, SAMPLES, width)) + 30 * random.normal(size=(PROMPTS, 1, width))
    weights = random.normal(size=width) / np.sqrt(width)
    signal = features @ weights + 20 * random.normal(size=(PROMPTS, 1))
    return features.astype(np.float32), signal + noise * random.normal(size=(PROMPTS, SAMPLES))


def correlation(features: np.ndarray, ranks: np.ndarray) -> float:
    found = probe.held_out_ranks(features, ranks)
    return float(np.mean(spearman(jnp.asarray(found, jnp.float32), jnp.asarray(ranks, jnp.float32))))


def test_what_the_features_hold_is_found_on_prompts_that_were_not_fitted():
    assert correlation(*data(noise=0.0)) > 0.97


@pytest.mark.parametrize("noise", [1.0, 2.0, 4.0])
def test_noise_lowers_it_to_what_is_left_of_the_signal(noise):
    """Pearson's r of signal and rank is 1 / √(1 + noise²); Spearman's of a normal law is (6 / π) asin(r / 2)."""
    features, ranks = data(noise=noise, seed=1)
    expected = 6 / np.pi * np.arcsin(1 / np.sqrt(1 + noise**2) / 2)
    # Of 40 prompts × 8 responses the standard error is about 1 / √(40 × 7) = .06; what is fitted is not exact either.
    assert abs(correlation(features, ranks) - expected) < 0.17


def test_of_noise_alone_it_is_nothing():
    found = []
    for seed in range(6):
        features, _ = data(noise=0.0, seed=seed)
        found.append(correlation(features, np.random.default_rng(100 + seed).uniform(size=(PROMPTS, SAMPLES))))
    assert abs(np.mean(found)) < 0.08


def test_a_ridge_keeps_many_features_from_learning_by_heart():
    """As many features as responses, of which a few count: without a ridge, noise would be fitted."""
    random = np.random.default_rng(0)
    features = random.normal(size=(PROMPTS, SAMPLES, 320)).astype(np.float32)
    ranks = features[..., :4].sum(axis=-1) + random.normal(size=(PROMPTS, SAMPLES))
    assert correlation(features, ranks) > 0.2


def test_it_is_ridge_regression_by_its_definition(monkeypatch):
    """With one strength there is nothing to choose, and each fold has a closed form."""
    monkeypatch.setattr(probe, "STRENGTHS", (0.5,))
    features, ranks = data(noise=1.0, seed=3)
    x = features.astype(np.float64) - features.astype(np.float64).mean(axis=1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=(0, 1))) / np.sqrt(WIDTH)
    y = ranks - ranks.mean(axis=1, keepdims=True)
    expected = np.zeros_like(y)
    for fold in range(probe.FOLDS):
        out = np.arange(PROMPTS) % probe.FOLDS == fold
        rows, target = x[~out].reshape(-1, WIDTH), y[~out].reshape(-1)
        gram = rows.T @ rows
        strength = 0.5 * np.trace(gram) / len(rows)  # of the mean of its eigenvalues, most of which are 0
        expected[out] = x[out] @ np.linalg.solve(gram + strength * np.eye(WIDTH), rows.T @ target)
    np.testing.assert_allclose(probe.held_out_ranks(features, ranks), expected, atol=1e-8)


def test_the_strength_is_chosen_without_the_prompts_that_are_predicted():
    """Other ranks of the prompts of a fold change the predictions of the others, not theirs."""
    features, ranks = data(noise=1.0, seed=4)
    fold = np.arange(PROMPTS) % probe.FOLDS == 2
    other = np.where(fold[:, None], np.random.default_rng(9).normal(size=ranks.shape), ranks)
    before, after = probe.held_out_ranks(features, ranks), probe.held_out_ranks(features, other)
    np.testing.assert_allclose(before[fold], after[fold], atol=1e-9)
    assert np.abs(before[~fold] - after[~fold]).max() > 1e-3


def test_a_prompts_offset_and_a_features_scale_do_not_count():
    features, ranks = data(noise=1.0, seed=5)
    scale = 10.0 ** np.arange(-3, WIDTH - 3)
    changed = (features.astype(np.float64) - features.mean(axis=1, keepdims=True, dtype=np.float64)) * scale
    shifted = ranks + np.arange(PROMPTS)[:, None]
    np.testing.assert_allclose(probe.held_out_ranks(changed, shifted), probe.held_out_ranks(features, ranks), atol=1e-5)


def test_a_feature_that_never_differs_and_ranks_that_are_all_equal_are_no_error():
    features, ranks = data(noise=1.0)
    with_constant = np.concatenate([features, np.ones((PROMPTS, SAMPLES, 3))], axis=-1)
    np.testing.assert_allclose(
        probe.held_out_ranks(with_constant, ranks), probe.held_out_ranks(features, ranks), atol=1e-9
    )
    np.testing.assert_array_equal(probe.held_out_ranks(features, np.ones_like(ranks)), np.zeros_like(ranks))
    np.testing.assert_array_equal(probe.held_out_ranks(0 * features, ranks), np.zeros_like(ranks))


def test_too_few_prompts_are_refused():
    features, ranks = data(noise=1.0)
    with pytest.raises(ValueError, match="9 prompts"):
        probe.held_out_ranks(features[:9], ranks[:9])


# The features.


def above(params: jax.Array, below: jax.Array, prompts: Prompts, responses: Responses) -> jax.Array:
    """Features [B, N, T, 3] that tell position, token and prompt apart."""
    tokens = responses.tokens
    position = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
    ids = jnp.broadcast_to((prompts.ids % 7)[:, None, None], tokens.shape)
    return params * jnp.stack([position, tokens, ids], axis=-1).astype(jnp.float32)


POLICY = fakes.policy._replace(above=above)
TOKENS = np.random.default_rng(0).integers(0, 9, size=(8, 3, 5)).astype(np.int32)
LENGTHS = np.random.default_rng(1).integers(1, 6, size=(8, 3)).astype(np.int32)
ASKED = Prompts(np.zeros((8, 2), np.int32), np.ones(8, np.int32), np.arange(8, dtype=np.uint32))
PARAMS = jnp.array(2.0)


def pooled(tokens: np.ndarray) -> np.ndarray:
    features = jax.jit(lambda *batch: probe.pooled_features(POLICY, PARAMS, *batch))
    return np.asarray(features(ASKED, Responses(tokens, LENGTHS)))


def test_pooled_features_are_the_mean_over_real_tokens():
    expected = np.zeros((8, 3, 3))
    for b in range(8):
        for n in range(3):
            for t in range(LENGTHS[b, n]):
                expected[b, n] += 2 * np.array([t, TOKENS[b, n, t], b % 7]) / LENGTHS[b, n]
    np.testing.assert_allclose(pooled(TOKENS), expected, rtol=1e-6)


def test_what_lies_behind_a_response_does_not_count():
    padding = np.arange(5) >= LENGTHS[..., None]
    assert padding.any()
    np.testing.assert_array_equal(pooled(np.where(padding, 5, TOKENS)), pooled(np.where(padding, 8, TOKENS)))


def test_shards_are_the_whole():
    mesh = make_mesh(8)
    batch = batch_spec(mesh)
    program = reader(mesh, lambda *each: probe.pooled_features(POLICY, *each), (batch, batch), batch)
    found = program(PARAMS, *shard(mesh, (ASKED, Responses(TOKENS, LENGTHS))))
    np.testing.assert_allclose(found, pooled(TOKENS), rtol=1e-6)
