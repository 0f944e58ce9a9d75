import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctrl_jax.data import hh_rlhf
from ctrl_jax.data.conversations import Record, Turn, parse, transcript, turns
from ctrl_jax.errors import InputError

REAL = Path(os.environ.get("CTRL_JAX_HH_RLHF", "none"))
real = pytest.mark.skipif(not REAL.is_dir(), reason="set CTRL_JAX_HH_RLHF to a directory of published hh-rlhf files")


def row(request, chosen="Gladly.", rejected="Later."):
    return {
        side: f"{transcript(parse(request))} {reply}" for side, reply in (("chosen", chosen), ("rejected", rejected))
    }


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


TALK = "\n\nHuman: How do I boil an egg?\n\nAssistant: In water.\n\nFor how long?\n\nHuman: Soft.\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            row(TALK, " Six\n\nminutes. ", "Two."),
            Record(
                (
                    Turn("user", "How do I boil an egg?"),
                    Turn("assistant", "In water.\n\nFor how long?"),
                    Turn("user", "Soft."),
                ),
                chosen="Six\n\nminutes.",
                rejected="Two.",
            ),
        ),
        (row("Hi", ""), "empty response"),
        (row("Hi", "Ho", " \n"), "empty response"),
        (row("Hi", "Ho", "Ho "), "chosen equals rejected"),
        (row("Hi") | {"chosen": row("Hello")["chosen"]}, "prompts differ"),
        (row("Hi") | {"rejected": row(TALK)["rejected"]}, "prompts differ"),
        (row("Hi") | {"rejected": row("Hi")["rejected"] + "\n\nHuman: Bye"}, "no assistant turn last"),
        ({"chosen": "", "rejected": ""}, "no assistant turn last"),
        (row("\n\nHuman: Hi\n\nAssistant: Ho\n\nAssistant:"), "turns do not alternate"),
        (row("\n\nHuman: Hi\n\nHuman: You?\n\nAssistant:"), "turns do not alternate"),
        (row("\n\nAssistant: Hi\n\nHuman: Ho\n\nAssistant:"), "turns do not alternate"),
        ({"chosen": "\n\nAssistant: Hi", "rejected": "\n\nAssistant: Ho"}, "turns do not alternate"),
        (row("\n\nHuman: \n\nAssistant:"), "empty turn"),
    ],
)
def test_a_row_is_a_pair_or_says_why_not(row, expected):
    assert hh_rlhf.read_row(row, "here") == expected


def test_the_published_layout_keeps_its_test_split(tmp_path):
    train = [row(f"Question {i}?") for i in range(200)] + [row("Question 3 of the test?")]
    test = [row(f"Question {i} of the test?") for i in range(5)] + [row("Hi", "", "Ho")]
    write(tmp_path / "copy" / "helpful-online" / "train.jsonl.gz", train)
    write(tmp_path / "copy" / "helpful-online" / "test.jsonl.gz", test)
    loaded = hh_rlhf.load("helpful-online", path=tmp_path / "copy", data_dir=tmp_path / "data")
    found = {split: [record.prompt[0].content for record in records] for split, records in loaded.records.items()}
    assert found["test"] == [f"Question {i} of the test?" for i in range(5)]
    assert found["validation"], "about ten"
    assert set(found["train"] + found["validation"]) == {f"Question {i}?" for i in range(200)}
    assert loaded.dropped == {"prompt in another split": 1, "empty response": 1}
    assert loaded.rows == 207
    record = loaded.records["test"][0]
    assert (record.response, record.chosen, record.rejected) == ("Gladly.", "Gladly.", "Later.")
    assert hh_rlhf.load("helpful-online", path=tmp_path / "copy", data_dir=tmp_path / "data") == loaded


@pytest.mark.parametrize("name", ["harmless-base.jsonl.gz", "harmless-base.jsonl", "harmless-base/test.jsonl.gz"])
def test_one_file_is_cut_into_disjoint_splits(name, tmp_path):
    rows = [row(f"Question {i}?") for i in range(60) for _ in range(2)]
    path = write(tmp_path / name, rows)
    loaded = hh_rlhf.load("harmless-base", path=tmp_path, data_dir=tmp_path / "data")
    prompts = [{record.prompt for record in records} for records in loaded.records.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 60
    assert all(prompts)
    assert hh_rlhf.load("harmless-base", path=path, data_dir=tmp_path / "other") == loaded


def test_a_changed_file_is_prepared_anew(tmp_path):
    for request in ("One?", "Two?"):
        write(tmp_path / "helpful-base.jsonl", [row(request)])
        loaded = hh_rlhf.load("helpful-base", path=tmp_path, data_dir=tmp_path / "data")
        assert [record.prompt for records in loaded.records.values() for record in records] == [parse(request)]


def test_bad_lines_are_named_and_leave_nothing_behind(tmp_path):
    path = write(tmp_path / "helpful-base.jsonl", [row("Hi"), {"chosen": "only"}])
    with pytest.raises(InputError, match=rf"^{path}, line 2 has no 'rejected'; it has 'chosen'"):
        hh_rlhf.load("helpful-base", path=tmp_path, data_dir=tmp_path / "data")
    write(path, [row("Hi"), row("Ho")])
    assert hh_rlhf.load("helpful-base", path=tmp_path, data_dir=tmp_path / "data").rows == 2


def test_a_folder_without_the_subset_is_named_with_what_was_looked_for(tmp_path):
    write(tmp_path / "helpful-base.jsonl", [row("Hi")])
    with pytest.raises(InputError) as caught:
        hh_rlhf.load("harmless-base", path=tmp_path, data_dir=tmp_path / "data")
    for word in (str(tmp_path), "harmless-base/train.jsonl.gz", "harmless-base.jsonl.gz", "`data.path`"):
        assert word in str(caught.value)


def test_a_download_is_checked_kept_and_read(tmp_path, monkeypatch):
    copies = {split: write(tmp_path / f"{split}.jsonl.gz", [row(f"{split} {i}") for i in range(30)])
              for split in ("train", "test")}  # fmt: skip
    asked = []

    def fetch(url, target, **expected):
        asked.append((url, target.relative_to(tmp_path), expected))
        return copies[target.name.split(".")[0]]

    monkeypatch.setattr(hh_rlhf, "fetch", fetch)
    for _ in range(2):
        loaded = hh_rlhf.load("helpful-base", path=None, data_dir=tmp_path / "data")
        assert (loaded.rows, len(loaded.records["test"])) == (60, 30)
    assert [url for url, _, _ in asked] == [
        f"https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/helpful-base/{split}.jsonl.gz"
        for split in ("train", "test")
    ]
    assert len({target for _, target, _ in asked}) == 2
    assert all(set(expected) == {"size", "sha256"} for _, _, expected in asked)
    assert asked[0][2]["size"] == 16_200_131


def test_a_failed_download_names_the_way_out(tmp_path, monkeypatch):
    # Port 9 of this machine has no server.
    monkeypatch.setattr(hh_rlhf, "URL", "http://127.0.0.1:9/{file}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/harmless-base/train.*give `data.path`"):
        hh_rlhf.load("harmless-base", path=None, data_dir=tmp_path)


def test_the_recorded_checksums_are_sha256():
    assert {file.split("/")[1] for file in hh_rlhf.PUBLISHED} == {"train", "test"}
    assert len(hh_rlhf.PUBLISHED) == 2 * len(hh_rlhf.SUBSETS) == 8
    for size, sha256 in hh_rlhf.PUBLISHED.values():
        assert sha256 is None or len(bytes.fromhex(sha256)) == hashlib.sha256().digest_size
        assert sha256 is None or size is not None


def test_tensorflow_is_never_imported(tmp_path):
    write(tmp_path / "helpful-base.jsonl", [row("Hi")])
    code = (
        "import sys; from pathlib import Path; from ctrl_jax.data import hh_rlhf; "
        f"hh_rlhf.load('helpful-base', path=Path({str(tmp_path)!r}), data_dir=Path({str(tmp_path / 'data')!r})); "
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@real
@pytest.mark.parametrize("subset", ["helpful-base", "harmless-base"])
def test_real_rows(subset, tmp_path):
    with gzip.open(REAL / f"{subset}.jsonl.gz", "rt", encoding="utf-8") as file:
        dialogues = [json.loads(line) for line in file]
    for text in (row[side] for row in dialogues for side in ("chosen", "rejected")):
        *prompt, reply = turns(text)
        assert f"{transcript(tuple(prompt))} {reply.content}" == text

    loaded = hh_rlhf.load(subset, path=REAL, data_dir=tmp_path)
    kept = [record for records in loaded.records.values() for record in records]
    assert loaded.rows == len(dialogues) == len(kept) + sum(loaded.dropped.values())
    # Counted here by the text before the last marker, without turns.
    halves = [[row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")] for row in dialogues]
    differ = [chosen[0] != rejected[0] for chosen, rejected in halves]
    empty = [not chosen[2].strip() or not rejected[2].strip() for chosen, rejected in halves]
    assert loaded.dropped["prompts differ"] == sum(differ)
    assert loaded.dropped["empty response"] == sum(b and not a for a, b in zip(differ, empty, strict=True))
    texts = [{transcript(record.prompt) for record in records} for records in loaded.records.values()]
    assert sum(map(len, texts)) == len(set.union(*texts))
    by_pair = {(row["chosen"], row["rejected"]) for row in dialogues}
    assert all(record.chosen and record.rejected and record.chosen != record.rejected for record in kept)
    stripped = {(chosen.rstrip(), rejected.rstrip()) for chosen, rejected in by_pair}
    for record in kept:
        prompt = transcript(record.prompt)
        assert (f"{prompt} {record.chosen}", f"{prompt} {record.rejected}") in stripped
