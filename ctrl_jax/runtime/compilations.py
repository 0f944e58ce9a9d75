"""What jax compiles, and when: a step of training should compile at its first call, and never again."""

import contextlib
import threading
from collections.abc import Iterator

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[dict[str, float]]:
    """The programs that this thread compiles within, by name, and the seconds it took.

    A program that comes from the compilation cache counts as well: it was asked for as one that is new.
    """
    found: dict[str, float] = {}
    thread = threading.get_ident()

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event == _COMPILED and threading.get_ident() == thread:
            name = str(details.get("fun_name", "a program"))
            found[name] = found.get(name, 0.0) + duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
