"""The page of `make sample`: type a prompt and watch both sides answer it."""

from collections.abc import Iterator, Mapping
from typing import Any

from ctrl_jax.config import Experiment
from ctrl_jax.errors import InputError
from ctrl_jax.jobs.sample import Asked, Event, Session, said
from ctrl_jax.report import page
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import plain
from ctrl_jax.runtime.web import Answer, Server, open_browser


def serve(
    session: Session, experiment: Experiment, prompt: str, asked: Asked, *, port: int = 0, browser: bool = True
) -> None:
    """Shows the page until Ctrl-C, with a prompt, N and a procedure in its fields; `port` 0 is a free one.

    Raises:
      InputError: if the port is taken.
    """
    trained_for = (experiment.policy.procedure, experiment.policy.transform) if session.has_rewards else None
    html = page.sample_page(
        experiment.name,
        sides=session.sides,
        trained_for=trained_for,
        prompt=prompt,
        num_samples=asked.num_samples,
        procedure=asked.procedure,
    )
    server = Server(html, answers(session), port=port)
    say(f"{experiment.name} is at {server.url} (this machine only). Ctrl-C ends it.")
    if browser:
        open_browser(server.url)
    server.serve()


def answers(session: Session) -> Mapping[str, Answer]:
    """What the page asks for: `respond` to a prompt, and `pick` anew by the rewards that it shows."""

    def respond(request: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
        asked = Asked(_count(request), _text(request, "procedure"))
        for event in session.answer(said(_text(request, "prompt")), asked):
            yield _told(event)

    def pick(request: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
        yield _told(session.pick(request["rewards"], _text(request, "procedure")))

    return {"respond": respond, "pick": pick}


def _told(event: Event) -> dict[str, Any]:
    return {"kind": type(event).__name__.lower(), **plain(event)}


def _text(request: dict[str, Any], field: str) -> str:
    value = request.get(field)
    if not isinstance(value, str):
        raise InputError(f"The {field} is {value!r}; it is a text.")
    return value


def _count(request: dict[str, Any]) -> int:
    value = request.get("num_samples")
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"The number of responses is {value!r}; it is a whole number.")
    return value
