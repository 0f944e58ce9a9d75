"""Success rates of N attempts, and the power law through them."""

import math

import numpy as np
import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.report import attack
from ctrl_jax.report.panels import attempts
from tests.report.drawing import drawn

SIZES = np.array([1, 2, 4, 8, 16, 32])


def test_a_power_law_has_its_exponent():
    rates = np.exp(-3.0 * SIZES**-0.35)[:, None] * np.ones(20)
    found = attack.exponent(SIZES, rates)
    assert found is not None and found.mean == pytest.approx(0.35) and found.bounds == pytest.approx((0.35, 0.35))


def test_an_interval_is_as_wide_as_prompts_differ():
    random = np.random.default_rng(0)
    rates = np.exp(-random.uniform(1, 5, 60) * SIZES[:, None] ** -random.uniform(0.1, 0.6, 60))
    found = attack.exponent(SIZES, rates)
    assert found.low < found.mean < found.high and 0.02 < found.high - found.low < 0.4
    alone = attack.exponent(SIZES, rates[:, :4])
    assert alone.low is None


@pytest.mark.parametrize("rates", [np.zeros(6), np.ones(6), np.array([0.5, 0.9, 1, 1, 1, 1])])
def test_too_few_rates_have_no_law(rates):
    assert attack.exponent(SIZES, rates[:, None] * np.ones(9)) is None


def sides(prompts=40, count=24, references=19):
    random = np.random.default_rng(1)
    plain = random.normal(size=(prompts, references))
    values = {"policy": random.normal(0.8, 1, (prompts, count)), "reference": random.normal(0, 1, (prompts, count))}
    return values, plain


def test_rates_are_those_of_all_subsets_of_the_attempts():
    values, plain = sides()
    found = attack.measure(values, plain, lowest=0.1)
    threshold = np.sort(plain, axis=1)[:, 1:2]  # the second lowest of 19
    bad = (values["policy"] <= threshold).sum(axis=1)
    assert [*found.differences] == [1, 2, 4, 8, 16, 24]
    for n in (1, 4, 24):
        expected = 1 - np.array([math.comb(24 - k, n) / math.comb(24, n) for k in bad])
        assert found.risks["policy"].counted[n].mean == pytest.approx(expected.mean())
        theirs = found.risks["reference"].counted[n].mean
        assert found.differences[n].mean == pytest.approx(expected.mean() - theirs)
    assert found.risks["policy"].share == pytest.approx(2 / 20)
    assert found.differences[4].high < 0, "the policy is the harder one"
    tree = found.as_json()
    assert set(tree["risks"]) == {"policy", "reference"} and tree["exponents"]["policy"]["mean"] > 0


def test_the_panel_has_both_sides_counted_and_extrapolated():
    values, plain = sides()
    found = {"reward": attack.measure(values, plain, lowest=0.1), "gold": attack.measure(values, plain, lowest=0.2)}
    first, second = attempts.panels(found)
    assert first.title == "Attack success by reward" and "24 attempts succeeds: policy" in second.description
    axes = drawn(first)
    assert len(axes.containers) == 4
    points = axes.containers[0].lines[0].get_data()
    counted = found["reward"].risks["policy"].counted
    np.testing.assert_allclose(np.array(points, float), ([*counted], [100 * one.mean for one in counted.values()]))


def test_a_share_that_is_none_is_refused():
    values, plain = sides()
    with pytest.raises(InputError, match="`lowest` is 1"):
        attack.measure(values, plain, lowest=1.0)
