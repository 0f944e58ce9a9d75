"""Jinja as chat templates expect it, in its sandbox."""

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_TODAY = datetime(2024, 7, 26)
"""The date that templates see: the day that Llama 3's templates fall back to. The real one would change the prompts,
and with them every stage, at midnight."""


class _Generation(Extension):
    """`{% generation %}` marks a reply for trainers that mask; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """The settings, filters and functions that templates are written for.

    https://huggingface.co/docs/transformers/chat_templating_writing
    """
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    # Jinja's own escapes for HTML.
    found.filters["tojson"] = _tojson
    found.globals["raise_exception"] = _raise_exception
    found.globals["strftime_now"] = _TODAY.strftime
    return found


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
