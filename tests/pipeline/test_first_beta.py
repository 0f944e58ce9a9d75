"""The β that a policy's training starts with: the ideal policy's, by what can be learned of the reward."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ctrl_jax.config import Calibration, Experiment, GroupProjection, Policy, RewardModel
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import Estimate, RewardSignal
from ctrl_jax.pipeline import train
from ctrl_jax.theory.objective import Objective
from tests import assembled
from tests.pipeline.fakes import EXPERIMENTS
from tests.pipeline.fakes import train as train_all

REWARDS = np.sort(np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32), axis=1)


@pytest.mark.parametrize(
    ("probe", "share"),
    [
        (None, 1.0),
        (Estimate(0.02, -0.05, 0.09), 1.0),  # it saw nothing
        (Estimate(0.53, 0.47, 0.58), 0.53**0.5),
        (Estimate(0.04, 0.01, 0.07), 0.25),
        (Estimate(0.4, None, None), 0.4**0.5),
    ],
)
def test_a_policy_that_learns_a_part_of_the_reward_starts_at_a_lower_beta(probe, share):
    assert train.learned_share(RewardSignal(learnability=probe)) == pytest.approx(share)


def first_beta(options, probe, *, linear=False):
    experiment = Experiment(
        "a", policy=options, calibration=Calibration(samples_per_prompt=32, keep_responses=True),
        reward_model=RewardModel(linear=linear),
    )  # fmt: skip
    run = SimpleNamespace(
        experiment=experiment, models=assembled.models(), mesh=make_mesh(1),
        corpus=SimpleNamespace(tokenizer=SimpleNamespace(eos_ids=(2,))),
    )  # fmt: skip
    calibrated = SimpleNamespace(table=SimpleNamespace(rewards=REWARDS), signal=RewardSignal(learnability=probe))
    return train.algorithm_of(run, options, calibrated).beta


PROBE = Estimate(0.49, 0.4, 0.6)


def test_the_first_beta_is_the_ideal_ones_times_the_root_of_the_probes_correlation():
    policy = Policy(transform="identity", kl_budget=0.5)
    ideal = policy.objective.beta(32, REWARDS)
    assert first_beta(policy, None) == pytest.approx(ideal)
    assert first_beta(policy, PROBE) == pytest.approx(0.7 * ideal)


def test_the_probe_says_nothing_of_a_linear_reward():
    policy = Policy(transform="identity", kl_budget=0.5)
    ideal = policy.objective.beta(32, REWARDS)
    assert first_beta(policy, PROBE, linear=True) == pytest.approx(0.5 * ideal)
    given = Policy(transform="identity", kl_budget=0.5, beta_share=0.3)
    assert first_beta(given, PROBE, linear=True) == pytest.approx(0.3 * ideal)
    fitted = GroupProjection(transform="identity", kl_budget=0.5)
    assert first_beta(fitted, PROBE, linear=True) == first_beta(fitted, None)


def test_a_beta_that_is_given_and_a_target_that_is_fitted_stay():
    assert first_beta(Policy(transform="identity", beta=0.3), PROBE) == 0.3
    fitted = GroupProjection(transform="identity", kl_budget=0.5)
    assert first_beta(fitted, PROBE) == first_beta(fitted, None)


def test_a_share_that_is_given_takes_the_place_of_the_probes():
    policy = Policy(transform="identity", kl_budget=0.5, beta_share=0.3)
    ideal = policy.objective.beta(32, REWARDS)
    assert first_beta(policy, PROBE) == first_beta(policy, None) == pytest.approx(0.3 * ideal)


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_share_is_a_share(share):
    with pytest.raises(InputError, match=r"beta_share"):
        Policy(beta_share=share)


def test_a_share_of_a_beta_that_is_given_is_refused():
    with pytest.raises(InputError, match=r"leave one of the two out"):
        Policy(beta=0.3, beta_share=0.5)


@pytest.mark.parametrize(("beta", "warned"), [(2e-4, True), (0.2, False)])
def test_a_training_says_that_its_budget_is_where_its_transform_is_flat(
    prepared, fakes, capsys, monkeypatch, beta, warned
):
    prepared("function")
    experiment = EXPERIMENTS["function"]
    monkeypatch.setattr(Objective, "beta", lambda *_: beta)
    policy = replace(experiment.policy, transform="exponential(-10)", kl_budget=1.4)
    train_all(fakes, replace(experiment, policy=policy), "runs/other")
    said = " ".join(capsys.readouterr().out.split())
    assert ("run: exponential(-10) reaches 1.4 nats at β = 0.0002: it is all but flat" in said) == warned
