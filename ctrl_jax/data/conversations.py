"""Conversations as turns, and as hh-rlhf writes them in one text; and the record that every source of data gives."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

_MARKER = re.compile(f"({HUMAN}|{ASSISTANT}) ?")


@dataclass(frozen=True)
class Turn:
    role: Literal["system", "user", "assistant"]
    content: str


Conversation = tuple[Turn, ...]
"""Turns in order. At most the first is a system turn. A prompt's last turn is the user's: the reply comes next."""

Written = str | list[dict[str, str]]
"""A prompt as a user wrote it: a text, or a list of messages {role, content}."""


@dataclass(frozen=True)
class Record:
    """A prompt with what the source has for it."""

    prompt: Conversation
    response: str | None = None
    """A demonstration."""
    chosen: str | None = None
    rejected: str | None = None
    written: Written | None = field(default=None, hash=False)
    """The prompt in the form of its source; None where that is the transcript."""
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What else the row says, by column, for a function reward: a verifiable answer, say."""

    @property
    def asked(self) -> Written:
        """The prompt as a function reward reads it."""
        return transcript(self.prompt) if self.written is None else self.written


def messages(conversation: Conversation) -> list[dict[str, str]]:
    """The conversation as a list of {role, content}."""
    return [{"role": turn.role, "content": turn.content} for turn in conversation]


def transcript(conversation: Conversation) -> str:
    """The conversation as hh-rlhf writes it, up to where the reply begins.

    `\\n\\nHuman: ...\\n\\nAssistant: ...\\n\\nHuman: ...\\n\\nAssistant:`; the text of a
    system turn stands first, on its own.
    """
    markers = {"system": "", "user": f"{HUMAN} ", "assistant": f"{ASSISTANT} "}
    return "".join(markers[turn.role] + turn.content for turn in conversation) + ASSISTANT


def parse(text: str) -> Conversation:
    """The prompt that a text is: the reverse of `transcript`, exact where every marker but the last has its space.

    A text without markers is one user turn, without the white space around it.
    """
    if not _MARKER.search(_opened(text)):
        return (Turn("user", text.strip()),)
    found = turns(text)
    return found[:-1] if found and found[-1] == Turn("assistant", "") else found


def turns(text: str) -> Conversation:
    """Every turn of a dialogue in hh-rlhf's form, the last with the reply, be it empty.

    Two turns of one role may follow each other, and the first may be the assistant's. Text before the first marker is
    a system turn.
    """
    before, *rest = _MARKER.split(_opened(text))
    spoken = [
        Turn("user" if marker == HUMAN else "assistant", content)
        for marker, content in zip(rest[::2], rest[1::2], strict=True)
    ]
    return (Turn("system", before), *spoken) if before else tuple(spoken)


def _opened(text: str) -> str:
    """With the two newlines before the first marker, which people leave out."""
    return re.sub(r"\A\s*(?=(Human|Assistant):)", "\n\n", text)
