"""How transforms and procedures are written as text: `name` or `name(number)`.

A parser reads more spellings than one, and the object that it returns has one canonical name, which is what is stored.
"""

import difflib
import re
from collections.abc import Iterable

from ctrl_jax.errors import InputError

MAX_LENGTH = 1000
"""Characters of a name: a mixture of some fifty procedures."""


def number(value: float) -> str:
    """The shortest text that reads back as `value`: 4.0 is "4"."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def split_call(text: str) -> tuple[str, float | None]:
    """Name and number: ("exponential", 10.0) of "exponential(10)", ("identity", None) of "identity".

    A name is read as pages print it, too: case does not count, "-" and spaces are "_", and "exponential:10" is
    "exponential(10)".

    Raises:
      InputError: if it is longer than MAX_LENGTH, or is neither form.
    """
    check_length(text)
    match = re.fullmatch(r"\s*(\w+(?:[- ]\w+)*)\s*(?:\(([^()]*)\)|:([^():]*))?\s*", text)
    if not match:
        raise InputError(
            f"{text!r} is not a name",
            field="name",
            value=text,
            remedy="write a name, or one with a number in brackets, such as exponential(10).",
        )
    name, in_brackets, after_colon = match.groups()
    name = re.sub("[- ]", "_", name.lower())
    argument = after_colon if in_brackets is None else in_brackets
    if argument is None:
        return name, None
    try:
        return name, float(argument)
    except ValueError:
        raise InputError(
            f"{argument!r} in {text!r} is not a number",
            field="name",
            value=text,
            remedy=f"write one, such as {name}(10).",
        ) from None


def check_length(text: str) -> None:
    """Raises InputError for what is too long to be a name, before anything looks at all of it."""
    if len(text) > MAX_LENGTH:
        raise InputError(
            f"{text[:40]!r}... has {len(text)} characters",
            field="name",
            value=text,
            remedy=f"a name has at most {MAX_LENGTH}.",
        )


def unknown(kind: str, text: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not among `known`, with the nearest of them."""
    known = list(known)
    nearest = difflib.get_close_matches(text, known, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    remedy = f"{hint} There are: {', '.join(known)}.".strip()
    return InputError(f"There is no {kind} {text!r}.", field=kind, value=text, remedy=remedy)
