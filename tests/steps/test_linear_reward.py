import numpy as np
import pytest
from scipy import optimize

from ctrl_jax.steps import linear_reward

PAIRS, WIDTH = 200, 6


def data(seed: int = 0, *, pairs: int = PAIRS, width: int = WIDTH, scale: float = 2.0) -> np.ndarray:
    """Differences [n, D] of features, labelled by the Bradley-Terry law of a linear reward."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(pairs, width))
    margin = x @ (scale * random.normal(size=width))
    return x * np.where(random.uniform(size=pairs) < 1 / (1 + np.exp(-margin)), 1, -1)[:, None]


def gradient(w: np.ndarray, x: np.ndarray, strength: float, counts: np.ndarray) -> np.ndarray:
    """Of the formula in the module, term by term."""
    terms = [-c * row / (1 + np.exp(w @ row)) for c, row in zip(counts, x, strict=True)]
    return np.sum(terms, axis=0) / np.sum(counts) + strength * w


@pytest.mark.parametrize("strength", linear_reward.STRENGTHS)
@pytest.mark.parametrize("seed", [None, 1])
def test_at_the_optimum_the_gradient_is_zero(strength, seed):
    """L is convex: this is all there is to say of its minimum."""
    x, counts = data(), np.ones(PAIRS) if seed is None else np.random.default_rng(seed).poisson(1, PAIRS)
    found = linear_reward.fit(x, strength, None if seed is None else counts)
    assert np.abs(gradient(found, x, strength, counts)).max() < 1e-6
    assert np.abs(found).max() > 1e-3


def test_one_feature_has_a_closed_form():
    """Of 100 pairs with the difference 1, 80 that way round: σ(w) = .8 without a penalty."""
    x = np.repeat([[1.0], [-1.0]], [80, 20], axis=0)
    np.testing.assert_allclose(linear_reward.fit(x, 1e-12), np.log(4), rtol=1e-5)


def test_a_pair_that_is_drawn_twice_counts_twice():
    x = data()
    counts = np.arange(PAIRS) % 3
    np.testing.assert_allclose(
        linear_reward.fit(x, 0.1, counts), linear_reward.fit(np.repeat(x, counts, axis=0), 0.1), atol=1e-6
    )


def test_where_the_search_starts_does_not_matter():
    x = data()
    np.testing.assert_allclose(
        linear_reward.fit(x, 0.03, start=np.full(WIDTH, 5.0)), linear_reward.fit(x, 0.03), atol=1e-5
    )


def test_the_strength_is_the_best_of_cross_validation_by_its_definition():
    x, ids = data(3, pairs=60, scale=0.5), np.random.default_rng(0).permutation(60) // 2
    fold = np.searchsorted(np.unique(ids), ids) % linear_reward.FOLDS
    losses, accuracies = [], []
    for strength in linear_reward.STRENGTHS:
        margins = np.empty(60)
        for held_out in range(linear_reward.FOLDS):
            train = x[fold != held_out]

            def loss(w, train=train, strength=strength):
                return np.log1p(np.exp(-train @ w)).mean() + strength / 2 * w @ w

            margins[fold == held_out] = x[fold == held_out] @ optimize.minimize(loss, np.zeros(WIDTH)).x
        losses.append(np.log1p(np.exp(-margins)).mean())
        accuracies.append(np.mean(margins > 0))
    best = int(np.argmin(losses))
    found = linear_reward.choose(x, ids)
    assert found.strength == linear_reward.STRENGTHS[best] and 0 < best < len(losses) - 1
    np.testing.assert_allclose([found.loss, found.accuracy], [losses[best], accuracies[best]], atol=1e-4)


def test_pairs_of_one_prompt_do_not_judge_each_other():
    """Each prompt has a feature of its own that says all of its pairs: what is learned of it helps no other prompt."""
    ids = np.repeat(np.arange(40), 4)
    sides = np.random.default_rng(0).choice([-1.0, 1.0], size=40)
    x = np.eye(40)[ids] * sides[ids][:, None]
    found = linear_reward.choose(x, ids)
    assert found.accuracy == 0.5 and found.loss == pytest.approx(np.log(2))


def test_a_feature_that_never_changes_has_no_weight():
    features = np.random.default_rng(0).normal(size=(30, 2, 3))
    features[..., 1] = 7
    spread = linear_reward.spread(features)
    np.testing.assert_allclose(spread[[0, 2]], features[..., [0, 2]].reshape(-1, 2).std(axis=0))
    x = (features[:, 0] - features[:, 1]) / spread
    assert linear_reward.fit(x, 0.1)[1] == 0


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="Pairs of 9 prompts were given; cross-validation needs 10"):
        linear_reward.choose(data(pairs=18), np.arange(18) // 2)
