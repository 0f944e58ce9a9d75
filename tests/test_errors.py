"""An error says what is wrong, what it is, and what to do, apart and in one paragraph."""

import pickle

import jax
import jax.numpy as jnp
import pytest

import ctrl_jax as cj
from ctrl_jax.config import Data, Experiment, Model, Policy, Supervised
from ctrl_jax.errors import InputError
from ctrl_jax.models.lora import Lora
from ctrl_jax.steps import calibration, win_rate
from ctrl_jax.theory import ideal, optimal, procedures, transforms

SCORES = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("problem", "remedy", "message"),
    [
        ("beta is 0", "give more.", "beta is 0; give more."),
        ("beta is 0.", "Give more.", "beta is 0. Give more."),
        ("beta is 0.", None, "beta is 0."),
    ],
)
def test_the_message_ends_with_the_remedy(problem, remedy, message):
    error = InputError(problem, field="beta", value=0, remedy=remedy)
    assert (str(error), error.field, error.value, error.remedy) == (message, "beta", 0, remedy)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.field, again.value, again.remedy) == (message, "beta", 0, remedy)


@pytest.mark.parametrize(
    ("call", "field", "value"),
    [
        (lambda: cj.Objective(cj.exponential(10), cj.best_of(4), kl_budget=-1), "kl_budget", -1),
        (lambda: cj.Objective("exponential", cj.best_of(4), kl_budget=1), "transform", "exponential"),
        (lambda: cj.Objective(cj.exponential(10), 4, kl_budget=1), "procedure", 4),
        (lambda: cj.exponential(1e4), "rate", 1e4),
        (lambda: cj.best_of(0), "n", 0),
        (lambda: transforms.parse("identiti"), "transform", "identiti"),
        (lambda: procedures.parse("best_off_4"), "procedure", "best_off_4"),
        (lambda: ideal.tilt(transforms.identity(), -2.0), "beta", -2.0),
        (lambda: ideal.at_kl(transforms.identity(), -3.0), "kl", -3.0),
        (lambda: optimal.optimal_transform(procedures.BestOfN(2), kl=-4.0), "kl", -4.0),
        (lambda: cj.calibrate(SCORES, SCORES[:, :0]), "reference_rewards", (2, 0)),
        (lambda: calibration.quantiles(SCORES, 4), "count", 4),
        (lambda: cj.win_rate(SCORES, SCORES, cj.best_of(4)), "procedure", procedures.BestOfN(4)),
        (lambda: win_rate.interval(SCORES[0], jax.random.key(0), resamples=5), "resamples", 5),
        (lambda: Policy(kl_budget=-1.0), "policy.kl_budget", -1.0),
        (lambda: Supervised(batch_size=0), "sft.batch_size", 0),
        (lambda: Lora(alpha=0.0), "model.lora.alpha", 0.0),
        (lambda: Lora(rank=2, last_layers=0), "model.lora.last_layers", 0),
        (lambda: Lora(last_layers=3), "model.lora.last_layers", 3),
        (lambda: Model(width=97), "model.width", 97),
        (lambda: Data(source="hopeful"), "data.source", "hopeful"),
        (lambda: Experiment("a/b"), "name", "a/b"),
        (lambda: Experiment("any", seed=-1), "seed", -1),
    ],
)
def test_errors_of_the_library_carry_field_value_and_remedy(call, field, value):
    with pytest.raises(InputError) as caught:
        call()
    assert (caught.value.field, caught.value.value) == (field, value)
    assert str(caught.value).endswith(caught.value.remedy)
