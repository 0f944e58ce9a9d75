import math
import subprocess
import sys

import pytest

from ctrl_jax.data import dialogues
from ctrl_jax.data.conversations import transcript
from ctrl_jax.data.language import gold_reward
from ctrl_jax.errors import InputError

SPLITS = {"train", "validation", "test"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return dialogues.load("helpful", seed=0, count=2000, data_dir=tmp_path_factory.mktemp("data"))


def test_the_splits_have_their_sizes_and_disjoint_prompts(loaded):
    assert set(loaded) == SPLITS
    assert len(loaded["train"]) == 2000
    texts = {split: {transcript(record.prompt) for record in records} for split, records in loaded.items()}
    assert min(len(loaded[split]) for split in SPLITS) == len(texts["test"]) >= 256
    assert sum(map(len, texts.values())) == len(set.union(*texts.values()))


def test_records_are_one_turn_with_replies(loaded):
    for records in loaded.values():
        for record in records[:50]:
            assert [turn.role for turn in record.prompt] == ["user"]
            assert record.response
            assert record.chosen != record.rejected


def test_the_same_seed_gives_the_same_records_and_another_seed_others(loaded, tmp_path):
    again = dialogues.load("helpful", seed=0, count=2000, data_dir=tmp_path)
    assert again == loaded
    other = dialogues.load("helpful", seed=1, count=10, data_dir=tmp_path)
    assert other["train"] != loaded["train"][:10]


def test_a_larger_set_extends_a_smaller_one(loaded):
    assert list(dialogues.records(dialogues.config("helpful", seed=0, count=30), "train")) == loaded["train"][:30]


def test_preparing_again_reads_what_is_there(tmp_path):
    first = dialogues.load("harmless", seed=3, count=20, data_dir=tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
    assert dialogues.load("harmless", seed=3, count=20, data_dir=tmp_path) == first
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
    assert files


def test_pairs_follow_bradley_terry(loaded):
    pairs = [
        gold_reward(transcript(record.prompt), record.chosen) - gold_reward(transcript(record.prompt), record.rejected)
        for record in loaded["train"]
    ]
    # By size of the difference, the better reply is chosen with probability sigmoid(|difference|).
    for low, high in [(0, 0.5), (0.5, 1), (1, 2), (2, math.inf)]:
        bin_ = [difference for difference in pairs if low <= abs(difference) < high]
        chances = [1 / (1 + math.exp(-abs(difference))) for difference in bin_]
        error = math.sqrt(sum(p * (1 - p) for p in chances))
        assert abs(sum(difference > 0 for difference in bin_) - sum(chances)) < 4 * error, (low, high, len(bin_))
    agreement = sum(difference > 0 for difference in pairs) / len(pairs)
    assert 0.71 < agreement < 0.83


def test_tensorflow_is_never_imported(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ctrl_jax.data import dialogues, tokenizers, pipelines; "
        f"records = dialogues.load('helpful', seed=0, count=50, data_dir=Path({str(tmp_path)!r})); "
        "assert len(records['train']) == 50; assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("bad", [{"side": "nice"}, {"count": 0}, {"seed": -1}])
def test_bad_input_is_named(bad):
    (value,) = bad.values()
    with pytest.raises(InputError, match=str(value)):
        dialogues.config(**{"side": "helpful", "seed": 0, "count": 10} | bad)
