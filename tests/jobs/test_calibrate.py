"""The calibration table refuses rewards that rank nothing; the sampling is a fake."""

from types import SimpleNamespace

import numpy as np
import pytest

from ctrl_jax import config
from ctrl_jax.data.pipelines import batches
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
    """The job's answer where the reference's rewards are these, and from which prompts on they were asked for."""
    asked = []

    def call(rewards, quantiles=None):
        def in_batches(*arguments, done):
            asked.append(done)
            for start in range(done, B, 2):
                yield rewards[start : start + 2]

        prompts = SimpleNamespace(prompts=SimpleNamespace(ids=np.arange(B, dtype=np.uint32)))
        monkeypatch.setattr(calibrate, "rewards", in_batches)
        settings = config.Calibration(prompts=B, samples_per_prompt=K, quantiles=quantiles)
        experiment = config.Experiment("any", calibration=settings, policy=config.Policy(prompts_per_step=B))
        run = Run(experiment, tmp_path / "work", tmp_path / "stages", make_mesh(1))
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
    assert asked == [0]


def test_the_table_stays_on_disk(table_of):
    (table, _), _ = table_of(np.random.default_rng(0).normal(size=(B, K)).astype(np.float32))
    assert isinstance(table.rewards, np.memmap)
    batch = next(batches({"rewards": table.rewards}, batch_size=2, seed=0, shuffle=False))
    assert type(batch["rewards"]) is np.ndarray
    np.testing.assert_array_equal(batch["rewards"], table.rewards[:2])


def test_quantiles_of_the_rewards_are_kept(table_of):
    rewards = np.random.default_rng(0).normal(size=(B, K)).astype(np.float32)
    (table, _), _ = table_of(rewards, quantiles=4)
    # Of 8 rewards, 4 quantiles at the levels 1/8, 3/8, ...: each between two neighbours, the first and second first.
    ascending = np.sort(rewards, axis=1)
    np.testing.assert_allclose(table.rewards, (ascending[:, 0::2] + ascending[:, 1::2]) / 2, rtol=1e-6)


def test_a_table_that_was_cut_off_is_gone_on_with(table_of, tmp_path):
    rewards = np.random.default_rng(0).normal(size=(B, K)).astype(np.float32)
    broken = rewards.copy()
    broken[2:] = np.nan
    for _ in range(2):
        with pytest.raises(InputError, match="16 of 16 reference rewards are not finite"):
            table_of(broken)
        assert not list(tmp_path.rglob("rewards.npy")) and not list(tmp_path.rglob("done.json"))
    (table, _), asked = table_of(rewards)
    assert asked == [0, 2, 2], "the first batch was kept"
    np.testing.assert_array_equal(table.rewards, np.sort(rewards, axis=1))
    assert not list(tmp_path.rglob("*partial*"))


def test_a_constant_reward_is_refused_also_from_the_finished_stage(table_of):
    for _ in range(2):
        with pytest.raises(InputError, match=r"100% of the pairs.*--reward-model\.steps"):
            table_of(np.ones((B, K), np.float32))


def test_some_ties_are_told(table_of, capsys):
    rewards = np.tile(np.arange(K, dtype=np.float32) // 2, (B, 1))  # each ties with 1 of the 7 others
    table_of(rewards)
    assert "14.3% of the pairs" in capsys.readouterr().out
