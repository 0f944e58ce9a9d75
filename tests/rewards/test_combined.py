"""Several rewards as one, and the reference's responses that they are compared with."""

import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.config import Combine, Evaluation, Experiment, Policy, RewardModel
from ctrl_jax.errors import InputError
from ctrl_jax.rewards import combined
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.steps.combination import LogSigmoids, SmallestCalibrated, WeightedSum
from ctrl_jax.types import Prompts, Responses


def prompts(*ids):
    return Prompts(jnp.zeros((len(ids), 2), jnp.int32), jnp.ones(len(ids), jnp.int32), jnp.array(ids, jnp.uint32))


def responses(values):
    tokens = jnp.asarray(values, jnp.int32)[..., None]
    return Responses(tokens, jnp.ones(tokens.shape[:2], jnp.int32))


def number(scale, modulus):
    """A reward of a response's only token, and of its prompt."""

    def score(prompts, responses):
        place = np.asarray(prompts.ids)[:, None].astype(np.float32)
        return (scale * (np.asarray(responses.tokens)[..., 0] % modulus) + place).astype(np.float32)

    return Reward(score, f"number-{scale}-{modulus}", name=f"number {scale}", tolerance=1e-5 * scale, columns=("a",))


FIRST, SECOND = number(1.0, 100), number(1000.0, 7)


def drawn(prompts):
    """The reference's responses to prompts: by their ids."""
    return responses([[(13 * i + 5 * k) % 50 for k in range(6)] for i in np.asarray(prompts.ids).tolist()])


def compared(prompts):
    return combined.scores([FIRST, SECOND], prompts, drawn(prompts))


@pytest.mark.parametrize("how", [LogSigmoids(0.5), SmallestCalibrated()], ids=str)
def test_each_prompt_is_compared_with_its_own_references_whatever_its_batch(how):
    reward = combined.reward([FIRST, SECOND], how, compared)
    given = responses([[1, 20, 48], [3, 9, 40]])
    found = reward.score(prompts(4, 9), given)

    def parts(prompts, responses):
        return jnp.stack([FIRST.score(prompts, responses), SECOND.score(prompts, responses)], -1)

    references = drawn(prompts(4, 9))
    np.testing.assert_allclose(found, how(parts(prompts(4, 9), given), parts(prompts(4, 9), references)), rtol=1e-6)
    assert found.dtype == np.float32
    again = reward.score(prompts(9, 9), responses([[3, 9, 40], [40, 3, 9]]))
    np.testing.assert_allclose(again, [found[1], found[1][[2, 0, 1]]], rtol=1e-6)


def test_a_weighted_sum_draws_nothing():
    reward = combined.reward([FIRST, SECOND], WeightedSum((2.0, -1.0)))
    np.testing.assert_allclose(reward.score(prompts(0), responses([[5, 8]])), [[10 - 5000, 16 - 1000]])


def test_it_is_known_by_all_that_its_answers_depend_on():
    def known(parts=(FIRST, SECOND), how=None, drawn="reference"):
        return combined.reward(parts, how or SmallestCalibrated(), compared, drawn=drawn).fingerprint

    seen = [
        known(), known(parts=(FIRST, number(2.0, 7))), known(how=LogSigmoids(0.5)), known(how=LogSigmoids(0.6)),
        known(drawn="another"), known(how=WeightedSum((1.0, 2.0))), known(how=WeightedSum((1.0, 3.0))),
    ]  # fmt: skip
    assert len(set(seen)) == len(seen)
    assert known(how=WeightedSum((1.0, 2.0)), drawn="another") == seen[5], "it asks no reference"


def test_it_says_what_it_is_made_of():
    reward = combined.reward([FIRST, SECOND], SmallestCalibrated(), compared)
    assert reward.name == "smallest_calibrated of number 1.0, number 1000.0"
    assert (reward.tolerance, reward.columns) == (1e-2, ("a",))
    assert reward.asked == (reward,), "of no function in it"
    function = SECOND._replace(fingerprint="function-1")
    assert combined.reward([FIRST, function], SmallestCalibrated(), compared).asked == (function,)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"by": "weighted_sum"}, r"combine\.by is 'weighted_sum'.*names no reward"),
        (
            {"by": "weighted_sum", "weights": (1.0,)},
            r"combine\.weights \(1\.0,\), but combine\.rewards names no reward",
        ),
        ({"weights": (1.0,)}, "smallest_calibrated has no weights"),
        ({"rewards": ("a:b", "a:b")}, "one reward twice"),
        ({"rewards": ("nowhere",)}, "'nowhere', which is neither module:name nor a directory"),
        ({"ensemble": "max"}, "ensemble"),
        ({"rewards": ("a:b",), "by": "weighted_sum"}, "there are 2 rewards"),
        ({"rewards": ("a:b",), "by": "weighted_sum", "weights": (1.0, 2.0, 3.0)}, "there are 2 rewards"),
        ({"rewards": ("a:b",), "by": "weighted_sum", "weights": (0.0, 0.0)}, "not all 0"),
        ({"rewards": ("a:b",), "weights": (1.0, 2.0)}, "smallest_calibrated has no weights"),
        ({"rewards": ("a:b",), "by": "smallest"}, "smallest_calibrated"),
    ],
)
def test_a_combination_that_cannot_be_is_refused(given, match):
    with pytest.raises(InputError, match=match):
        Combine(**given)


def test_an_ensemble_of_one_is_refused():
    with pytest.raises(InputError, match=r"combine\.ensemble is 'min', of 1 member; ask for several"):
        Experiment("one", combine=Combine(ensemble="min"))
    Experiment("several", combine=Combine(ensemble="min"), reward_model=RewardModel(members=3))
    with pytest.raises(InputError, match=r"RewardModel\.members is 3, and the reward is given: a:b"):
        RewardModel(members=3, function="a:b")


def test_log_sigmoids_of_one_reward_change_nothing_for_ranks():
    alone = Combine(by="log_sigmoids(0.85)")
    with pytest.raises(InputError, match=r"'log_sigmoids\(0\.85\)' of one reward, .* 'exponential\(10\)' sees order"):
        Experiment("a", combine=alone)
    Experiment("a", combine=alone, policy=Policy(transform="raw"))
    Experiment("a", combine=Combine(by="log_sigmoids(0.85)", rewards=("a:b",)))


def test_a_reward_that_is_trained_on_is_no_independent_judge():
    with pytest.raises(InputError, match="also the reward that the policy is trained on"):
        Experiment("judge", combine=Combine(rewards=("a:b",)), evaluation=Evaluation(judge="a:b"))


def test_the_reward_models_own_reward_is_no_other():
    with pytest.raises(InputError, match="has the reward model's own reward in it"):
        Experiment("twice", reward_model=RewardModel(function="a:b"), combine=Combine(rewards=("a:b",)))
