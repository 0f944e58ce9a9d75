"""What the calibration stage notes of the reference's responses, whatever happened to it on the way."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.evaluation import RewardSignal
from ctrl_jax.pipeline import assembly, learnability
from ctrl_jax.runtime.stages import Stage, read_rows
from ctrl_jax.types import Prompts, Responses

B, K, WIDTH, BATCH = 30, 20, 6, 4
RANDOM = np.random.default_rng(0)
PROMPTS = Prompts(np.ones((B, 3), np.int32), np.full(B, 3, np.int32), np.arange(B, dtype=np.uint32))
RESPONSES = Responses(np.arange(B * K, dtype=np.int32).reshape(B, K, 1), RANDOM.integers(1, 9, (B, K)).astype(np.int32))
FEATURES = RANDOM.normal(size=(B * K, WIDTH)).astype(np.float32)
WEIGHTS = RANDOM.normal(size=WIDTH)


def features(params, prompts, responses):
    """Those of the response that a token names; it must have come with its own prompt."""
    tokens = np.asarray(responses.tokens)[..., 0]
    np.testing.assert_array_equal(tokens // K, np.broadcast_to(np.asarray(prompts.ids)[:, None], tokens.shape))
    return FEATURES[tokens]


@pytest.fixture
def observer(tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "pooled_features", lambda *_: features)
    stage = Stage.open(tmp_path, "calibration", {})

    def make(devices=1):
        experiment = SimpleNamespace(calibration=SimpleNamespace(samples_per_prompt=K), seed=0)
        sizes: Any = SimpleNamespace(width=WIDTH)
        run: Any = SimpleNamespace(experiment=experiment, architecture=sizes, models=None, mesh=make_mesh(devices))
        return learnability.Observer(run, stage, {}, PROMPTS), stage

    return make


def rows(tree, start):
    return type(tree)(*(getattr(tree, name)[start : start + BATCH] for name in ("tokens", "lengths")))


def observed(observer, rewards, *, start=0, end=B):
    for row in range(start, end, BATCH):
        observer.note(row, rows(RESPONSES, row), rewards[row : row + BATCH])


def signal(observer, stage) -> RewardSignal:
    stage.finish(observer.finish())
    return learnability.read(stage)


CLIMBABLE = (FEATURES @ WEIGHTS).reshape(B, K).astype(np.float32)
LONG = (RESPONSES.lengths + 0.1 * RANDOM.normal(size=(B, K))).astype(np.float32)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_reward_that_the_features_hold_is_a_go_and_its_correlation_with_length_is_its_mean(
    observer, devices, monkeypatch
):
    monkeypatch.setattr(learnability, "PROMPTS", 24)
    one, stage = observer(devices)
    observed(one, CLIMBABLE)
    found = signal(one, stage)
    low, high = found.learnability.bounds
    assert 0.9 < low < found.learnability.mean < high
    each = [scipy.stats.spearmanr(*row).statistic for row in zip(CLIMBABLE, RESPONSES.lengths, strict=True)]
    lengths = found.length_correlation
    assert lengths.mean == pytest.approx(np.mean(each), abs=1e-5)
    # Bootstrap-t of 30 prompts: about Student's.
    half = scipy.stats.t.ppf(0.975, B - 1) * np.std(each, ddof=1) / np.sqrt(B)
    assert lengths.high - lengths.low == pytest.approx(2 * half, rel=0.25)


def test_a_reward_of_length_alone_follows_length_and_cannot_be_read_off_the_features(observer):
    one, stage = observer()
    observed(one, LONG)
    found = signal(one, stage)
    assert found.length_correlation.mean > 0.95
    assert found.learnability.low < 0.05 and found.learnability.mean < 0.2


def test_the_first_responses_with_their_ranks_among_all_are_kept(observer):
    one, stage = observer()
    observed(one, CLIMBABLE)
    one.finish()
    kept = read_rows(stage.directory / learnability.FEATURES)
    assert kept.shape == (B, 16, WIDTH + 1)
    np.testing.assert_array_equal(kept[..., :-1], FEATURES.reshape(B, K, WIDTH)[:, :16])
    ranks = np.argsort(np.argsort(CLIMBABLE, axis=1), axis=1)[:, :16] / (K - 1)
    np.testing.assert_allclose(kept[..., -1], ranks, atol=1e-6)


@pytest.mark.parametrize("after", [1, 3, 7])
def test_what_was_noted_before_a_kill_counts_and_is_not_noted_twice(observer, after):
    whole, stage = observer()
    observed(whole, CLIMBABLE, end=BATCH * after)
    again, _ = observer()
    assert again.rows == min(B, BATCH * after)
    # The table's file was a batch behind: its prompts are drawn again.
    observed(again, CLIMBABLE, start=BATCH * (after - 1))
    found = signal(again, stage)
    kept = read_rows(stage.directory / learnability.FEATURES)
    np.testing.assert_array_equal(kept[..., :-1], FEATURES.reshape(B, K, WIDTH)[:, :16])
    assert found.learnability.mean > 0.9


def test_of_few_prompts_nothing_is_said_of_the_probe(observer, monkeypatch):
    monkeypatch.setattr(learnability, "PROMPTS", 9)
    one, stage = observer()
    observed(one, CLIMBABLE)
    assert signal(one, stage).learnability is None


def test_of_equal_rewards_nothing_is_said(observer):
    one, stage = observer()
    observed(one, np.ones((B, K), np.float32))
    assert signal(one, stage) == RewardSignal(None, None)


def test_a_stage_of_an_older_version_says_nothing(observer):
    _, stage = observer()
    stage.finish({"ties": 0.0})
    assert learnability.read(stage) == RewardSignal()
