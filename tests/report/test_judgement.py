"""Judging arrays: every number by enumeration or by the library's own functions, and what cannot be judged."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ctrl_jax as cj
from ctrl_jax.report.judgement import estimates
from ctrl_jax.steps import win_rate
from ctrl_jax.theory.precision import double_precision

pytestmark = pytest.mark.usefixtures("compile_fast")

RANDOM = np.random.default_rng(0)
OURS, THEIRS = RANDOM.normal(0.4, 1, (12, 8)), RANDOM.normal(0, 1, (12, 6))
OUR_GOLD, THEIR_GOLD = OURS + RANDOM.normal(0, 1, OURS.shape), THEIRS + RANDOM.normal(0, 1, THEIRS.shape)


def test_every_number_is_the_librarys_own():
    found = cj.judge(OURS, THEIRS, policy_judged=OUR_GOLD, reference_judged=THEIR_GOLD)
    assert [*found.win_rates] == ["sampling", "best_of_2", "best_of_4", "worst_of_2", "worst_of_4"]
    assert found.win_rates.keys() == found.judge_win_rates.keys()
    for name, one in found.win_rates.items():
        expected = cj.interval(cj.win_rate(OURS, THEIRS, cj.procedure(name)), bounds=(0, 1))
        assert one == pytest.approx(expected, abs=1e-9)
        per_prompt = cj.judged_win_rate(OURS, THEIRS, OUR_GOLD, THEIR_GOLD, cj.procedure(name))
        assert found.judge_win_rates[name] == pytest.approx(cj.interval(per_prompt, bounds=(0, 1)), abs=1e-9)
    ranks = cj.calibrate(OURS, THEIRS).mean(axis=1)
    assert found.calibrated_reward == pytest.approx(cj.interval(ranks, bounds=(0, 1)), abs=1e-9)
    assert (found.prompts, found.samples, found.ties) == (12, (8, 6), 0)


def test_ties_are_counted():
    found = cj.judge([[0, 1], [2, 2]], [[0, 0, 1], [1, 1, 1]], procedures=[cj.best_of(2)])
    assert found.ties == pytest.approx((3 / 6 + 0) / 2)
    # Best of 2: 1 against 0, 1 and 1 of the three pairs on the first prompt, and always on the second.
    assert found.win_rates["best_of_2"].mean == pytest.approx(((1 + 0.5 + 0.5) / 3 + 1) / 2)
    assert found.win_rates["best_of_2"].low is None, "two prompts have no interval"


def test_the_order_of_prompts_and_the_scale_of_rewards_do_not_matter():
    found = cj.judge(OURS, THEIRS)
    order = RANDOM.permutation(len(OURS))
    again = cj.judge(np.exp(OURS[order]), np.exp(THEIRS[order]))
    assert {name: one.mean for name, one in again.win_rates.items()} == pytest.approx(
        {name: one.mean for name, one in found.win_rates.items()}
    )


@pytest.mark.parametrize("count", [1, 3, 5, 40])
def test_many_intervals_at_once_are_those_one_by_one(count):
    values = {
        "skewed": RANDOM.exponential(1, count) / 20,
        "offset": 1e6 + RANDOM.normal(0, 1, count),
        "one differs": np.eye(1, count)[0],
        "equal": np.full(count, 0.5),
    }
    with double_precision():
        bounds = (-1e9, 1e9)
        found = estimates({name: jnp.asarray(one) for name, one in values.items()}, 200, bounds=bounds)
        for name, one in values.items():
            alone = win_rate.interval(jnp.asarray(one), jax.random.key(0), resamples=200, bounds=bounds)
            ends = [np.nan if end is None else end for end in found[name]]
            np.testing.assert_allclose(ends, [float(end) for end in alone], rtol=1e-9, atol=1e-9)


def gold_that_turns(prompts: int = 60, samples: int = 16) -> tuple[np.ndarray, ...]:
    """Gold, and a reward that likes a rare kind of response which gold dislikes: more samples find more of it."""
    random = np.random.default_rng(1)

    def side(shift: float) -> tuple[np.ndarray, np.ndarray]:
        gold = random.normal(shift, 1, (prompts, samples))
        rare = random.random(gold.shape) < 0.05
        return gold + 5 * rare, gold - 4 * rare

    (ours, our_gold), (theirs, their_gold) = side(0.5), side(0)
    return ours, theirs, our_gold, their_gold


def test_best_of_n_against_one_response_is_the_mean_over_subsets():
    found = cj.choose_n(OURS[:5, :4], THEIRS[:5], policy_judged=OUR_GOLD[:5, :4], reference_judged=THEIR_GOLD[:5])
    assert [*found.win_rates] == [*found.judge_win_rates] == [1, 2, 3, 4]
    for n in found.win_rates:
        wins, judged = [], []
        for row in range(5):
            for subset in itertools.combinations(range(4), n):
                pick = max(subset, key=lambda place, row=row: OURS[row, place])
                wins.append(np.mean(OURS[row, pick] > THEIRS[row]))
                judged.append(np.mean(OUR_GOLD[row, pick] > THEIR_GOLD[row]))
        assert found.win_rates[n].mean == pytest.approx(np.mean(wins))
        assert found.judge_win_rates[n].mean == pytest.approx(np.mean(judged))


def per_prompt_judged(n, *arrays):
    with double_precision():
        return np.asarray(win_rate.judged_win_rate(*map(jnp.asarray, arrays), cj.best_of(n), cj.sampling()))


def test_early_stopping_takes_the_first_that_is_as_good_as_the_references_best():
    """Over all orders in which the responses may come, and each response of the reference as the rival, whose other
    responses set the threshold."""
    ours, theirs, our_gold, their_gold = OURS[:6, :4], THEIRS[:6], OUR_GOLD[:6, :4], THEIR_GOLD[:6]
    found = cj.choose_n(ours, theirs, policy_judged=our_gold, reference_judged=their_gold)
    assert [one.share for one in found.early_stops] == [place / 6 for place in (1, 2, 3, 4, 5)]
    orders = [*itertools.permutations(range(4))]
    for one, place in zip(found.early_stops, (1, 2, 3, 4, 5), strict=True):
        draws, wins, judged = [], [], []
        for row, rival, order in itertools.product(range(6), range(6), orders):
            threshold = sorted(np.delete(theirs[row], rival))[-place]
            reached = [k for k in range(4) if ours[row, order[k]] >= threshold]
            taken = order[reached[0]] if reached else int(ours[row].argmax())
            draws.append(reached[0] + 1 if reached else 4)
            wins.append(ours[row, taken] > theirs[row, rival])
            judged.append(our_gold[row, taken] > their_gold[row, rival])
        assert one.draws.mean == pytest.approx(np.mean(draws))
        assert one.win_rate.mean == pytest.approx(np.mean(wins))
        assert one.judge_win_rate.mean == one.deciding.mean == pytest.approx(np.mean(judged))
    assert cj.choose_n(ours, theirs[:, :1]).early_stops == ()


def test_of_those_as_near_to_the_best_as_the_cheapest_n_the_one_with_the_fewest_draws_is_named():
    random = np.random.default_rng(2)
    ours, theirs = random.normal(0.5, 1, (200, 32)), random.normal(0, 1, (200, 32))
    found = cj.choose_n(ours, theirs, within=0.05)
    enough = found.win_rates[found.best].mean - 0.05
    stop = found.early_stop
    assert stop.win_rate.mean >= enough and stop.draws.mean < 0.9 * found.cheapest
    others = [one for one in found.early_stops if one.draws.mean < stop.draws.mean]
    assert others and all(one.win_rate.mean < enough for one in others)
    assert found.as_json()["early_stop"]["draws"]["mean"] == stop.draws.mean
    assert cj.choose_n(ours + 9, theirs).early_stop is None, "of N = 1 nothing is saved"


def test_nothing_turns_down_that_has_no_interval():
    found = cj.choose_n([[3, 0, 2, 1]], [[2.5, 0.5]], policy_judged=[[0, 3, 1, 2]], reference_judged=[[1.5, 1.5]])
    assert found.best == 1 and found.decline.mean > 0 and found.decline.low is None and not found.turns_down


def test_of_equal_win_rates_the_least_n_is_the_best():
    found = cj.choose_n(RANDOM.normal(9, 0.1, (7, 12)), THEIRS[:7])
    assert (found.best, found.cheapest, found.turns_down) == (1, 1, False)


def test_it_turns_down_by_the_judge_and_not_by_the_reward():
    ours, theirs, our_gold, their_gold = gold_that_turns()
    alone = cj.choose_n(ours, theirs)
    assert (alone.best, alone.decline, alone.turns_down) == (16, None, False)
    found = cj.choose_n(ours, theirs, policy_judged=our_gold, reference_judged=their_gold, within=0.05)
    means = {n: one.mean for n, one in found.judge_win_rates.items()}
    assert found.best == max(means, key=means.__getitem__) < 16
    assert found.cheapest == next(n for n in sorted(means) if means[n] >= means[found.best] - 0.05) < found.best
    assert found.turns_down and found.decline.mean == pytest.approx(means[found.best] - means[16])
    # The best of 8 values of N was chosen: an interval of 1 - .05 / 7.
    lost = np.subtract(
        *(per_prompt_judged(found_n, ours, theirs, our_gold, their_gold) for found_n in (found.best, 16))
    )
    expected = cj.interval(lost, level=1 - 0.05 / 7, resamples=1400, bounds=(-1, 1))
    assert len(means) == 8 and found.decline == pytest.approx(expected, abs=1e-9)
    tree = found.as_json()
    assert tree["turns_down"] is True and tree["judge_win_rates"]["4"]["mean"] == means[4]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: cj.judge(OURS, THEIRS[:3]), r"\(12, 8\) and reference_rewards \(3, 6\).*same B prompts"),
        (lambda: cj.judge(OURS[0], THEIRS), r"policy_rewards has shape \(8,\)"),
        (lambda: cj.judge([[1.0, 2.0], [1.0]], THEIRS), "policy_rewards is no array"),
        (lambda: cj.judge(np.where(OURS > 1, np.nan, OURS), THEIRS), r"policy_rewards\[\d+, \d+\] is nan.*both sides"),
        (lambda: cj.judge(OURS, THEIRS, policy_judged=OUR_GOLD), "reference_judged is missing.*of both sides"),
        (lambda: cj.judge(OURS, THEIRS, policy_judged=THEIR_GOLD, reference_judged=THEIR_GOLD), "policy_judged has"),
        (lambda: cj.judge(OURS, THEIRS, procedures=[cj.best_of(7)]), "needs 7 samples a prompt, but the reference has"),
        (lambda: cj.judge(OURS, THEIRS, procedures=["best_of_4"]), "procedures is .*'best_of_4'.*reads names"),
        (lambda: cj.judge(OURS, THEIRS, procedures="best_of_4"), "procedures is 'best_of_4'"),
        (lambda: cj.judge(OURS, THEIRS, procedures=cj.best_of(2)), "give a list of procedures"),
        (lambda: cj.choose_n(OURS, THEIRS, within=1.0), "within` is 1.0.*between 0 and 1"),
        (lambda: cj.choose_n(OURS, THEIRS, lowest=0), "lowest` is 0"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_the_value(call, match):
    with pytest.raises(cj.InputError, match=match):
        call()
