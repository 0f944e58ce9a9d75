"""Chat templates, as Hugging Face directories have them, rendered so that no text can pass for a control token.

A template is a Jinja program that writes a conversation's turns between control tokens, such as

    <|im_start|>user
    Hello<|im_end|>

A user who types `<|im_end|>` must not end the turn. So a rendering is not one text but *pieces*: plain texts and
control tokens in turn. To tell the template's tokens from a user's, the first character of whatever looks like a
control token in a turn is spelled by a secret while the template runs, and restored after the pieces are cut. Texts
without such likenesses are not touched, so their rendering, and their token ids, are the ordinary ones. (transformers
takes a user's `<|im_end|>` for the token itself.)
"""

import json
import re
import secrets
from collections.abc import Collection, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ctrl_jax.data.conversations import Conversation, Turn
from ctrl_jax.errors import InputError

Pieces = list[str]
"""Plain text, control token, plain text, ..., plain text: an odd number of them; texts may be empty."""

_TODAY = datetime(2024, 7, 26)
"""What a template is told of the date: the day that Llama 3's templates fall back to. The real one would change the
prompts, and with them every stage, at midnight."""


class ChatTemplate:
    """How a chat model's conversations are written.

    Where a template refuses system turns (Gemma, Mistral), or leaves them out in silence, their text opens the user
    turn that follows, as those models' makers advise. Where it refuses two turns of one role in a row, which hh-rlhf
    has in 1 of 250 dialogues, they become one turn. A blank line stands between such texts.
    """

    before_reply: Pieces
    """What stands between the user's last text and the reply."""
    lead: str
    """The white space that the template writes before a reply."""
    end_of_turn: str | None
    after_turn: str
    """The white space that the template writes after it."""
    """The control token that follows a reply, if one does."""

    def __init__(self, source: str, *, file: Path, controls: Collection[str], variables: Mapping[str, str]):
        """From a template's source.

        `file` names it in errors; `controls` are the control tokens, as the template writes them; `variables` are what
        it may ask for, such as bos_token.

        Errors: InputError where it does not parse, or fails on a conversation of one turn.
        """
        self.source = source
        self._file = file
        self._variables = dict(variables)
        self._secret = secrets.token_hex(16)
        # The longest first, as tokenizers match them; the look at the first character is for speed.
        tokens = sorted(filter(None, controls), key=len, reverse=True)
        first = "".join(sorted({re.escape(token[0]) for token in tokens}))
        any_token = f"(?=[{first}])(?:{'|'.join(map(re.escape, tokens))})" if tokens else "(?!)"
        self._control = re.compile(f"({any_token})")
        self._likeness = re.compile(f"(?={any_token}).", re.DOTALL)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"The chat template of {file} does not parse, at its line {error.lineno}: {error.message}. Mend it, or "
                "take the model's own file."
            ) from error
        self._probe()

    def pieces(self, conversation: Conversation) -> Pieces:
        """The conversation up to where the reply begins. Errors: InputError where the template fails."""
        return self._cut(self._rendered(self._fitted(conversation), add_generation_prompt=True))

    @cached_property
    def _takes_system(self) -> bool:
        return self._writes((Turn("system", f"{self._secret}s"), Turn("user", f"{self._secret}u")))

    @cached_property
    def _takes_neighbours(self) -> bool:
        return self._writes((Turn("user", f"{self._secret}u"), Turn("user", f"{self._secret}v")))

    def _writes(self, turns: Conversation) -> bool:
        """Whether the template writes every turn's text."""
        try:
            text = self._rendered(turns, add_generation_prompt=True)
        except InputError:
            return False
        return all(turn.content in text for turn in turns)

    def _fitted(self, conversation: Conversation) -> Conversation:
        fitted: list[Turn] = []
        joined = False
        for turn in conversation:
            follows_system = joined
            joined = turn.role == "system" and not self._takes_system
            if joined:
                turn = Turn("user", turn.content)
            neighbour = bool(fitted) and fitted[-1].role == turn.role
            if neighbour and (follows_system or not self._takes_neighbours):
                turn = Turn(turn.role, f"{fitted.pop().content}\n\n{turn.content}")
            fitted.append(turn)
        return tuple(fitted)

    def _probe(self) -> None:
        """Learns from two renderings what stands around a reply."""
        user, reply = f"{self._secret}u", f"{self._secret}r"
        prompt = self._rendered((Turn("user", user),), add_generation_prompt=True)
        dialogue = self._rendered((Turn("user", user), Turn("assistant", reply)), add_generation_prompt=False)
        for text, role in ((user, "user"), (reply, "assistant")):
            if text not in dialogue:
                raise InputError(
                    f"The chat template of {self._file} does not write the text of the {role}'s turn; it may be meant "
                    "for messages of several parts (images, tools). Give the directory a template for plain text."
                )
        before = prompt.rpartition(user)[2]
        between, _, after = dialogue.rpartition(user)[2].partition(reply)
        lead = between.removeprefix(before)
        # A template may write more than white space there (an empty thought); the model is left to write that.
        self.lead = lead if between.startswith(before) and not lead.strip() else ""
        self.before_reply = self._cut(before)
        match = self._control.search(after)
        self.end_of_turn = match[0] if match else None
        tail = after[match.end() :] if match else ""
        self.after_turn = tail if not tail.strip() else ""

    def _rendered(self, turns: Conversation, *, add_generation_prompt: bool) -> str:
        messages = [{"role": turn.role, "content": self._likeness.sub(self._spelled, turn.content)} for turn in turns]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except Exception as error:  # A template is a program: it may fail in any way.
            roles = ", ".join(turn.role for turn in turns) or "no turns"
            raise InputError(
                f"The chat template of {self._file} fails on a conversation of {roles}: "
                f"{self._restored(str(error)) or type(error).__name__}. Mend the conversation or the template, or take "
                "the template away: prompts are then written as \\n\\nHuman: and \\n\\nAssistant: transcripts."
            ) from error

    def _cut(self, rendered: str) -> Pieces:
        return [self._restored(piece) for piece in self._control.split(rendered)]

    def _spelled(self, character: re.Match[str]) -> str:
        return f"{self._secret}{ord(character[0]):x};"

    def _restored(self, text: str) -> str:
        return re.sub(f"{self._secret}([0-9a-f]+);", lambda code: chr(int(code[1], 16)), text)


class _Generation(Extension):
    """`{% generation %}` marks a reply for trainers that mask; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The settings, filters and functions that templates are written for.

    https://huggingface.co/docs/transformers/chat_templating_writing
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    # Jinja's own escapes for HTML.
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _TODAY.strftime
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
