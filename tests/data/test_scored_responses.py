"""Files of scored responses: what is read, in which order, and what is refused, with file, line and fix."""

import gzip
import json

import numpy as np
import pytest

from ctrl_jax.data.scored_responses import in_order_of, read
from ctrl_jax.errors import InputError

ROWS = [
    {"prompt": "What is 1?", "responses": ["one", ""], "rewards": [1, 0.5], "gold": [0.0, -1e-3]},
    {"prompt": [{"role": "user", "content": "And 2?"}], "responses": ["two", "2"], "rewards": [2.0, 3], "gold": [1, 2]},
]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(rows, name="policy.jsonl"):
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path.relative_to(tmp_path)

    return write


@pytest.mark.parametrize("name", ["policy.jsonl", "policy.jsonl.gz"])
def test_the_columns_that_are_asked_for_are_read(write, name):
    found = read(write(ROWS, name), ["rewards", "gold"], texts=True)
    np.testing.assert_array_equal(found.values["rewards"], [[1, 0.5], [2, 3]])
    np.testing.assert_array_equal(found.values["gold"], [[0, -1e-3], [1, 2]])
    assert found.responses == [["one", ""], ["two", "2"]]
    assert [record.asked for record in found.records] == [ROWS[0]["prompt"], ROWS[1]["prompt"]]


def test_texts_are_needed_only_where_they_are_asked_for(write):
    path = write([{"prompt": "a", "rewards": [1, 2]}])
    assert read(path, ["rewards"], texts=False).responses is None
    with pytest.raises(InputError, match=r"policy\.jsonl, line 1 has no 'responses'; it has 'prompt', 'rewards'"):
        read(path, [], texts=True)


def test_the_other_file_is_read_in_the_order_of_the_first(write):
    first = read(write(ROWS), ["rewards"], texts=True)
    back = read(write(ROWS[::-1], "reference.jsonl"), ["rewards"], texts=True)
    found = in_order_of(first, back)
    assert found.records == first.records and found.responses == first.responses
    np.testing.assert_array_equal(found.values["rewards"], first.values["rewards"])
    assert found.places == ["reference.jsonl, line 2", "reference.jsonl, line 1"]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_prompt_of_one_file_alone_is_named(write, swapped):
    more = [*ROWS, *({"prompt": f"What is {i}?", "responses": ["a", "b"], "rewards": [1, 2]} for i in range(3, 8))]
    files = read(write(ROWS), ["rewards"], texts=False), read(write(more, "more.jsonl"), ["rewards"], texts=False)
    with pytest.raises(InputError) as caught:
        in_order_of(*(files[::-1] if swapped else files))
    text = str(caught.value)
    for part in ("more.jsonl, line 3; more.jsonl, line 4", "and 2 more", "not in policy.jsonl", "leave these out"):
        assert part in text


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], r"policy\.jsonl has no rows"),
        ([{"rewards": [1]}], r"line 1 has no 'prompt'; it has 'rewards'"),
        ([{"prompt": "a"}], r"line 1 has no 'rewards'; it has 'prompt'"),
        ([{"prompt": "a", "rewards": 1}], r"line 1: 'rewards' is a number, 1.*a list"),
        ([{"prompt": "a", "rewards": []}], r"line 1: 'rewards' is a list, \[\]"),
        ([{"prompt": "a", "rewards": [1, "2"]}], r"line 1: rewards\[1\] is \"2\".*finite numbers"),
        ([{"prompt": "a", "rewards": [True]}], r"rewards\[0\] is true"),
        (['{"prompt": "a", "rewards": [NaN]}'], r"rewards\[0\] is NaN.*out of both files"),
        (['{"prompt": "a", "rewards": [1e999]}'], r"rewards\[0\] is Infinity"),
        (['{"prompt": "a", "rewards": [1' + 400 * "0" + "]}"], r"line 1: rewards\[0\] is 10000.*finite numbers"),
        ([{"prompt": None, "rewards": [1]}], r"line 1: 'prompt' is null, None.*a text, or a list"),
        (
            [{"prompt": "a", "rewards": [1, 2]}, {"prompt": "b", "rewards": [1]}],
            r"line 2 has 1 rewards, and policy\.jsonl, line 1 has 2 rewards.*the same number",
        ),
        (
            [{"prompt": "a", "rewards": [1, 2], "responses": ["x"]}],
            r"line 1 has 1 responses, and policy\.jsonl, line 1 has 2 rewards",
        ),
        ([{"prompt": "a", "rewards": [1], "responses": [None]}], r"responses\[0\] is null"),
        (
            [{"prompt": "a", "rewards": [1]}, {"prompt": "b", "rewards": [1]}, {"prompt": " a", "rewards": [1]}],
            r"line 3 has the prompt of policy\.jsonl, line 1 again.*one row",
        ),
        (["{"], r"line 1 is not JSON"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line_and_the_fix(write, rows, match):
    texts = any("responses" in row for row in rows if isinstance(row, dict))
    with pytest.raises(InputError, match=match):
        read(write(rows), ["rewards"], texts=texts)
