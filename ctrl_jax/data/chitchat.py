"""Chats of two people, which the package chitchat-dataset brings with it: nothing to download.

7,168 conversations of BYU's Chit-Chat Challenge, about an opening question or anything else; MIT licence. Myers,
Etchart and Fulda 2020, "Conversational Scaffolding: An Analogy-Based Approach to Response Prioritization in Open-Domain
Dialogs"; github.com/BYU-PCCL/chitchat-dataset. Contains names and coarse words.
"""

import importlib.util
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ctrl_jax.data import rows
from ctrl_jax.data.conversations import Conversation, Record, Turn
from ctrl_jax.data.splits import SPLITS, Loaded, arranged, defect, uniform
from ctrl_jax.errors import InputError

PACKAGE = "chitchat_dataset"
FILE = "dataset.json"
TURNS = 7
"""The most turns of a prompt, the latest ones: some conversations have hundreds."""


def load(path: Path | None) -> Loaded:
    """A record for each reply of the second speaker, who is the assistant; the one who began is the user.

    The prompt is the `TURNS` turns before the reply, which is the demonstration; messages that a speaker sends in a row
    are one turn, a line each. A conversation's id decides its split: 80, 10 and 10 % by its hash. The first records of
    a split are of different conversations, then come second ones, and so on: a few hundred prompts are as many voices.

    Args:
      path: a copy of the package's dataset.json, or a folder that has it; None is the installed package's.

    Raises:
      InputError: if there is no such file, or it has another form; then with the conversation.
    """
    source = file(path)
    drawn: dict[str, list[tuple[int, float, int, Record]]] = {split: [] for split in SPLITS}
    dropped = Counter[str]()
    conversations = _read(source)
    for name, conversation in conversations.items():
        replies = _replies(_turns(conversation, f"{source}, conversation {name}"))
        dropped.update(reply for reply in replies if isinstance(reply, str))
        # Which of a conversation's replies comes first is drawn: each first one follows a greeting.
        found = sorted((uniform(f"{name} {i}"), i, one) for i, one in enumerate(replies) if isinstance(one, Record))
        split = SPLITS[sum(uniform(name) >= share for share in (0.8, 0.9))]
        drawn[split] += [(place, *one) for place, one in enumerate(found)]
    published = {split: [record for *_, record in sorted(found)] for split, found in drawn.items()}
    return arranged(published, dropped, f"{len(conversations)} conversations, split by a hash of their ids")


def file(path: Path | None) -> Path:
    """The dataset.json at `path`, or that of the installed package.

    Raises:
      InputError: if there is none.
    """
    if path is not None:
        found = path / FILE if path.is_dir() else path
        if not found.is_file():
            raise InputError(
                f"There are no conversations at {path}: it has no {FILE}",
                field="data.path",
                value=str(path),
                remedy="give `data.path` the one of the package chitchat-dataset, or leave it out.",
            )
        return found
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise InputError(
            "`data.source` is chitchat, and chitchat-dataset, the package of these conversations, is not installed",
            field="data.source",
            value="chitchat",
            remedy="run `make setup EXTRA=chitchat`, or give `data.path` a copy of its dataset.json.",
        )
    return Path(package.submodule_search_locations[0]) / FILE


def _read(path: Path) -> dict[str, Any]:
    try:
        conversations = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read: {error}",
            field=str(path),
            value=None,
            remedy="copy it again from the package chitchat-dataset.",
        ) from error
    if not isinstance(conversations, dict):
        raise InputError(
            f"{path} is {rows.kind(conversations)}",
            field=str(path),
            value=rows.shown(conversations),
            remedy="it must be an object of conversations by their ids.",
        )
    return conversations


def _turns(conversation: Any, place: str) -> Conversation:
    """What two speakers said in turn. Errors: InputError where it is not of the published form."""
    groups = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise InputError(
            f"{place}: its 'messages' are {rows.shown(groups)}",
            field=place,
            value=rows.shown(groups),
            remedy="they must be a list of lists of messages {text, sender}.",
        )
    messages = [message for group in groups for message in group]
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(
                f"{place}: message {i + 1} is {rows.kind(message)}, {rows.shown(message)}",
                field=place,
                value=rows.shown(message),
                remedy="it must be an object {text, sender}.",
            )
    said = [tuple(rows.text_of(message, field, place) for field in ("sender", "text")) for message in messages]
    by_speaker = itertools.groupby(said, key=lambda message: message[0])
    texts = ["\n".join(text.strip() for _, text in group if text.strip()) for _, group in by_speaker]
    return tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))


def _replies(turns: Conversation) -> list[Record | str]:
    """The assistant's replies with the turns before them, or why one is left out."""
    replies: list[Record | str] = []
    for i in range(1, len(turns), 2):
        record = Record(turns[max(0, i - TURNS) : i], response=turns[i].content)
        replies.append(defect(record) or ("empty turn" if not all(turn.content for turn in record.prompt) else record))
    return replies or ["no reply"]
