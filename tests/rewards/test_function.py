"""How a Python function is called as a reward: columns by keyword, prompts as they are written."""

import json

import numpy as np
import pytest

from ctrl_jax.data import files, tokenizers
from ctrl_jax.data.conversations import Record, Turn, messages, parse, transcript
from ctrl_jax.data.corpus import Corpus
from ctrl_jax.data.pipelines import PromptSet, prompt_ids, prompts
from ctrl_jax.errors import InputError
from ctrl_jax.rewards import function as rewards
from ctrl_jax.rewards.function import Function
from ctrl_jax.types import Prompts

TOKENIZER = tokenizers.train([f"What is {i} plus {2 * i}?" for i in range(40)], vocabulary_size=40)
ROWS = [
    {"prompt": f"What is {i} plus 1? ", "response": f"{i + 1}", "answer": i + 1, "topic": "sums"} for i in range(40)
]


def corpus_of(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Corpus(files.load(path).records, TOKENIZER, prompt_length=80, response_length=36)


def called(function, corpus, records, responses):
    columns = corpus.values(rewards.columns_of(function, "rewards:f", corpus.columns))
    of_prompts = [columns[corpus.id_of(record)] for record in records]
    return rewards.rewards(function, "rewards:f", records, responses, of_prompts)


def test_columns_come_by_keyword_once_a_response_and_prompts_as_they_are_written(tmp_path):
    corpus = corpus_of(tmp_path, *ROWS)
    seen = {}

    def reward(prompts, completions, answer, *, topic="none", style="plain"):
        seen.update(prompts=prompts, answer=answer, topic=topic, style=style)
        return [float(str(a) == c) for a, c in zip(answer, completions, strict=True)]

    first, second = corpus.records["train"][:2]
    values = called(reward, corpus, [first, second], [["no", first.response, "no"], [second.response, "no", "no"]])
    np.testing.assert_array_equal(values, [[0, 1, 0], [1, 0, 0]])
    assert seen["prompts"] == [first.asked] * 3 + [second.asked] * 3
    assert all(prompt.endswith("plus 1? ") for prompt in seen["prompts"])
    assert seen["answer"] == [int(first.response)] * 3 + [int(second.response)] * 3
    assert (seen["topic"], seen["style"]) == (["sums"] * 6, "plain")


def test_double_stars_take_every_column(tmp_path):
    corpus = corpus_of(tmp_path, *ROWS)
    seen = {}

    def reward(topic, responses, **columns):
        seen.update(columns)
        return [0.0] * len(responses)

    called(reward, corpus, corpus.records["train"][:1], [["a"]])
    assert seen == {"answer": [int(corpus.records["train"][0].response)]}, "the first is a place, not a name"


def test_a_function_may_change_the_messages_that_it_is_given(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"Hi {i}"}], "response": "Ho"} for i in range(40)]
    corpus = corpus_of(tmp_path, *rows)

    def reward(prompts, responses):
        for prompt, response in zip(prompts, responses, strict=True):
            prompt.append({"role": "assistant", "content": response})
        return [float(len(prompt)) for prompt in prompts]

    records = corpus.records["train"][:1]
    for _ in range(2):
        np.testing.assert_array_equal(called(reward, corpus, records, [["a", "b"]]), [[2, 2]])
    assert records[0].asked == messages(records[0].prompt)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            lambda prompts, responses, solution: [],
            "asks for solution, .* are answer, topic. .*solution=COL",
        ),
        (lambda prompts, responses, *, solution, answer: [], "asks for solution, which"),
        (lambda responses: [], r"rewards:f\(responses\) must take prompts and responses"),
    ],
)
def test_what_a_function_asks_for_and_the_data_lacks_is_refused_at_once(tmp_path, function, words):
    corpus = corpus_of(tmp_path, *ROWS)
    with pytest.raises(InputError, match=words):
        rewards.check(Function("rewards:f", function, {}), corpus)


def test_functions_without_a_signature_of_their_own_are_called_with_both(tmp_path):
    corpus = corpus_of(tmp_path, *ROWS)
    assert rewards.columns_of(max, "rewards:f", corpus.columns) == ()
    assert rewards.columns_of(lambda *both: [], "rewards:f", corpus.columns) == ()
    rewards.check(Function("rewards:f", lambda *both: [float(len(both))], {}), corpus)


def test_a_function_that_fails_is_refused_with_its_line(tmp_path):
    def reward(prompts, responses):
        return [response.nowhere for response in responses]

    with pytest.raises(InputError, match=r"failed with AttributeError: .*nowhere.*test_function.py, line \d+"):
        rewards.check(Function("rewards:f", reward, {}), corpus_of(tmp_path, *ROWS))


def test_two_values_for_one_prompt_are_refused_where_they_are_asked_for(tmp_path):
    row = ROWS[0]
    corpus = corpus_of(tmp_path, row, row | {"topic": None}, row | {"answer": 7, "response": "7"}, *ROWS[1:])

    def exact(prompts, responses, answer):
        return [0.0] * len(responses)

    def by_topic(prompts, responses, topic):
        assert set(topic) == {"sums"}, "a row without a value leaves it to the others"
        return [0.0] * len(responses)

    with pytest.raises(InputError, match=r"'What is 0 plus 1\?' has two values of 'answer', 1 and 7"):
        rewards.check(Function("rewards:f", exact, {}), corpus)
    rewards.check(Function("rewards:f", by_topic, {}), corpus)


def of_elsewhere(*texts):
    records = [Record(parse(text)) for text in texts]
    return prompts(records, TOKENIZER, prompt_length=200)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q {}?"}, "And you?"),
        ({"prompt": [{"role": "user", "content": "Q {}?"}]}, [{"role": "user", "content": "And you?"}]),
        ({"prompt": "\n\nHuman: Q {}?\n\nAssistant:"}, "\n\nHuman: And you?\n\nAssistant:"),
    ],
)
def test_a_prompt_from_elsewhere_has_the_form_of_the_data(tmp_path, row, expected):
    rows = [json.loads(json.dumps(row).replace("{}", str(i))) for i in range(40)]
    corpus = corpus_of(tmp_path, *rows)
    own = corpus.prompts("train", 1)
    assert corpus.remember(own)
    for _ in range(2):
        stranger = of_elsewhere("And you?")
        assert not corpus.remember(stranger), "it has no columns, however often it is asked"
    assert [record.asked for record in corpus.asked(stranger.prompts)] == [expected]
    (first,) = corpus.asked(own.prompts)
    assert transcript(first.prompt) == own.texts[0]
    assert first.asked == corpus.records["train"][0].asked


def test_rewards_are_of_the_prompts_ids(tmp_path):
    corpus = corpus_of(tmp_path, *ROWS)
    records = corpus.records["train"]
    ids = prompt_ids([transcript(record.prompt) for record in records])[::-1]
    found = corpus.asked(Prompts(np.zeros((len(ids), 1)), np.ones(len(ids)), ids))
    assert found == records[::-1]
    assert isinstance(corpus.prompts("train", 2), PromptSet)
    assert corpus.conversations(Prompts(np.zeros((1, 1)), np.ones(1), ids[:1])) == [records[-1].prompt]
    assert records[0].prompt == (Turn("user", records[0].asked.strip()),)
