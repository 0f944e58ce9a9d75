"""What a row of a file of one's own says: a prompt, and perhaps a demonstration, a preference pair, other columns."""

import itertools
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ctrl_jax.data.conversations import Conversation, Record, Turn, Written, messages, parse, turns
from ctrl_jax.data.splits import defect
from ctrl_jax.errors import InputError

Row = dict[str, Any]
"""A row by column, its values as JSON has them; Parquet and Arrow have other types too, which no field may have."""

FIELDS = ("prompt", "messages", "response", "chosen", "rejected")
"""What is read of a row; its other columns reach a function reward."""
GIVEN = "given"
"""The source of prompts that a program gives (ctrl_jax.align); no file holds them."""
REPLIES = ("response", "chosen", "rejected")
FOREIGN = {
    "prompt": ("instruction", "question", "query", "problem", "input"),
    "messages": ("conversations", "conversation", "dialogue", "dialog"),
    "response": ("completion", "output"),
}
"""What other projects call a field."""
GRADES = ("label", "score")
"""What other projects call the grade of a reply. Here every demonstration is learned as a good one."""
MESSAGE_PARTS = ("tool_calls", "function_call", "tools", "images", "audio", "reasoning_content", "thinking")
"""Parts of a message that change what it says, and that are not read."""
SHARE_GPT = {"human": "user", "gpt": "assistant"}


class _Statement(NamedTuple):
    """What a field says: the turns before a reply, and the reply; None where it says nothing of one of them."""

    field: str
    earlier: Conversation | None
    reply: str | None = None


def read_row(row: Row, place: str, mapping: Mapping[str, tuple[str, ...]] | None = None) -> Record | str:
    """The record of a row, its replies without the white space around them; or why it is to be dropped.

    `prompt` is a text (hh-rlhf's form is read as turns; any other is one user turn) or a list of messages {role,
    content}; of `messages` the last is the demonstration if it is the assistant's. `response`, `chosen` and `rejected`
    are texts, or lists of messages that end with the assistant's: after the prompt's turns, or with them in front. The
    turns before the last of `chosen` and `rejected` are the prompt where nothing else is. None is absent. Whatever else
    the row has is in the record's `columns`.

    Args:
      mapping: of names that are read here, and of columns to keep, to the columns of the file; the texts of several
        columns are joined by a blank line.

    Errors: InputError with the place where a field has another form, where two fields contradict each other, or where
    the row has what other projects call a field, under a name that is not read.
    """
    fields, columns = _divided(row, place, mapping or {})
    prompts = [_prompt(fields["prompt"], place)] if "prompt" in fields else []
    if "messages" in fields:
        prompts.append(_whole(_messages(fields["messages"], "messages", place), "messages"))
    prompt = _agreed(prompts, place)
    replies = [_reply(fields[name], name, place) for name in REPLIES if name in fields]
    if prompts and prompts[-1].reply is not None:
        replies.append(prompts[-1])
    wholes = {reply.field: _placed(reply, prompt, prompts, place) for reply in replies}
    if _differ(wholes.get("chosen"), wholes.get("rejected")):
        return "turns of chosen and rejected differ before the last"
    prompt, source = _common(wholes, prompt, prompts, place)
    if prompt is None:
        problem = f"{place} has no prompt; it has {listed(row)}."
        raise InputError(problem, field=place, value=[*row], remedy=_hint(fields, columns))
    _check_prompt(prompt, source, place)
    texts = {reply.field: reply.reply for reply in replies}
    record = Record(
        prompt, _one_response(texts, place), texts.get("chosen"), texts.get("rejected"),
        written=_written(fields, prompt), columns=columns,
    )  # fmt: skip
    return defect(record) or record


def read_plain_row(row: Row, place: str, mapping: Mapping[str, tuple[str, ...]] | None = None) -> Record | str:
    """The record of a row of texts, kept as they are written: a prompt to continue, and what follows it.

    The prompt is one user turn, whatever it says. Otherwise as `read_row`.

    Errors: InputError as `read_row`; and where a field has messages.
    """
    fields, columns = _divided(row, place, mapping or {})
    for name, value in fields.items():
        if name == "messages" or isinstance(value, list):
            raise InputError(
                f"{place}: {name!r} is {kind(value)}, {shown(value)}, and of plain rows each field is a text: a chat "
                "template alone can write messages",
                field="data.format",
                value="plain",
                remedy="give texts, or `data.format=chat`.",
            )
    texts = {name: text_of(fields, name, place) for name in ("prompt", *(name for name in REPLIES if name in fields))}
    prompt = texts.pop("prompt")
    if not prompt.strip():
        problem = f"{place}: the prompt is empty"
        raise InputError(problem, field=place, value=prompt, remedy="give it a text or leave the line out.")
    record = Record((Turn("user", prompt),), **texts, written=prompt, columns=columns)
    return defect(record) or record


def _divided(row: Row, place: str, mapping: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a row that are not null, and its other columns."""
    named = _named(row, mapping, place)
    columns = {name: value for name, value in named.items() if name not in FIELDS}
    fields = {name: value for name, value in named.items() if name in FIELDS and value is not None}
    _check_names(fields, columns, mapping, place)
    return fields, columns


def text_of(row: Mapping[str, Any], name: str, place: str) -> str:
    """A field that has to be a text. Errors: InputError with the place."""
    if name not in row:
        problem = f"{place} has no {name!r}; it has {listed(row)}."
        raise InputError(problem, field=place, value=[*row], remedy="Add it, or leave the row out.")
    if not isinstance(row[name], str):
        problem = f"{place}: {name!r} must be a text, and is {kind(row[name])}, {shown(row[name])}"
        raise InputError(problem, field=place, value=row[name], remedy="mend the row, or leave it out.")
    return row[name]


def _named(row: Row, mapping: Mapping[str, tuple[str, ...]], place: str) -> dict[str, Any]:
    """The row under the names that are read here."""
    mapped = {column for columns in mapping.values() for column in columns}
    named = {name: value for name, value in row.items() if name not in mapped and name not in mapping}
    for name, columns in mapping.items():
        if len(columns) == 1:
            named[name] = row.get(columns[0])
        else:
            present = [text_of(row, column, place) for column in columns if row.get(column) is not None]
            named[name] = "\n\n".join(text for text in present if text.strip()) if present else None
    return named


def _check_names(fields: Mapping[str, Any], columns: Mapping[str, Any], mapping: Mapping[str, Any], place: str) -> None:
    """Refuses what other projects call a field that the row lacks: it would be left out without a word."""
    if ("chosen" in fields) != ("rejected" in fields):
        has, lacks = ("chosen", "rejected") if "chosen" in fields else ("rejected", "chosen")
        raise InputError(
            f"{place} has {has!r} but no {lacks!r}",
            field=place,
            value=fields[has],
            remedy="a preference pair needs both.",
        )
    unmapped = {name for name, value in columns.items() if value not in (None, "", []) and name not in mapping}
    if not {"prompt", "messages", "chosen"} & fields.keys():
        asked = [f"{name}={'+'.join(mapping[name])}" for name in ("prompt", "messages") if name in mapping]
        raise InputError(
            f"{place} has neither 'prompt' nor 'messages'{f' (by `data.columns` {asked[0]})' if asked else ''}; it has "
            f"{listed({**fields, **columns})}.",
            field=place,
            value=[*fields, *columns],
            remedy=_hint(fields, columns),
        )
    foreign = [name for name in FOREIGN["response"] if name in unmapped]
    if foreign and not {"messages", *REPLIES} & fields.keys():
        grades = [name for name in GRADES if name in unmapped]
        raise InputError(
            f"{place} has {listed([*foreign, *grades])}, which {'are' if foreign[1:] or grades else 'is'} not read; "
            f"what is read is {listed(FIELDS)}.",
            field=place,
            value=[*foreign, *grades],
            remedy=_hint(fields, columns)
            + (f" Each is learned as a good one: leave out those whose {grades[0]} is bad." if grades else ""),
        )
    demonstrated = "response" in fields and "chosen" not in fields
    for name in GRADES if demonstrated else ():
        if name in unmapped and isinstance(columns[name], bool | int | float):
            raise InputError(
                f"{place} has {name!r} beside 'response', and each response is learned as a good one",
                field=place,
                value=columns[name],
                remedy=f"leave out the rows that are not, and keep {name!r} for a reward function, or for nothing, by "
                f"`data.columns` {name}={name}.",
            )
    if "system" in unmapped:
        raise InputError(
            f"{place} has 'system', {shown(columns['system'])}, which is not read",
            field=place,
            value=columns["system"],
            remedy="make it the first message of 'prompt', {role: system, content: ...}, or keep it for a reward "
            "function alone by `data.columns` system=system.",
        )


def _hint(fields: Mapping[str, Any], columns: Mapping[str, Any]) -> str:
    """How to map the columns that other projects call otherwise, or where else such rows are read."""
    present = {name for name, value in columns.items() if value is not None}
    found: dict[str, str] = {}
    prompted = {"prompt", "messages"} & fields.keys()
    for name in ("messages", "prompt") if not prompted else ():
        known = [column for column in FOREIGN[name] if column in present]
        if known and not found:
            both = name == "prompt" and known[-1] == "input"
            found[name] = "+".join(dict.fromkeys((known[0], known[-1]))) if both else known[0]
    if "messages" not in found and not {"messages", *REPLIES} & fields.keys():
        names = (*FOREIGN["response"], *(() if prompted else ("answer",)))
        reply = next((column for column in names if column in present), None)
        if reply is not None:
            found["response"] = reply
    if found:
        mapping = " ".join(f"{name}={column}" for name, column in found.items())
        return f"If that is what they are, give `data.columns` {mapping}."
    if "chosen" in fields:
        return "Rows of hh-rlhf, of whole dialogues, are read by `data.source=hh_rlhf/...` too."
    return f"What is read is {listed(FIELDS)}; say which column is which, as in `data.columns` prompt=question."


def _prompt(value: Any, place: str) -> _Statement:
    if isinstance(value, list):
        return _Statement("prompt", _messages(value, "prompt", place))
    return _Statement("prompt", parse(text_of({"prompt": value}, "prompt", place)))


def _whole(conversation: Conversation, field: str) -> _Statement:
    if conversation[-1].role == "assistant":
        return _Statement(field, conversation[:-1], conversation[-1].content.strip())
    return _Statement(field, conversation)


def _reply(value: Any, name: str, place: str) -> _Statement:
    if isinstance(value, list):
        conversation = _messages(value, name, place)
    else:
        text = text_of({name: value}, name, place)
        opens = text.lstrip().startswith("Human:")  # a whole dialogue in hh-rlhf's form
        conversation = turns(text) if opens else (Turn("assistant", text),)
    if conversation[-1].role != "assistant":
        raise InputError(
            f"{place}: {name!r} must end with the assistant's message, and ends with the {conversation[-1].role}'s",
            field=place,
            value=conversation[-1].role,
            remedy="cut what follows it, or leave the row out.",
        )
    return _Statement(name, conversation[:-1] or None, conversation[-1].content.strip())


def _agreed(prompts: list[_Statement], place: str) -> Conversation | None:
    if len(prompts) == 2 and _differ(prompts[0].earlier, prompts[1].earlier):
        raise _contradiction(prompts[0], prompts[1], place)
    return prompts[0].earlier if prompts else None


def _placed(
    reply: _Statement, prompt: Conversation | None, prompts: list[_Statement], place: str
) -> Conversation | None:
    """The turns before a reply: the prompt's, and those of its own, which have the prompt's in front or follow them."""
    if reply.earlier is None or reply.field == "messages":
        return prompt
    if reply.earlier[0].role == "assistant":
        return None if prompt is None else (*prompt, *reply.earlier)
    if prompt is not None and _differ(prompt, reply.earlier[: len(prompt)]):
        raise _contradiction(prompts[0], reply, place)
    return reply.earlier


def _common(
    wholes: Mapping[str, Conversation | None], prompt: Conversation | None, prompts: list[_Statement], place: str
) -> tuple[Conversation | None, str]:
    """The prompt of all replies, and the field that says it."""
    stated = [(name, whole) for name, whole in wholes.items() if whole is not None]
    for (name, whole), (other, another) in itertools.pairwise(stated):
        if _differ(whole, another):
            raise InputError(
                f"{place}: {name!r} and {other!r} reply to different turns; {name!r} follows "
                f"{shown(whole[-1].content)}, {other!r} {shown(another[-1].content)}.",
                field=place,
                value=(whole[-1].content, another[-1].content),
                remedy="Mend the row, or leave it out.",
            )
    if stated and (prompt is None or len(stated[0][1]) > len(prompt)):
        return stated[0][1], stated[0][0]
    return prompt, prompts[0].field if prompts else ""


def _check_prompt(prompt: Conversation, field: str, place: str) -> None:
    if not prompt or not prompt[-1].content.strip():
        raise InputError(
            f"{place}: the prompt is empty", field=place, value=None, remedy="give it a text or leave the line out."
        )
    if prompt[-1].role != "user":
        raise InputError(
            f"{place}: the prompt, of {field!r}, ends with the {prompt[-1].role}'s turn, {shown(prompt[-1].content)}",
            field=place,
            value=prompt[-1].content,
            remedy="it must end with the user's. The assistant's reply belongs in 'response', or last in 'messages'.",
        )


def _one_response(texts: Mapping[str, str | None], place: str) -> str | None:
    response, other = texts.get("response"), texts.get("messages")
    if response is not None and other is not None and response != other:
        raise InputError(
            f"{place}: 'response' and the last of 'messages' differ: {shown(response)} and {shown(other)}.",
            field=place,
            value=(response, other),
            remedy="Keep one of them; `data.columns` note=response keeps the other for nothing but a reward function.",
        )
    return other if response is None else response


def _contradiction(one: _Statement, other: _Statement, place: str) -> InputError:
    def last(statement: _Statement) -> str:
        return shown(statement.earlier[-1].content) if statement.earlier else "nothing"

    return InputError(
        f"{place}: the turns of {other.field!r} before its reply are not those of {one.field!r}: {last(other)} and "
        f"{last(one)}.",
        field=place,
        value=last(other),
        remedy=f"Mend the row, or read one of them alone: `data.columns` note={one.field} leaves {one.field!r} to a "
        "reward function.",
    )


def _differ(one: Conversation | None, other: Conversation | None) -> bool:
    if one is None or other is None:
        return False
    return [(turn.role, turn.content.strip()) for turn in one] != [(turn.role, turn.content.strip()) for turn in other]


def _written(fields: Mapping[str, Any], prompt: Conversation) -> Written:
    """The text as it stands, where the prompt is one and is whole; else messages."""
    text = fields.get("prompt")
    return text if isinstance(text, str) and not _differ(parse(text), prompt) else messages(prompt)


def _messages(value: Any, name: str, place: str) -> Conversation:
    if not isinstance(value, list) or not value or all(isinstance(item, str) for item in value):
        what = "a list of texts" if isinstance(value, list) and value else kind(value)
        raise InputError(
            f"{place}: {name!r} must be a {'list' if name == 'messages' else 'text, or a list'} of messages {{role, "
            f"content}}, and is {what}, {shown(value)}",
            field=place,
            value=value,
            remedy="mend the row, or leave it out.",
        )
    return tuple(_message(item, i, f"{place}, message {i + 1} of {name!r}") for i, item in enumerate(value))


def _message(message: Any, index: int, where: str) -> Turn:
    if not isinstance(message, dict):
        problem = f"{where} must be an object {{role, content}}, and is {kind(message)}, {shown(message)}"
        raise InputError(problem, field=where, value=message, remedy="mend the row, or leave it out.")
    if "from" in message and "value" in message:  # ShareGPT's form
        said = text_of(message, "from", where)
        message = {"role": SHARE_GPT.get(said, said), "content": message["value"]}
    if unread := [part for part in MESSAGE_PARTS if message.get(part)]:
        raise InputError(
            f"{where} has {listed(unread)}, which is not read",
            field=where,
            value=unread,
            remedy="leave the row out, or write it as text.",
        )
    role = text_of(message, "role", where)
    if role not in ("system", "user", "assistant"):
        raise InputError(
            f"{where} has the role {role!r}", field=where, value=role, remedy="it is one of system, user, assistant."
        )
    if role == "system" and index:
        raise InputError(f"{where} is the system's", field=where, value=role, remedy="only the first message may be.")
    return Turn(role, text_of(message, "content", where))  # type: ignore[arg-type]


def listed(names: Iterable[str]) -> str:
    """Names as a message has them, the first twenty."""
    several = [*names]
    return ", ".join([*map(shown, several[:20]), *(["..."] if several[20:] else [])]) or "no fields"


def kind(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """A value as Python writes it, in 80 characters or little more."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
