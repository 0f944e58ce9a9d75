import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import stats

from ctrl_jax.errors import InputError
from ctrl_jax.steps import win_rate as step
from ctrl_jax.steps.calibration import calibrate
from ctrl_jax.steps.win_rate import Interval, share_of_ties
from ctrl_jax.theory.procedures import BestOfN, Sampling, SoftBestOfN, WorstOfN

# Jitted, as the jobs run them: far fewer compilations than operation by operation.
win_rate = jax.jit(step.win_rate, static_argnums=(2, 3))
judged_win_rate = jax.jit(step.judged_win_rate, static_argnums=(4, 5))
interval = jax.jit(step.interval, static_argnames=("resamples", "level", "bounds"))


def normal(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def uniform(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).uniform(size=shape), jnp.float32)


def soft_picks(temperature):
    """The scores of a subset with the probability that soft best-of-N picks each."""

    def picks(subset):
        weights = np.exp(np.arange(len(subset)) / (len(subset) - 1) / temperature)
        return list(zip(sorted(subset), weights / weights.sum(), strict=True))

    return picks


pytestmark = pytest.mark.usefixtures("compile_fast")

PROCEDURES = [
    (Sampling(), lambda subset: [(subset[0], 1.0)]),
    (BestOfN(1), lambda subset: [(subset[0], 1.0)]),
    (BestOfN(2), lambda subset: [(max(subset), 1.0)]),
    (BestOfN(4), lambda subset: [(max(subset), 1.0)]),
    (WorstOfN(3), lambda subset: [(min(subset), 1.0)]),
    (SoftBestOfN(3, 0.4), soft_picks(0.4)),
]


def brute_force(policy, reference, procedure, picks):
    """Runs the procedure on every subset of both sides."""

    def picked(scores):
        subsets = list(itertools.combinations(scores, procedure.num_samples))
        return [(score, p / len(subsets)) for subset in subsets for score, p in picks(subset)]

    return sum(p * q * ((a > b) + 0.5 * (a == b)) for a, p in picked(policy) for b, q in picked(reference))


@pytest.mark.parametrize(("procedure", "picks"), PROCEDURES, ids=[str(p) for p, _ in PROCEDURES])
def test_it_is_the_mean_over_all_subsets(procedure, picks):
    rng = np.random.default_rng(0)
    # Two prompts without ties, one with many, within and between the sides, and one of ties only.
    policy, reference = rng.normal(0.3, 1, (4, 6)), rng.normal(size=(4, 7))
    policy[2], reference[2] = rng.integers(0, 3, 6), rng.integers(0, 3, 7)
    policy[3], reference[3] = 1, 1
    actual = win_rate(jnp.array(policy), jnp.array(reference), procedure)
    expected = [brute_force(*rows, procedure, picks) for rows in zip(policy, reference, strict=True)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    np.testing.assert_allclose(actual[3], 0.5, rtol=1e-6)


def brute_force_judged(policy, reference, procedure, picks):
    """Runs the procedure by the scores on every subset of both sides of (score, judged), and compares the judged."""

    def picked(pairs):
        subsets = list(itertools.combinations(pairs, procedure.num_samples))
        found = []
        for subset in subsets:
            for score, p in picks([score for score, _ in subset]):
                tied = [judged for own, judged in subset if own == score]
                found += [(judged, p / len(tied) / len(subsets)) for judged in tied]
        return found

    return sum(p * q * ((a > b) + 0.5 * (a == b)) for a, p in picked(policy) for b, q in picked(reference))


@pytest.mark.parametrize(("procedure", "picks"), PROCEDURES[2:], ids=[str(p) for p, _ in PROCEDURES[2:]])
def test_another_judge_compares_what_the_scores_select(procedure, picks):
    rng = np.random.default_rng(1)
    policy, reference = rng.normal(size=(3, 6)), rng.normal(size=(3, 7))
    # The judge loves what the scores hate, prompt by prompt somewhat less; its values tie, and some scores do.
    policy_judged, reference_judged = (-policy).round(1), rng.normal(size=(3, 7)).round(1)
    policy_judged[1], reference_judged[1] = rng.integers(0, 3, 6), rng.integers(0, 3, 7)
    policy[2, :3] = policy[2, 0] if "soft" not in str(procedure) else policy[2, :3]
    arrays = (policy, reference, policy_judged, reference_judged)
    actual = judged_win_rate(*map(jnp.array, arrays), procedure)
    expected = [
        brute_force_judged(list(zip(a, g, strict=True)), list(zip(b, h, strict=True)), procedure, picks)
        for a, b, g, h in zip(*arrays, strict=True)
    ]
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_the_sides_may_be_decoded_otherwise():
    """The best of 3 against the worst of 2, over all pairs of subsets; the judge says the contrary of the scores."""
    policy, reference = normal(2, 5), normal(2, 4, seed=1).at[0, 0].set(0.25)
    policy = policy.at[0, 2].set(0.25)
    expected, judged = [], []
    for ours, theirs in zip(policy.tolist(), reference.tolist(), strict=True):
        pairs = [
            (max(first), min(second))
            for first in itertools.combinations(ours, 3)
            for second in itertools.combinations(theirs, 2)
        ]
        expected.append(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))
        judged.append(np.mean([(a < b) + 0.5 * (a == b) for a, b in pairs]))
    np.testing.assert_allclose(win_rate(policy, reference, BestOfN(3), WorstOfN(2)), expected, atol=1e-6)
    found = judged_win_rate(policy, reference, -policy, -reference, BestOfN(3), WorstOfN(2))
    np.testing.assert_allclose(found, judged, atol=1e-6)
    with pytest.raises(InputError, match="needs 5 samples a prompt, but the reference has 4"):
        step.win_rate(policy, reference, BestOfN(3), WorstOfN(5))


@pytest.mark.parametrize("procedure", [Sampling(), BestOfN(4), WorstOfN(3), SoftBestOfN(3, 0.4)], ids=str)
def test_a_judge_that_is_the_score_gives_the_win_rate(procedure):
    policy, reference = normal(5, 8).round(1), normal(5, 9, seed=1).round(1)
    judged = judged_win_rate(policy, reference, 2 * policy, 2 * reference, procedure)
    np.testing.assert_allclose(judged, win_rate(policy, reference, procedure), atol=2e-6)


def test_a_policy_that_only_exploits_its_score_does_not_win_by_another_judge():
    # Its best response by the score is its worst by the judge; on average it is the reference's equal.
    policy, reference, judged = normal(1, 8), normal(1, 8, seed=1), jnp.arange(8.0)[None]
    worst_first = judged[:, jnp.argsort(jnp.argsort(-policy[0]))]
    same = judged[:, jnp.argsort(jnp.argsort(reference[0]))]
    assert float(judged_win_rate(policy, reference, worst_first, same, BestOfN(4))[0]) < 0.1
    assert float(judged_win_rate(policy, reference, worst_first, same, Sampling())[0]) == pytest.approx(0.5, abs=1e-6)


def test_best_of_one_is_sampling_is_the_mean_calibrated_score():
    policy = normal(5, 8).round(1)
    reference = normal(5, 9, seed=1).round(1)
    sampling = win_rate(policy, reference, Sampling())
    np.testing.assert_allclose(sampling, win_rate(policy, reference, BestOfN(1)), rtol=1e-6)
    np.testing.assert_allclose(sampling, win_rate(policy, reference, WorstOfN(1)), rtol=1e-6)
    np.testing.assert_allclose(sampling, calibrate(policy, reference).mean(-1), rtol=1e-6)


@pytest.mark.parametrize("procedure", [Sampling(), BestOfN(4), WorstOfN(4), SoftBestOfN(4, 0.3)], ids=str)
def test_the_same_samples_on_both_sides_draw_and_changing_sides_mirrors(procedure):
    policy = normal(5, 8).round(1)
    reference = normal(5, 9, seed=1).round(1)
    np.testing.assert_allclose(win_rate(policy, policy, procedure), 0.5, atol=1e-6)
    np.testing.assert_allclose(
        win_rate(policy, reference, procedure) + win_rate(reference, policy, procedure), 1, atol=1e-6
    )


def test_best_mirrors_worst_of_the_negated_scores():
    policy, reference = normal(2, 5, 8)
    np.testing.assert_allclose(
        win_rate(policy, reference, BestOfN(3)), 1 - win_rate(-policy, -reference, WorstOfN(3)), atol=1e-6
    )


def test_using_all_samples_compares_the_extremes():
    policy, reference = normal(2, 50, 8)
    np.testing.assert_array_equal(win_rate(policy, reference, BestOfN(8)), policy.max(-1) > reference.max(-1))
    np.testing.assert_array_equal(win_rate(policy, reference, WorstOfN(8)), policy.min(-1) > reference.min(-1))


@pytest.mark.parametrize(("procedure", "expected"), [(Sampling(), 3 / 4), (BestOfN(4), 3 / 4)], ids=str)
def test_it_is_unbiased(procedure, expected):
    # The policy's ranks have CDF u³: the best of 4 of it wins with 1 − 4 ∫ u¹² u³ du = 3/4 (and one sample too).
    policy = uniform(20_000, 6) ** (1 / 3)
    reference = uniform(20_000, 5, seed=1)
    rates = np.asarray(win_rate(policy, reference, procedure))
    assert abs(rates.mean() - expected) < 4 * rates.std() / np.sqrt(len(rates))
    assert rates.std() / np.sqrt(len(rates)) < 3e-3


@pytest.mark.parametrize(("shapes", "side"), [(((2, 3), (2, 8)), "policy"), (((2, 8), (2, 3)), "reference")])
def test_too_few_samples_are_refused_with_both_numbers(shapes, side):
    with pytest.raises(InputError, match=rf"best_of_4 needs 4 samples a prompt, but the {side} has 3"):
        win_rate(jnp.ones(shapes[0]), jnp.ones(shapes[1]), BestOfN(4))


def test_prompts_must_agree():
    with pytest.raises(AssertionError):
        win_rate(jnp.ones((2, 4)), jnp.ones((3, 4)), Sampling())


def test_nan_shows_and_only_in_its_prompt():
    scores = jnp.array([[1.0, 2.0], [1.0, jnp.nan], [1.0, 2.0]])
    reference = jnp.array([[0.0, 3.0], [0.0, 3.0], [jnp.nan, 3.0]])
    np.testing.assert_array_equal(win_rate(scores, reference, BestOfN(2)), [0, np.nan, np.nan])


def test_share_of_ties_is_over_all_pairs():
    rng = np.random.default_rng(0)
    policy, reference = rng.integers(0, 4, (5, 6)), rng.integers(0, 4, (5, 9))
    expected = (policy[:, :, None] == reference[:, None, :]).mean((1, 2))
    np.testing.assert_allclose(share_of_ties(jnp.array(policy), jnp.array(reference)), expected, rtol=1e-6)


def test_sharded_equals_single_device(mesh):
    policy, reference = normal(2, 16, 8)

    def both(policy, reference):
        return win_rate(policy, reference, BestOfN(4)), share_of_ties(policy, reference)

    sharded = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(policy, reference)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sharded, both(policy, reference))
    # Over prompts, the interval is one for all devices, from prompts spread over them.
    key = jax.random.key(0)
    np.testing.assert_allclose(interval(sharded[0], key), interval(both(policy, reference)[0], key), rtol=1e-5)


def test_the_interval_has_the_width_of_the_normal_one():
    x = uniform(400, seed=1)
    mean, low, high = interval(x, jax.random.key(0), resamples=4000, level=0.9)
    np.testing.assert_allclose(mean, np.mean(x), rtol=1e-6)
    np.testing.assert_allclose([mean - low, high - mean], 1.645 * np.std(x) / 20, rtol=0.1)


@pytest.mark.parametrize(("size", "nearly"), [(5, 0.93), (20, 0.945), (256, 0.945)])
def test_the_interval_covers_the_true_mean(size, nearly):
    """Of win rates that are skewed towards 1. Percentiles of the bootstrap cover .81 of 5 prompts, and .92 of 20."""
    trials, law = 400, (8.0, 1.5)
    per_prompt = jnp.asarray(np.random.default_rng(size).beta(*law, (trials, size)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), trials)
    _, low, high = jax.jit(
        lambda keys, x: jax.lax.map(lambda each: step.interval(each[1], each[0], resamples=300), (keys, x))
    )(keys, per_prompt)
    covered = int(np.sum((low <= law[0] / sum(law)) & (law[0] / sum(law) <= high)))
    # Binomial limits that chance passes once in a thousand times.
    assert stats.binom.ppf(1e-3, trials, nearly) <= covered <= stats.binom.ppf(1 - 1e-3, trials, 0.96)


def test_the_interval_follows_the_skew():
    # The mean of prompts of which one in twenty loses is more uncertain below than above.
    mean, low, high = interval(jnp.asarray([0.2] * 5 + [1.0] * 95), jax.random.key(0))
    assert mean - low > 1.3 * (high - mean) > 0


def test_one_prompt_that_differs_does_not_make_the_interval_infinite():
    # A resample in three has none of it, and a standard deviation of 0.
    per_prompt = jnp.ones(256).at[3].set(0.5)
    mean, low, high = interval(per_prompt, jax.random.key(0))
    assert 1 - 10 / 256 < low < mean < high < 1 + 2 / 256
    assert interval(per_prompt, jax.random.key(0), bounds=(0.0, 1.0)) == Interval(mean, low, 1.0)


@pytest.mark.parametrize(
    "per_prompt",
    [[0.146], [0.0, 1.0], [0.2, 0.5, 0.4, 0.9], [1.0] * 256, [0.1] * 7],
    ids=["one", "two", "four", "all won", "all alike"],
)
def test_there_is_no_interval_of_too_few_prompts_nor_of_equal_ones(per_prompt):
    mean, low, high = interval(jnp.asarray(per_prompt), jax.random.key(0))
    assert mean == pytest.approx(np.mean(per_prompt), rel=1e-6)
    assert np.isnan(low) and np.isnan(high)


@pytest.mark.parametrize("seed", range(20))
def test_the_mean_is_inside(seed):
    per_prompt = jnp.asarray(np.random.default_rng(seed).integers(0, 2, 5), jnp.float32).at[0].set(0.5)
    mean, low, high = interval(per_prompt, jax.random.key(seed), resamples=100)
    assert low <= mean <= high


def test_a_nan_among_the_prompts_shows():
    assert np.isnan(interval(jnp.asarray([0.1, 0.2, np.nan, 0.3, 0.4, 0.5]), jax.random.key(0))).all()


def test_bad_intervals_are_refused():
    with pytest.raises(InputError, match="0 prompts"):
        interval(jnp.zeros(0), jax.random.key(0))
    with pytest.raises(InputError, match="level of an interval is 95"):
        interval(jnp.zeros(3), jax.random.key(0), level=95)
    with pytest.raises(InputError, match="interval of 1 resamples was asked for; take at least 100"):
        interval(jnp.zeros(3), jax.random.key(0), resamples=1)
