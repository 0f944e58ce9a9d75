"""How transforms and procedures are written as text: `name` or `name(number)`."""

import difflib
import re
from collections.abc import Iterable

from ctrl_jax.errors import InputError


def number(value: float) -> str:
    """The shortest text that reads back as `value`: 4.0 is "4"."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def split_call(text: str) -> tuple[str, float | None]:
    """Name and number: ("exponential", 10.0) of "exponential(10)", ("identity", None) of "identity"."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
    if not match:
        raise InputError(f"{text!r} is not a name or a name with a number in brackets, such as exponential(10).")
    name, argument = match.groups()
    if argument is None:
        return name, None
    try:
        return name, float(argument)
    except ValueError:
        raise InputError(f"{argument!r} in {text!r} is not a number; write one, such as {name}(10).") from None


def unknown(kind: str, text: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not among `known`, with the nearest of them."""
    known = list(known)
    nearest = difflib.get_close_matches(text, known, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    return InputError(f"There is no {kind} {text!r}.{hint} There are: {', '.join(known)}.")
