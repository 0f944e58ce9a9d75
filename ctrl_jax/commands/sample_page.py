"""The page of `make sample`: type a prompt and watch both sides answer it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ctrl_jax.commands.sample_session import MAX_SAMPLES, Asked, Event, Session, said
from ctrl_jax.config import Decoding, Experiment
from ctrl_jax.errors import InputError
from ctrl_jax.report import sample_page
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import plain
from ctrl_jax.runtime.web import Answer, Server, open_browser

MAX_PROMPT = 100_000
"""Characters."""
MAX_NAME = 200
"""Characters of a procedure's name: parsing it keeps others waiting."""
TEMPERATURES = (0.01, 100.0)
"""Beyond these, logits leave the range of float32."""


def serve(
    session: Session, experiment: Experiment, prompt: str, asked: Asked, *, port: int = 0, browser: bool = True
) -> None:
    """Shows the page until Ctrl-C, with a prompt, N and a procedure in its fields; `port` 0 is a free one.

    Raises:
      InputError: if the port is taken.
    """
    trained_for = (experiment.policy.procedure, experiment.policy.transform) if session.has_rewards else None
    html = sample_page.render(
        experiment.name,
        sides=session.sides,
        trained_for=trained_for,
        prompt=prompt,
        num_samples=asked.num_samples,
        procedure=asked.procedure,
        temperature=session.temperature,
        top_p=1.0 if session.top_p is None else session.top_p,
        examples=session.examples,
    )
    server = Server(html, answers(session), port=port)
    say(f"{experiment.name} is at {server.url} (this machine only). Ctrl-C ends it.")
    if browser:
        open_browser(server.url)
    server.serve()


def answers(session: Session) -> Mapping[str, Answer]:
    """The requests of the page: `respond` to a prompt, and `pick` again among the rewards that it shows.

    Every field of a request is checked before it is used; an InputError is the answer.
    """

    def respond(request: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
        _known(request, "prompt", "num_samples", "procedure", "temperature", "top_p")
        decoding = Decoding(
            temperature=_number(request, "temperature", *TEMPERATURES), top_p=_number(request, "top_p", 1e-6, 1.0)
        )
        asked = Asked(_count(request), _text(request, "procedure", MAX_NAME), decoding)
        for event in session.answer(said(_text(request, "prompt", MAX_PROMPT), session.format), asked):
            yield _as_json(event)

    def pick(request: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
        _known(request, "rewards", "procedure")
        yield _as_json(session.pick(_rewards(request, session.sides), _text(request, "procedure", MAX_NAME)))

    return {"respond": respond, "pick": pick}


def _as_json(event: Event) -> dict[str, Any]:
    return {"kind": type(event).__name__.lower(), **plain(event)}


def _known(request: dict[str, Any], *fields: str) -> None:
    unknown = sorted(set(request) - set(fields))
    if unknown:
        raise InputError(f"The request has the fields {_shown(unknown)}; there are {', '.join(fields)}.")


def _text(request: dict[str, Any], field: str, most: int) -> str:
    value = request.get(field)
    if not isinstance(value, str):
        raise InputError(f"The {field} is {_shown(value)}; it is a text.")
    if len(value) > most:
        raise InputError(f"The {field} has {len(value)} characters; the most is {most}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The {field} has half a character ({value[error.start]!a}, a lone surrogate) at place {error.start}."
        ) from None
    return value


def _count(request: dict[str, Any]) -> int:
    value = request.get("num_samples")
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"The number of responses is {_shown(value)}; it is a whole number.")
    return value


def _number(request: dict[str, Any], field: str, low: float, high: float) -> float | None:
    """A number within its bounds; None where the field is left out."""
    value = request.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"The {field} is {_shown(value)}; it is a number from {low:g} to {high:g}.")
    return float(value)


def _rewards(request: dict[str, Any], sides: tuple[str, ...]) -> dict[str, list[float]]:
    """Raw rewards of each side: equally many, and all finite."""
    value = request.get("rewards")
    if not isinstance(value, dict) or set(value) != set(sides):
        raise InputError(f"The rewards are {_shown(value)}; they are a list of numbers for each of {', '.join(sides)}.")
    for side in sides:
        of_side = value[side]
        if not isinstance(of_side, list) or not 1 <= len(of_side) <= MAX_SAMPLES:
            raise InputError(
                f"The rewards of the {side} are {_shown(of_side)}; they are a list of 1 to {MAX_SAMPLES} numbers."
            )
        for reward in of_side:
            if isinstance(reward, bool) or not isinstance(reward, int | float) or not _is_finite(reward):
                raise InputError(f"A reward of the {side} is {_shown(reward)}; it is a finite number.")
    counts = {side: len(value[side]) for side in sides}
    if len(set(counts.values())) > 1:
        raise InputError(f"The sides have unequal numbers of rewards: {_shown(counts)}.")
    return {side: [float(reward) for reward in value[side]] for side in sides}


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} …"
