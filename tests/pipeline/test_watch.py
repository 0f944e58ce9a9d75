import dataclasses
import re

import numpy as np
import pytest

from ctrl_jax.config import GroupProjection, Policy, Supervised
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import watch

POLICY = Policy(kl_budget=0.5, learning_rate=0.02)


def rows(kl, **others):
    """Five steps, with the KL of each."""
    defaults = {"calibrated_reward": 0.7, "constant_rewards": 0.0, "beta": 0.25, "largest_update": 1e-3}
    return [{"step": 40 + i, "kl": value, **defaults, **others} for i, value in enumerate(kl)]


def told(kl, policy=POLICY, **others):
    with pytest.raises(InputError) as error:
        watch.watcher("example", policy)(rows(kl, **others))
    return str(error.value)


@pytest.mark.parametrize(
    ("kl", "changes", "others", "cause"),
    [
        ([0.4, 2, 6, 12, 20], {}, {}, "rose from 0.4 to 20 within these steps.*lower `policy.learning_rate`.*0.02"),
        ([6] * 5, {}, {}, "β, which is 0.25 by now, does not hold it"),
        ([6] * 5, {}, {"calibrated_reward": 0.98}, "calibrated reward is 0.98.*reward hacking"),
        ([6] * 5, {"beta": 0.01, "kl_limit": 3.0}, {}, "β is held at 0.01, too small"),
    ],
)
def test_a_runaway_kl_stops_with_its_cause(kl, changes, others, cause):
    policy = dataclasses.replace(POLICY, **changes)
    message = told(kl, policy, **others)
    mean = sum(kl) / 5
    assert f"It is {mean:.3g} nats per response, the mean of the last 5 steps, up to 44" in message
    assert (
        f"{mean / 0.5:.3g} times the budget of 0.5, where `policy.kl_limit` allows {policy.kl_limit or 10:g}" in message
    )
    assert re.search(cause, message)


@pytest.mark.parametrize(
    ("kl", "changes"),
    [
        ([4.9] * 5, {}),  # 9.8 times the budget
        ([0.1, 0.1, 0.1, 0.1, 24], {}),  # one step alone
        ([60] * 4, {}),  # too few to judge by
        ([60] * 5, {"beta": 0.01}),  # held: the budget is not aimed at
        ([60] * 5, {"kl_limit": float("inf")}),
    ],
)
def test_what_is_no_runaway_goes_on(kl, changes):
    watch.watcher("example", dataclasses.replace(POLICY, **changes))(rows(kl))


def test_an_estimate_from_stored_responses_stops_nothing_unless_a_limit_is_given():
    # One response of a large ratio is enough for such a mean: group_projection_helpful had it at a true KL of .598.
    outlier = rows([0.6, 0.7, 0.6, 0.5, 1069])
    stored = GroupProjection(kl_budget=0.5)
    watch.watcher("example", stored)(outlier)
    with pytest.raises(InputError, match="allows 20"):
        watch.watcher("example", dataclasses.replace(stored, kl_limit=20.0))(outlier)


def test_constant_rewards_are_told_once(capsys):
    see = watch.watcher("example", POLICY)
    see(rows([0.1] * 4, constant_rewards=1.0))
    see([*rows([0.1] * 4, constant_rewards=1.0), *rows([0.1], constant_rewards=0.99)])
    assert capsys.readouterr().out == ""
    for _ in range(3):
        see(rows([0.1] * 5, constant_rewards=1.0))
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("all rewards of every prompt were equal") == 1
    assert "up to 44" in printed and "nothing to learn" in printed


def test_a_brake_that_is_on_is_told_once(capsys):
    see = watch.watcher("example", POLICY)
    see([*rows([0.4] * 4, update_share=0.1), *rows([0.4], update_share=0.3)])
    assert capsys.readouterr().out == ""
    for _ in range(3):
        see(rows([0.4] * 5, update_share=0.1))
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("10% was made") == 1 and "up to step 44" in printed
    assert "past its budget of 0.5" in printed and "`policy.learning_rate`, which is 0.02" in printed.replace("--", "`")


def test_the_best_checkpoint_has_the_highest_reward_within_the_budget():
    def score(kl, reward):
        return watch.score(POLICY, rows(kl, calibrated_reward=reward))

    within = [score([0.3] * 5, 0.6), score([0.54] * 5, 0.8)]
    beyond = [score([0.9] * 5, 0.99), score([0.7] * 5, 0.9)]
    assert sorted([*within, *beyond]) == [*beyond, *within]


STILL = {"largest_update": 0.0, "gradient_norm": 1e-25, "loss": 0.5}


def fed(see, steps, **others):
    """A watcher that sees the rows of `steps` one by one, with the few before each."""
    seen = []
    for step in steps:
        seen.append({**rows([0.0])[0], "step": step, **STILL, **others})
        see(seen[-5:])


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ({"gradient_norm": 0.0, "constant_rewards": 1.0}, "All rewards of every prompt are equal.*advantages are 0"),
        (
            {"gradient_norm": 0.0, "beta": 1e30, "largest_update": 7e-26},
            r"\(by more than 7e-26\).*gradient is 0, though rewards differ: β.* is 1e\+30.*`policy.beta`",
        ),
        ({}, r"norm is 1e-25.*`policy.max_gradient_norm` 1, and `policy.learning_rate` is 0.02.*last digit"),
    ],
)
def test_a_policy_that_does_not_change_for_ten_steps_stops_with_its_cause(others, why):
    fed(watch.watcher("example", POLICY), range(11, 20), **others)
    with pytest.raises(InputError, match=f"example: the last 10 steps, up to 20, have changed no parameter .*{why}"):
        fed(watch.watcher("example", POLICY), range(11, 21), **others)


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (0.0, "gradient is 0, and the loss 0.5: .*`sft.steps`"),
        (1e-25, "norm is 1e-25, and `sft.learning_rate` is 1e-12"),
    ],
)
def test_so_does_a_supervised_training(norm, why):
    see = watch.moving("reference policy (sft)", "sft", Supervised(steps=400, warmup_steps=40, learning_rate=1e-12))
    with pytest.raises(InputError, match=rf"reference policy \(sft\): the last 10 steps, up to 50, .*{why}"):
        fed(see, range(1, 51), gradient_norm=norm)


def test_what_changes_in_one_step_of_ten_or_by_plan_is_not_still():
    see = watch.watcher("example", POLICY)
    fed(see, range(1, 20))  # ten of them of the warmup, which begins at a learning rate of 0
    fed(see, [20], largest_update=1e-9)
    fed(see, range(21, 30))
    fed(see, [30], largest_update=1e-9)
    # A cosine ends near 0.
    fed(see, range(135, 151))


def paid(rank, kl, *, noise=0.0, steps=100, policy=POLICY, **others):
    """A watcher that sees steps of alternating ranks, rank ± noise."""
    see, seen = watch.paying("example", policy), []
    for step in range(1, steps + 1):
        seen.append({"step": step, "kl": kl, "calibrated_reward": rank + noise * (-1) ** step, **others})
        see(seen[-5:])


def gain(policy, kl):
    return policy.objective.ideal(kl).win_rates["sampling"] - 0.5


def test_a_kl_that_buys_little_is_told_once(capsys):
    kl = 0.2
    paid(0.5 + 0.3 * gain(POLICY, kl), kl)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("Most of this KL is what the updates do at random") == 1
    first = POLICY.warmup_steps + watch.PAID_STEPS
    assert (
        f"in the 20 steps up to {first} " in printed and f"the ideal policy has {0.5 + gain(POLICY, kl):.3f}" in printed
    )
    assert "policy.learning_rate`, which is 0.02" in printed.replace("--", "`").replace(
        "learning-rate", "learning_rate"
    )


@pytest.mark.parametrize(
    ("share", "noise", "changes"),
    [
        (0.4, 0.0, {}),
        (0.2, 0.2, {}),  # too noisy to tell
        (0.0, 0.0, {"transform": "raw"}),  # no theory of ranks
    ],
)
def test_a_kl_that_pays_or_may_pay_is_not_told(capsys, share, noise, changes):
    paid(0.5 + share * gain(POLICY, 0.2), 0.2, noise=noise, policy=dataclasses.replace(POLICY, **changes))
    assert capsys.readouterr().out == ""


def test_an_algorithm_that_measures_no_rank_is_not_judged(capsys):
    see = watch.paying("example", POLICY)
    for step in range(1, 60):
        see([{"step": step, "loss": 0.5}])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("transform", "kl", "flat"),
    [
        ("exponential(-10)", 1.4, True),
        ("exponential(-10)", 0.4, False),
        ("exponential(-5)", 1.4, False),
        ("exponential(10)", 1.4, False),
        ("identity", 2.0, False),
    ],
)
def test_a_budget_that_a_transform_reaches_where_it_is_flat_is_warned_of(transform, kl, flat):
    policy = Policy(transform=transform, procedure="worst_of_4", kl_budget=kl)
    beta = policy.objective.beta(128, np.sort(np.random.default_rng(0).normal(size=(4, 128)), axis=1))
    found = watch.too_flat(policy, beta)
    assert (found is not None) == flat == (beta < 1e-3)
    if flat:
        assert f"exponential(-10) reaches 1.4 nats at β = {beta:.2g}" in found and "Lower `policy.kl_budget`" in found
    assert watch.too_flat(dataclasses.replace(policy, beta=1e-4), 1e-4) is None
    assert watch.too_flat(Policy(transform="raw"), 1e-9) is None and watch.too_flat(policy, None) is None


@pytest.mark.parametrize(
    ("above", "kl", "expected"), [(0.01, 0.5, 0.7), (-0.01, 0.5, 0.7), (-0.05, 0.5, -0.05), (0.01, 0.6, -0.6)]
)
def test_the_best_policy_keeps_its_floors(above, kl, expected):
    assert watch.score(POLICY, rows([kl] * 5, above_floors=above)) == pytest.approx(expected)


def test_floors_that_are_out_of_reach_are_said_once_and_are_the_cause_of_a_kl_that_runs_away(capsys):
    see = watch.watcher("example", POLICY)
    see(rows([0.5] * 5, multiplier=11.0))
    assert capsys.readouterr().out == ""
    for _ in range(2):
        see(rows([0.5] * 5, multiplier=14.0))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("example: up to step 44, a rank of a constrained reward has come to be worth 14 nats") == 1
    assert "lower them, or raise `policy.kl_budget`" in said
    assert "The floors (`policy.floors`) ask for more than this KL buys" in told([6] * 5, multiplier=14.0)


@pytest.mark.parametrize(("multiplier", "said"), [(0.0, True), (1.0, False)])
def test_a_kl_that_pays_for_floors_is_not_called_noise(capsys, multiplier, said):
    see = watch.paying("example", POLICY)
    for _ in range(watch.PAID_STEPS):
        see(rows([0.5] * 5, calibrated_reward=0.52, multiplier=multiplier))
    assert ("Most of this KL is what the updates do" in " ".join(capsys.readouterr().out.split())) == said
