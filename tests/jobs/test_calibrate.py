"""The calibration table refuses rewards that rank nothing; the sampling is a fake."""

from types import SimpleNamespace

import numpy as np
import pytest

from ctrl_jax import config
from ctrl_jax.errors import InputError
from ctrl_jax.jobs import calibrate
from ctrl_jax.jobs.reward_model import Reward
from ctrl_jax.jobs.run import Run
from ctrl_jax.jobs.sft import Trained
from ctrl_jax.runtime.mesh import make_mesh

B, K = 4, 8
TRAINED = (Trained(None, "sft-1"), Reward(None, "reward_model-1"))


@pytest.fixture
def table_of(tmp_path, monkeypatch):
    """The job's answer where the reference's rewards are these, and how often they were asked for."""
    asked = []

    def call(rewards):
        def respond(*arguments):
            asked.append(arguments)
            return None, rewards

        prompts = SimpleNamespace(prompts=SimpleNamespace(ids=np.arange(B, dtype=np.uint32)))
        monkeypatch.setattr(calibrate, "respond", respond)
        run = Run(config.Experiment("any"), tmp_path / "work", tmp_path / "stages", make_mesh(1))
        run.__dict__["corpus"] = SimpleNamespace(prompts=lambda split, count: prompts, stage="data-1")
        return calibrate.run(run, *TRAINED), asked

    return call


def test_the_table_is_sorted_and_made_once(table_of):
    rewards = np.random.default_rng(0).normal(size=(B, K)).astype(np.float32)
    (table, seconds), _ = table_of(rewards)
    np.testing.assert_array_equal(table.rewards, np.sort(rewards, axis=1))
    np.testing.assert_array_equal(table.ids, np.arange(B))
    (again, seconds_again), asked = table_of(np.zeros((B, K), np.float32))
    np.testing.assert_array_equal(again.rewards, table.rewards)
    assert seconds_again == seconds
    assert len(asked) == 1


def test_a_constant_reward_is_refused_also_from_the_finished_stage(table_of):
    for _ in range(2):
        with pytest.raises(InputError, match=r"100% of the pairs.*--reward-model\.steps"):
            table_of(np.ones((B, K), np.float32))


def test_some_ties_are_told(table_of, capsys):
    rewards = np.tile(np.arange(K, dtype=np.float32) // 2, (B, 1))  # each ties with 1 of the 7 others
    table_of(rewards)
    assert "14.3% of the pairs" in capsys.readouterr().out
