"""How a prompt and its reply stand in one text, for a model that reads them without a chat template."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ctrl_jax.data.conversations import Conversation, transcript

Format = Literal["chat", "plain"]
"""What a prompt is: a conversation, or a text to continue."""


@dataclass(frozen=True)
class Form:
    """The text of a prompt, and of a reply behind it."""

    prompt: Callable[[Conversation], str]
    """A prompt's text, up to where the reply begins."""
    lead: str
    """Stands between them."""
    trimmed: Callable[[str], str]
    """What counts of a reply's text."""

    def reply(self, text: str) -> str:
        """A reply as it stands behind the prompt; of an empty one nothing."""
        kept = self.trimmed(text)
        return f"{self.lead}{kept}" if kept else ""


TRANSCRIPT = Form(transcript, " ", str.strip)
"""hh-rlhf's Human and Assistant. A reply has no white space around it, and follows its marker after a space."""
PLAIN = Form(lambda conversation: conversation[0].content, "", str)
"""A text of one turn that goes on in the reply, both as they are written, to the last space."""

FORMS: dict[Format, Form] = {"chat": TRANSCRIPT, "plain": PLAIN}
