"""The critic by its definition: a term at a time, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.steps import critic

B, N, T, D = 3, 4, 5, 6
RANDOM = np.random.default_rng(0)
LENGTHS = RANDOM.integers(1, T + 1, (B, N)).astype(np.int32)
LENGTHS[0, 0] = T
FEATURES = RANDOM.normal(size=(B, N, T, D)).astype(np.float32)
VALUES, REWARDS = RANDOM.normal(size=(B, N, T)).astype(np.float32), RANDOM.normal(size=(B, N)).astype(np.float32)
BEHIND = np.arange(T) >= LENGTHS[..., None]


def centred(x: np.ndarray) -> np.ndarray:
    """Each response's less the mean of the others of its prompt."""
    return np.stack([x[:, i] - np.delete(x, i, axis=1).mean(axis=1) for i in range(x.shape[1])], axis=1)


@pytest.mark.parametrize("trace", [0.0, 0.6, 1.0])
def test_advantages_are_the_sum_of_changes(trace):
    found = np.asarray(critic.advantages(VALUES, REWARDS, LENGTHS, trace=trace))
    for b, n, t in np.ndindex(B, N, T):
        length = int(LENGTHS[b, n])
        states = [*VALUES[b, n, :length], REWARDS[b, n]]
        expected = sum(trace ** (s - t) * (states[s + 1] - states[s]) for s in range(t, length))
        np.testing.assert_allclose(found[b, n, t], expected, atol=1e-5)


def test_with_a_whole_trace_they_are_the_reward_less_the_value():
    found = np.asarray(critic.advantages(VALUES, REWARDS, LENGTHS, trace=1.0))
    np.testing.assert_allclose(found[~BEHIND], (REWARDS[..., None] - VALUES)[~BEHIND], atol=1e-5)


def test_a_prefix_is_what_its_tokens_states_sum_to():
    found = np.asarray(critic.prefixes(jnp.asarray(FEATURES), LENGTHS))
    sums = np.zeros((B, N, T, D))
    for b, n, t in np.ndindex(B, N, T):
        for s in range(1, min(t, LENGTHS[b, n]) + 1):
            sums[b, n, t] += FEATURES[b, n, s] / T
    np.testing.assert_allclose(found, centred(sums), atol=1e-6)
    assert (found[:, :, 0] == 0).all()


def test_the_powers_are_of_the_rank_and_of_the_place():
    ranks = 0.3 * VALUES
    found = np.asarray(critic.powers(jnp.asarray(ranks), LENGTHS))
    expected = np.zeros((B, N, T, critic.POWERS))
    for b, n, t in np.ndindex(B, N, T):
        u, time = ranks[b, n, t], min(t, LENGTHS[b, n]) / T
        expected[b, n, t] = [u, u**2, u**3, u * time, u**2 * time, u**3 * time]
    np.testing.assert_allclose(found, centred(expected), atol=1e-6)


def test_what_stands_behind_a_response_does_not_count():
    """But for the state that has read its last token, where there is one."""
    behind = np.arange(T) > LENGTHS[..., None]
    assert behind.any()
    other = np.where(behind[..., None], np.nan, FEATURES)
    np.testing.assert_array_equal(critic.prefixes(other, LENGTHS), critic.prefixes(FEATURES, LENGTHS))
    values = np.where(BEHIND, np.nan, VALUES)
    for trace in (0.5, 1.0):
        changed, before = (critic.advantages(x, REWARDS, LENGTHS, trace=trace) for x in (values, VALUES))
        np.testing.assert_array_equal(changed, before)
    changed, before = (critic.sums(np.where(BEHIND[..., None], x, FEATURES), REWARDS, LENGTHS) for x in (1e3, FEATURES))
    for one, another in zip(changed, before, strict=True):
        np.testing.assert_allclose(one.value, another.value, rtol=1e-6)


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(B, N, T, D)) * np.arange(1, D + 1)
    return x.astype(np.float32), (x[:, :, -1] @ random.normal(size=D)).astype(np.float32)


def test_a_regression_is_ridge_regression_on_all_batches_the_older_the_less():
    """As one least-squares problem: a row a token, weighed by 1 / length and by its age, and D rows for the penalty."""
    penalty, forget, found = 3.0, 0.7, critic.empty(D)
    rows, targets = [], []
    for age, seed in ((2, 1), (1, 2), (0, 3)):
        x, y = batch(seed)
        gram, moment = critic.sums(jnp.asarray(x), jnp.asarray(y), LENGTHS)
        found = critic.learned(found, gram.value, moment.value, B * N, penalty=penalty, forget=forget)
        for b, n in np.ndindex(B, N):
            length, weight = LENGTHS[b, n], np.sqrt(forget**age / LENGTHS[b, n])
            rows += [*(weight * x[b, n, :length])]
            targets += [weight * y[b, n]] * int(length)
    rows, targets = np.array(rows, np.float64), np.array(targets, np.float64)
    count = B * N * (1 + forget + forget**2)
    spread = np.sqrt((rows**2).sum(axis=0) / count)
    penalised = np.vstack([rows, np.sqrt(penalty) * np.diag(spread)])
    expected = np.linalg.lstsq(penalised, np.concatenate([targets, np.zeros(D)]), rcond=None)[0]
    np.testing.assert_allclose(found.weights, expected, rtol=2e-3)
    assert found.count == pytest.approx(count)


def test_of_nothing_it_predicts_nothing_and_a_feature_that_never_changes_has_no_weight():
    x, y = batch(1)
    x[..., 2] = 0
    gram, moment = critic.sums(jnp.asarray(x), jnp.asarray(y), LENGTHS)
    weights = np.asarray(critic.learned(critic.empty(D), gram.value, moment.value, B * N, penalty=1.0).weights)
    assert weights[2] == 0 and np.isfinite(weights).all() and (np.delete(weights, 2) != 0).all()
    assert (critic.empty(D).weights == 0).all()
    none = critic.learned(critic.empty(D), jnp.zeros((D, D)), jnp.zeros(D), B * N, penalty=1.0)
    np.testing.assert_array_equal(none.weights, 0)


def test_sums_of_parts_are_those_of_the_whole():
    x, y = batch(1)
    whole = critic.sums(jnp.asarray(x), jnp.asarray(y), LENGTHS)
    parts = [critic.sums(jnp.asarray(x[b : b + 1]), jnp.asarray(y[b : b + 1]), LENGTHS[b : b + 1]) for b in range(B)]
    joined = jax.tree.map(lambda *found: sum(found), *parts)
    for one, another in zip(joined, whole, strict=True):
        np.testing.assert_allclose(one.value, another.value, rtol=1e-5)
