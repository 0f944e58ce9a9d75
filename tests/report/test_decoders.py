"""Decoders beside one another: numbers by the library's own functions, and the figure."""

import numpy as np
import pytest

import ctrl_jax as cj
from ctrl_jax.evaluation import Picks
from ctrl_jax.report import decoders
from ctrl_jax.report.panels import tokens
from ctrl_jax.theory.nearest import Nearest
from tests.report.drawing import drawn

RANDOM = np.random.default_rng(0)
ONE = RANDOM.normal(0, 1, (12, 9))


def side(shift: float, gold: bool = True) -> Picks:
    rewards = RANDOM.normal(shift, 1, (12, 4)).astype(np.float32)
    return Picks(rewards, rewards + RANDOM.normal(0, 1, (12, 4)) if gold else None, RANDOM.uniform(20, 30, 12), 16)


SIDES = {"policy": side(1), "reference": side(0.5)}
NEAR = Nearest(cj.best_of(6), 0.05)


def test_win_rates_are_over_all_pairs_of_what_was_returned():
    found = decoders.measure("tree_of_8(2,4)", SIDES, ONE, True, NEAR)
    policy, reference = SIDES["policy"], SIDES["reference"]

    def expected(ours, theirs):
        return pytest.approx(cj.interval(cj.win_rate(ours, theirs, cj.sampling()), bounds=(0, 1)), abs=1e-6)

    assert found.win_rate == expected(policy.rewards, reference.rewards)
    assert found.gold_win_rate == expected(policy.gold, reference.gold)
    assert found.against_one["policy"] == expected(policy.rewards, ONE)
    assert found.against_one["reference"] == expected(reference.rewards, ONE)
    assert found.tokens == {name: pytest.approx(one.sampled.mean()) for name, one in SIDES.items()}
    tree = found.as_json()
    assert tree["nearest"] == {"procedure": "best_of_6", "distance": 0.05} and tree["scored"] == 16
    assert tree["against_one"]["policy"]["mean"] == found.against_one["policy"].mean
    other = side(0.2)
    beside = decoders.measure("tree_of_8(2,4)", SIDES | {"beside": other}, ONE, True, NEAR)
    ours, theirs = (cj.win_rate(one.rewards, reference.rewards, cj.sampling()) for one in (policy, other))
    assert beside.difference == pytest.approx(cj.difference(ours, theirs), abs=1e-6)
    assert found.difference is None and beside.win_rate == found.win_rate
    plain = decoders.measure(
        "best_of_4", {name: one._replace(gold=None) for name, one in SIDES.items()}, ONE, False, None
    )
    assert plain.gold_win_rate is None and plain.as_json()["nearest"] is None


def test_the_figure_has_each_decoder_on_both_sides():
    plain = decoders.measure("best_of_4", SIDES, ONE, False, None)
    found = [plain, decoders.measure("tree_of_8(2,4)", SIDES, ONE, True, None)]
    (panel,) = tokens.panels(found)
    axes = drawn(panel)
    heights = sorted(float(line.get_ydata()[0]) for line in axes.lines if len(line.get_ydata()) == 1)
    expected = sorted(100 * one.against_one[name].mean for one in found for name in SIDES)
    np.testing.assert_allclose([one for one in heights if one in expected], expected)
    written = {text.get_text() for text in axes.texts} | {text.get_text() for text in axes.get_legend().get_texts()}
    assert {"best-of-4", "tree-of-8(2,4)", "policy", "reference"} <= written
    (alone,) = tokens.panels(found[1:])
    assert {"policy", "reference"} <= {text.get_text() for text in drawn(alone).texts}
