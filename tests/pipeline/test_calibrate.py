"""The calibration table refuses rewards that rank nothing; the sampling is a fake."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from ctrl_jax import config
from ctrl_jax.data.pipelines import batches
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import assembly, calibrate, rollouts, stored
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.supervised import Trained
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.runtime.stages import RowFile, read_rows
from ctrl_jax.types import Prompts, Responses

B, K = 4, 8
PROMPTS = Prompts(np.ones((B, 3), np.int32), np.full(B, 3, np.int32), np.arange(B, dtype=np.uint32))
RESPONSES = Responses(
    np.stack([np.arange(2 * K, dtype=np.int32).reshape(2, K), np.full((2, K), 99, np.int32)], axis=-1),
    np.ones((2, K), np.int32),
)


def answering(sign: float = 1.0, noise: float = 0.0) -> Reward:
    """A reward whose answers are the tokens, or their negatives, perhaps not alike twice."""
    random = np.random.default_rng(0)

    def score(prompts, responses):
        tokens = np.asarray(responses.tokens)[..., 0]
        return (sign * tokens + noise * random.normal(size=tokens.shape)).astype(np.float32)

    return Reward(score, "function-1", name="rewards:reward")


@pytest.fixture
def table_of(tmp_path, monkeypatch):
    """The job's answer where the reference's rewards are these, and from which prompts on they were asked for."""
    asked = []

    def call(rewards, quantiles=None, reward=None, keep=False, whole=False, size=2):
        def in_batches(*arguments, done, log_probs):
            asked.append(done)
            *_, num_samples = arguments
            for start in range(done, B, size):
                drawn = rewards[start : start + size, :num_samples]
                yield jax.tree.map(lambda x: x[:size], RESPONSES), drawn, drawn / 4 if log_probs else None

        monkeypatch.setattr(rollouts, "scored", in_batches)
        features = lambda _, prompts, responses: np.zeros((*responses.lengths.shape, 2), np.float32)  # noqa: E731
        monkeypatch.setattr(assembly, "pooled_features", lambda *_: features)
        settings = config.Calibration(prompts=B, samples_per_prompt=K, quantiles=quantiles, keep_responses=keep)
        function = config.RewardModel(function="rewards:reward")
        experiment = config.Experiment(
            "any",
            data=config.Data(response_length=2),
            calibration=settings,
            reward_model=function,
            policy=config.Policy(prompts_per_step=B),
        )
        corpus: Any = SimpleNamespace(
            prompts=lambda split, count: SimpleNamespace(prompts=PROMPTS),
            contents=lambda *splits: "data-1",
            texts=lambda responses: [[str(token) for token in row] for row in np.asarray(responses.tokens)[..., 0]],
        )
        places = {"work_dir": tmp_path / "work", "stages_dir": tmp_path / "stages"}
        models: Any = SimpleNamespace(architecture=SimpleNamespace(vocabulary_size=100, width=2))
        workspace = Workspace(experiment=experiment, **places, mesh=make_mesh(1))
        run = Run(**vars(workspace), corpus=corpus, models=models, fingerprints=workspace.fingerprints)
        found = calibrate.run(run, Trained(None, "sft-1"), reward or answering())
        return found if whole else found[:3], asked

    return call


def test_the_table_is_sorted_and_made_once(table_of):
    rewards = np.random.default_rng(0).normal(size=(B, K)).astype(np.float32)
    (table, seconds, *_), _ = table_of(rewards)
    np.testing.assert_array_equal(table.rewards, np.sort(rewards, axis=1))
    np.testing.assert_array_equal(table.ids, np.arange(B))
    (again, seconds_again, *_), asked = table_of(np.zeros((B, K), np.float32))
    np.testing.assert_array_equal(again.rewards, table.rewards)
    assert seconds_again == seconds
    assert asked == [0]


def test_the_table_stays_on_disk(table_of):
    (table, *_), _ = table_of(np.random.default_rng(0).normal(size=(B, K)).astype(np.float32))
    assert isinstance(table.rewards, np.memmap)
    batch = next(batches({"rewards": table.rewards}, batch_size=2, seed=0, shuffle=False))
    assert type(batch["rewards"]) is np.ndarray
    np.testing.assert_array_equal(batch["rewards"], table.rewards[:2])


def test_quantiles_of_the_rewards_are_kept(table_of):
    rewards = np.random.default_rng(0).normal(size=(B, K)).astype(np.float32)
    (table, *_), _ = table_of(rewards, quantiles=4)
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
    (table, *_), asked = table_of(rewards)
    assert asked == [0, 2, 2], "the first batch was kept"
    np.testing.assert_array_equal(table.rewards, np.sort(rewards, axis=1))
    assert not list(tmp_path.rglob("*partial*"))


def test_a_constant_reward_is_refused_also_from_the_finished_stage(table_of):
    for _ in range(2):
        with pytest.raises(InputError, match=r"100% of the prompts.*`reward_model\.steps`"):
            table_of(np.ones((B, K), np.float32))


@pytest.mark.parametrize(("count", "refused"), [(B - 1, False), (B, True)])
def test_prompts_of_one_reward_are_counted_by_all_rewards_not_by_quantiles(table_of, count, refused):
    """A success in K on the others, which no quantile shows."""
    rewards = np.zeros((B, K), np.float32)
    rewards[count:, 0] = 1
    if not refused:
        table_of(rewards, quantiles=2)
    else:
        with pytest.raises(InputError, match="there is nothing to learn"):
            table_of(rewards, quantiles=2)


def test_rewards_of_0_and_1_are_taken(table_of, capsys):
    """A verifier's: half of the prompts have both, which is what there is to learn from."""
    rewards = np.zeros((B, K), np.float32)
    rewards[::2, :3] = 1
    (table, *_), _ = table_of(rewards)
    np.testing.assert_array_equal(table.rewards, np.sort(rewards, axis=1))
    said = " ".join(capsys.readouterr().out.split())
    assert "tie in reward" in said and "50% of the prompts have one reward alone" in said


def test_some_ties_are_told(table_of, capsys):
    rewards = np.tile(np.arange(K, dtype=np.float32) // 2, (B, 1))  # each ties with 1 of the 7 others
    table_of(rewards)
    assert "14.3% of the pairs" in capsys.readouterr().out


RAW = np.random.default_rng(0).normal(size=(B, K)).astype(np.float32)


def superseded(tmp_path):
    return sorted(path.name for path in tmp_path.rglob("superseded-*"))


def test_a_reward_that_answers_otherwise_than_its_key_knows_makes_the_table_anew(table_of, tmp_path, capsys):
    """As a file that the function reads, with its sign turned round."""
    (_, _, digest, *_), _ = table_of(RAW)
    (_, _, same, *_), asked = table_of(-RAW)
    assert same == digest and asked == [0] and superseded(tmp_path) == []
    capsys.readouterr()
    (table, _, another, *_), asked = table_of(-RAW, reward=answering(-1.0))
    assert asked == [0, 0] and another != digest
    np.testing.assert_array_equal(table.rewards, np.sort(-RAW, axis=1))
    printed = capsys.readouterr().out.replace("\n", "")
    assert "rewards:reward answers otherwise than before, though its source is the same" in printed
    assert "to '11' it gave 11, and gives -11 now" in printed  # of 2 prompts' first 4 responses the largest
    assert "The calibration table is made anew, and with it the policy" in printed
    (place,) = tmp_path.rglob("superseded-1")
    np.testing.assert_array_equal(read_rows(place / "rewards.npy"), np.sort(RAW, axis=1))
    assert str(place) in printed
    table_of(RAW, reward=answering(-1.0))
    assert superseded(tmp_path) == ["superseded-1"]


@pytest.mark.parametrize(("sign", "kept"), [(1 + 1e-7, True), (1 - 1e-3, False)])
def test_a_function_may_round_otherwise_but_not_answer_otherwise(table_of, tmp_path, sign, kept):
    table_of(RAW)
    table_of(RAW, reward=answering(sign))
    assert (superseded(tmp_path) == []) == kept


def test_a_reward_that_never_answers_alike_is_said_once_and_kept(table_of, tmp_path, capsys):
    for noise in (0.5, 0.4):
        table_of(RAW, reward=answering(noise=noise))
    assert capsys.readouterr().out.count("does not answer alike twice") == 1
    assert superseded(tmp_path) == []


def test_a_reward_that_no_longer_answers_alike_is_said_and_kept(table_of, tmp_path, capsys):
    for noise in (0.0, 0.5):
        table_of(RAW, reward=answering(noise=noise))
    assert "does not answer alike twice any more" in capsys.readouterr().out
    assert superseded(tmp_path) == []


def test_a_table_half_of_another_reward_is_not_gone_on_with(table_of, tmp_path):
    broken = RAW.copy()
    broken[2:] = np.nan
    with pytest.raises(InputError, match="not finite"):
        table_of(broken)
    (table, *_), asked = table_of(-RAW, reward=answering(-1.0))
    assert asked == [0, 0], "its first batch was of another reward"
    np.testing.assert_array_equal(table.rewards, np.sort(-RAW, axis=1))
    assert superseded(tmp_path) == ["superseded-1"]


def shuffled(path):
    np.save(path, np.load(path)[:, ::-1])


def of_other_k(path):
    np.save(path, np.load(path)[:, :-1])


def of_another_type(path):
    np.save(path, np.load(path).astype(np.float64))


def with_a_flipped_high_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [shuffled, of_other_k, of_another_type, with_a_flipped_high_bit])
def test_a_table_that_is_not_what_was_written_is_made_anew(table_of, tmp_path, damage, capsys):
    (before, _, digest, *_), _ = table_of(RAW)
    before = np.array(before.rewards)
    (path,) = tmp_path.rglob("rewards.npy")
    damage(path)
    (table, _, again, *_), asked = table_of(RAW)
    np.testing.assert_array_equal(table.rewards, before)
    assert again == digest and asked == [0, 0]
    assert "rewards.npy is missing or not what was written" in capsys.readouterr().out.replace("\n", "")


def kept_of(table_of, rewards, **options):
    return table_of(rewards, keep=True, whole=True, **options)


def test_responses_are_kept_as_they_were_drawn(table_of):
    found, asked = kept_of(table_of, RAW)
    kept = found.responses
    assert isinstance(kept, np.memmap) and kept.shape == (B, K)
    np.testing.assert_array_equal(kept["reward"], RAW)
    np.testing.assert_array_equal(kept["log_prob"], RAW / 4)
    np.testing.assert_array_equal(kept["tokens"], np.tile(RESPONSES.tokens, (2, 1, 1)))
    np.testing.assert_array_equal(kept["length"], 1)
    np.testing.assert_array_equal(found.table.rewards, np.sort(RAW, axis=1))
    again, asked = kept_of(table_of, np.zeros((B, K), np.float32))
    np.testing.assert_array_equal(again.responses, kept)
    assert asked == [0] and again.all_digests == found.all_digests


def test_a_table_is_one_whether_its_responses_are_kept_or_not(table_of, tmp_path, capsys):
    (*_, digest), _ = table_of(RAW)
    found, asked = kept_of(table_of, RAW)
    assert asked == [0, 0] and found.digest == digest, "drawn again, and what was made of the table stays"
    assert superseded(tmp_path) == ["superseded-1"]
    assert "were not kept when its calibration table was made" in capsys.readouterr().out.replace("\n", " ")
    (*_, without), asked = table_of(RAW)
    assert asked == [0, 0] and without == digest


@pytest.mark.parametrize("keep_first", [False, True])
def test_a_table_with_responses_that_was_cut_off_is_gone_on_with(table_of, tmp_path, keep_first):
    broken = RAW.copy()
    broken[2:] = np.nan
    with pytest.raises(InputError, match="not finite"):
        table_of(broken, keep=keep_first)
    found, asked = kept_of(table_of, RAW)
    assert asked == [0, 2 if keep_first else 0]
    np.testing.assert_array_equal(found.responses["reward"], RAW)
    np.testing.assert_array_equal(found.table.rewards, np.sort(RAW, axis=1))
    assert not list(tmp_path.rglob("*partial*"))


def test_a_kill_between_the_two_files_leaves_no_row_twice(table_of, tmp_path, monkeypatch):
    """The responses of the third prompt were written, and the table's row was not; the next batches are larger."""
    append = RowFile.append

    def killed(self, rows, note=None):
        if self.path.name == "rewards.npy" and self.rows == 2:
            raise KeyboardInterrupt
        append(self, rows, note)

    monkeypatch.setattr(RowFile, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        kept_of(table_of, RAW, size=1)
    monkeypatch.setattr(RowFile, "append", append)
    found, asked = kept_of(table_of, RAW)
    assert asked == [0, 2]
    np.testing.assert_array_equal(found.responses["reward"], RAW)
    np.testing.assert_array_equal(found.table.rewards, np.sort(RAW, axis=1))


def test_responses_that_are_not_what_was_written_are_made_anew(table_of, tmp_path, capsys):
    before, _ = kept_of(table_of, RAW)
    kept, digest = np.array(before.responses), before.all_digests
    with_a_flipped_high_bit(*tmp_path.rglob("responses.npy"))
    found, asked = kept_of(table_of, RAW)
    np.testing.assert_array_equal(found.responses, kept)
    assert found.all_digests == digest and asked == [0, 0]
    assert "responses.npy is missing or not what was written" in capsys.readouterr().out.replace("\n", "")


def test_responses_of_another_reward_are_made_anew(table_of, tmp_path):
    before, _ = kept_of(table_of, RAW)
    found, asked = kept_of(table_of, -RAW, reward=answering(-1.0))
    assert asked == [0, 0] and found.all_digests != before.all_digests
    np.testing.assert_array_equal(found.responses["reward"], -RAW)


def test_groups_are_the_responses_of_a_prompt_one_after_the_other(table_of):
    found, _ = kept_of(table_of, RAW)
    groups = stored.examples(PROMPTS, found.responses, 4)
    np.testing.assert_array_equal(groups.prompts.ids, [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(groups.raw, RAW.reshape(8, 4))
    np.testing.assert_array_equal(groups.log_probs, RAW.reshape(8, 4) / 4)
    np.testing.assert_array_equal(groups.responses.tokens[:2], RESPONSES.tokens[0].reshape(2, 4, 2))
    np.testing.assert_array_equal(groups.reference_rewards, np.repeat(RAW, 2, axis=0))
    batch = next(batches(groups, batch_size=8, seed=0, shuffle=False))
    assert batch.responses.tokens.dtype == np.uint16 and batch.responses.lengths.shape == (8, 4)


@pytest.mark.parametrize(("vocabulary", "token"), [(2**16, 2), (2**16 + 1, 4)])
def test_a_token_takes_as_few_bytes_as_the_vocabulary_allows(vocabulary, token):
    experiment = config.Experiment(
        "any", data=config.Data(response_length=24), calibration=config.Calibration(samples_per_prompt=32)
    )
    assert stored.bytes_per_prompt(experiment, vocabulary) == 32 * (24 * token + 12)
