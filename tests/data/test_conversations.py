import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_jax.data.conversations import Turn, parse, transcript, turns
from ctrl_jax.data.language import requests

USER = Turn("user", "Why is the sky blue?")
REPLY = Turn("assistant", "It scatters.\n\nBlue most of all.")
MORE = Turn("user", "And red?")


@pytest.mark.parametrize(
    ("conversation", "text"),
    [
        ((USER,), "\n\nHuman: Why is the sky blue?\n\nAssistant:"),
        (
            (USER, REPLY, MORE),
            "\n\nHuman: Why is the sky blue?\n\nAssistant: It scatters.\n\nBlue most of all.\n\nHuman: And red?"
            "\n\nAssistant:",
        ),
        ((Turn("system", "Be brief."), MORE), "Be brief.\n\nHuman: And red?\n\nAssistant:"),
        ((USER, MORE), "\n\nHuman: Why is the sky blue?\n\nHuman: And red?\n\nAssistant:"),
        ((REPLY, MORE), "\n\nAssistant: It scatters.\n\nBlue most of all.\n\nHuman: And red?\n\nAssistant:"),
    ],
)
def test_a_transcript_is_written_and_read_back(conversation, text):
    assert transcript(conversation) == text
    assert parse(text) == conversation


# Any content that holds no marker; the newline is common, so that it meets the markers' own.
CONTENTS = st.text(st.one_of(st.just("\n"), st.characters(exclude_categories=["Cs"])))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), CONTENTS)), CONTENTS)
def test_any_conversation_round_trips(spoken, last):
    conversation = (*spoken, Turn("user", last))
    assert parse(transcript(conversation)) == conversation
    assert transcript(parse(transcript(conversation))) == transcript(conversation)


@pytest.mark.parametrize("side", ["helpful", "harmless"])
def test_every_prompt_of_the_dialogues_round_trips(side):
    prompts = [prompt for _, prompt in requests(side)]
    assert len(prompts) > 1000
    assert [transcript(parse(prompt)) for prompt in prompts] == prompts


def test_a_plain_request_is_one_user_turn():
    assert parse("  Why is the sky blue?\n") == (USER,)
    assert parse("Human resources:\n\nAssistants wanted") == (Turn("user", "Human resources:\n\nAssistants wanted"),)


def test_what_people_leave_out_is_understood():
    for text in ("Human: And red?\n\nAssistant:", "\nHuman: And red?", "\n\nHuman:And red?\n\nAssistant: "):
        assert parse(text) == (MORE,)


def test_a_dialogue_keeps_its_reply_even_an_empty_one():
    assert turns(transcript((USER,)) + " It scatters.\n\nBlue most of all.") == (USER, REPLY)
    for end in ("", " "):
        assert turns(transcript((USER, REPLY, MORE)) + end) == (USER, REPLY, MORE, Turn("assistant", ""))
    assert turns("No marker") == (Turn("system", "No marker"),)
