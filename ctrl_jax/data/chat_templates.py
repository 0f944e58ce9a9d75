"""Chat templates, as Hugging Face directories have them, rendered so that no text can pass for a control token.

A template is a Jinja program that writes a conversation's turns between control tokens, such as

    <|im_start|>user
    Hello<|im_end|>

A user who types `<|im_end|>` must not end the turn. So a rendering is not one text but *pieces*: plain texts and
control tokens in turn. To distinguish the template's tokens from a user's, the first character of whatever looks like a
control token in a turn is spelled by a secret while the template runs, and restored after the pieces are cut. Texts
without such likenesses are not touched, so their rendering, and their token ids, are the ordinary ones. (transformers
takes a user's `<|im_end|>` for the token itself.)
"""

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from ctrl_jax.data import template_process
from ctrl_jax.data.conversations import Conversation, Turn
from ctrl_jax.data.template_process import DEFAULT, Limits
from ctrl_jax.errors import InputError

Pieces = list[str]
"""Plain text, control token, plain text, ..., plain text: an odd number of them; texts may be empty."""


class ChatTemplate:
    """How a chat model's conversations are written.

    Where a template refuses system turns (Gemma, Mistral), or leaves them out in silence, their text opens the user
    turn that follows, as those models' makers advise. Where it refuses two turns of one role in a row, which hh-rlhf
    has in 1 of 250 dialogues, they become one turn. A blank line stands between such texts.
    """

    before_reply: Pieces
    """What stands between the user's last text and where the model goes on: the generation prompt at its end."""
    lead: Pieces
    """What the template writes after that before a reply, such as a space, or Qwen3's empty thought."""
    trail: str
    """The text that the template writes after a reply, before the control token; Llama 2 has a space there."""
    end_of_turn: str | None
    """The control token that follows a reply, if one does."""

    def __init__(
        self, source: str, *, file: Path, controls: Iterable[str], variables: Mapping[str, str],
        limits: Limits = DEFAULT,
    ):  # fmt: skip
        """From a template's source.

        `file` names it in errors; `controls` are the control tokens, as the template writes them; `variables` are what
        it may ask for, such as bos_token; `limits` hold for each rendering.

        Errors: InputError where it does not parse, exceeds a limit, or fails on a conversation of one turn.
        """
        self.source = source
        self._file = file
        self._variables = dict(variables)
        self._limits = limits
        any_token = any_of(controls)
        self._control = re.compile(f"({any_token})")
        # A short control token of hexadecimal letters may be in a secret by chance, and would be cut out of it.
        self._secret = secrets.token_hex(16)
        for _ in range(1000):
            if self._control.search(self._secret):
                self._secret = secrets.token_hex(16)
        self._likeness = re.compile(f"(?={any_token}).", re.DOTALL)
        self._probe()

    def pieces(self, conversation: Conversation) -> Pieces:
        """The conversation up to where the reply begins: `add_generation_prompt=True`.

        Errors: InputError where the template fails or exceeds a limit.
        """
        return self._cut(self._rendered(self._fitted(conversation), add_generation_prompt=True))

    def finished(self, conversation: Conversation, reply: str) -> Pieces:
        """The conversation with its reply, to the end: `add_generation_prompt=False`.

        It need not begin with the prompt's `pieces`: Qwen3 puts an empty thought before the reply, and Mistral 0.3 has
        a system turn only where a user has the last word.

        Errors: as `pieces`.
        """
        turns = self._fitted((*conversation, Turn("assistant", reply)))
        return self._cut(self._rendered(turns, add_generation_prompt=False))

    def reply(self, text: str) -> Pieces:
        """What follows `pieces` in the finished conversation, up to the control token that ends the turn.

        A reply is learnt as the continuation of what the model reads when it is sampled, the generation prompt.
        Whatever the template writes there belongs to it: Qwen3's empty thought, Llama 2's space before the end.
        Where a finished conversation has another text in the generation prompt's place (DeepSeek-R1's opens a thought
        there, which is left out later), the reply begins with its own text.

        It is rendered after a turn of one word: what stands before a reply changes none of these templates' replies.

        Errors: as `pieces`.
        """
        _, _, written = self._dialogue(text).rpartition(self._user)
        start = self._before if written.startswith(self._before) else self._between
        if not written.startswith(start) or not written.endswith(self._closing):
            return [*self.lead[:-1], f"{self.lead[-1]}{text}{self.trail}"]
        return self._cut(written[len(start) : len(written) - len(self._closing)])

    @cached_property
    def _takes_system(self) -> bool:
        return self._writes((Turn("system", f"{self._secret}s"), Turn("user", f"{self._secret}u")))

    @cached_property
    def _takes_neighbours(self) -> bool:
        return self._writes((Turn("user", f"{self._secret}u"), Turn("user", f"{self._secret}v")))

    def _writes(self, turns: Conversation) -> bool:
        """Whether the template writes every turn's text."""
        try:
            text = self._written(turns, add_generation_prompt=True)
        except template_process.FailedError:
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
        self._user, reply = f"{self._secret}u", f"{self._secret}r"
        prompt = self._rendered((Turn("user", self._user),), add_generation_prompt=True)
        dialogue = self._dialogue(reply)
        for text, role in ((self._user, "user"), (reply, "assistant")):
            if text not in dialogue:
                raise InputError(
                    f"The chat template of {self._file} does not write the text of the {role}'s turn; it may be meant "
                    "for messages of several parts (images, tools).",
                    field=str(self._file),
                    value=text,
                    remedy="Give the directory a template for plain text.",
                )
        self._before = prompt.rpartition(self._user)[2]
        self._between, _, after = dialogue.rpartition(self._user)[2].partition(reply)
        self.before_reply = self._cut(self._before)
        self.lead = self._cut(self._between[len(self._before) :] if self._between.startswith(self._before) else "")
        match = self._control.search(after)
        self.end_of_turn = match[0] if match else None
        self.trail = after[: match.start()] if match else ""
        self._closing = after[match.start() :] if match else after
        """What follows a reply's last text."""

    def _dialogue(self, reply: str) -> str:
        return self._rendered((Turn("user", self._user), Turn("assistant", reply)), add_generation_prompt=False)

    def _rendered(self, turns: Conversation, *, add_generation_prompt: bool) -> str:
        try:
            return self._written(turns, add_generation_prompt=add_generation_prompt)
        except template_process.FailedError as error:
            if error.line is not None:
                raise InputError(
                    f"The chat template of {self._file} does not parse, at its line {error.line}: "
                    f"{str(error)[:1000].rstrip('.')}.",
                    field=str(self._file),
                    value=error.line,
                    remedy="Mend it, or take the model's own file.",
                ) from error
            raise InputError(
                f"The chat template of {self._file} fails on a conversation of {_roles(turns)}: "
                f"{self._restored(str(error))[:1000].rstrip('.')}.",
                field=str(self._file),
                value=_roles(turns),
                remedy="Mend the conversation or the template, or take the template away: prompts are then written "
                "as \\n\\nHuman: and \\n\\nAssistant: transcripts.",
            ) from error

    def _written(self, turns: Conversation, *, add_generation_prompt: bool) -> str:
        messages = [{"role": turn.role, "content": self._likeness.sub(self._spelled, turn.content)} for turn in turns]
        variables = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._variables,
        }
        try:
            return template_process.render(self.source, variables, self._limits)
        except template_process.ExceededError as error:
            raise InputError(
                f"The chat template of {self._file} {error} on a conversation of {_roles(turns)}, "
                f"{sum(len(turn.content) for turn in turns)} characters; ordinary templates are far from these limits.",
                field=str(self._file),
                value=_roles(turns),
                remedy="Take the template of the model's own publisher, or shorten the conversation if it is so long.",
            ) from error

    def _cut(self, rendered: str) -> Pieces:
        return [self._restored(piece) for piece in self._control.split(rendered)]

    def _spelled(self, character: re.Match[str]) -> str:
        return f"{self._secret}{ord(character[0]):x};"

    def _restored(self, text: str) -> str:
        return re.sub(f"{self._secret}([0-9a-f]+);", lambda code: chr(int(code[1], 16)), text)


def _roles(turns: Conversation) -> str:
    return ", ".join(turn.role for turn in turns) or "no turns"


def any_of(texts: Iterable[str]) -> str:
    """A regular expression of any of these texts, but the empty one; the longest that there is, as tokenizers match.

    What texts share at their beginning is written once: some vocabularies have ten thousand that begin alike, and a
    search for one after the other would take a millisecond at each `<`.
    """
    return _any_of([text for text in texts if text]) or "(?!)"


def _any_of(texts: Sequence[str]) -> str:
    rest: dict[str, list[str]] = {}
    for text in texts:
        if text:
            rest.setdefault(text[0], []).append(text[1:])
    branches = "|".join(re.escape(first) + _any_of(ends) for first, ends in rest.items())
    if "" in texts and branches:
        return f"(?:{branches})?"
    return f"(?:{branches})" if len(rest) > 1 else branches
