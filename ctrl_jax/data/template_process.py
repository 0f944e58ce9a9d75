"""Jinja templates rendered in another process, under limits: a chat template is a stranger's program.

Jinja's sandbox keeps a template from the interpreter's objects, but not from running for ever or filling the memory, as
`'%1000000000d' % 1` and loops over ranges within each other do. So a worker process renders, and the kernel ends it at
a limit of time, and refuses it memory beyond one.

A worker lives on, so that a rendering costs a message through a pipe and not a process. A message is its length in 8
bytes, then JSON. A worker that exceeded a limit or crashed is ended, and the next rendering starts another.
"""

import contextlib
import functools
import json
import resource
import signal
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

import jinja2

from ctrl_jax.data import template_environment

_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from ctrl_jax.data import template_process as t; t.serve()"
_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True)
class Limits:
    """What compiling and rendering a template may take. Ordinary ones take a thousandth of it."""

    cpu_seconds: float = 5.0
    wall_seconds: float = 60.0
    """Well above the CPU time: other programs may have the cores."""
    memory_bytes: int = 512 * 2**20
    """Of address space, on systems that limit it (Linux, not macOS). The interpreter itself takes some 50 MB."""
    characters: int = 2**24


DEFAULT = Limits()


class FailedError(Exception):
    """The template does not parse, or fails on what it was given; the message is its own."""

    def __init__(self, message: str, line: int | None = None):
        super().__init__(message)
        self.line = line
        """Where it does not parse."""


class ExceededError(Exception):
    """The template went beyond a limit, or ended its process; the message is a predicate, as "takes more than ..."."""


def render(source: str, variables: Mapping[str, Any], limits: Limits) -> str:
    """What the template writes with these variables, which JSON can hold. Errors: FailedError, ExceededError."""
    worker = _waiting() or _Worker()
    try:
        answer = worker.ask({"source": source, "variables": variables, "limits": asdict(limits)})
        if "exceeded" in answer:
            raise ExceededError(answer["exceeded"])
    except BaseException:
        # Where a signal ends the wait, the answer still to come would be taken for the next one's.
        worker.end()
        raise
    _idle.append(worker)
    if "failed" in answer:
        raise FailedError(answer["failed"], answer["line"])
    return answer["text"]


class _Worker:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C in the terminal is for the parent alone, whose end closes the pipe, which ends the worker.
            start_new_session=True,
        )
        # Called also where nothing refers to the worker any more, and when the interpreter exits.
        self.end = weakref.finalize(self, _end, self._process)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            _write(self._process.stdin, message)
        answer = _read(self._process.stdout)
        return {"exceeded": _cause(self._process.wait(), message["limits"])} if answer is None else answer


_idle: list[_Worker] = []
"""Workers that wait for the next rendering: as many as there were threads that rendered at one time."""


def _waiting() -> _Worker | None:
    with contextlib.suppress(IndexError):  # Several threads may look at once.
        while not (worker := _idle.pop()).alive:
            worker.end()
        return worker
    return None


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
    process.wait()


def _cause(code: int, limits: Mapping[str, Any]) -> str:
    if code == -signal.SIGPROF:
        return f"takes more than {limits['cpu_seconds']:g} s of computing time"
    if code == -signal.SIGALRM:
        return f"takes more than {limits['wall_seconds']:g} s"
    ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"ended the process that rendered it {ended}"


def _write(pipe: IO[bytes], message: Mapping[str, Any]) -> None:
    contents = json.dumps(message).encode()
    pipe.write(_LENGTH.pack(len(contents)) + contents)
    pipe.flush()


def _read(pipe: IO[bytes]) -> Any:
    """The next message, or None where the other side has ended."""
    header = pipe.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    contents = pipe.read(length)
    return json.loads(contents) if len(contents) == length else None


def serve() -> None:
    """The worker: answers the messages of standard input until that is closed."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    for ending in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(ending, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM, signal.SIGPROF))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiled = functools.lru_cache(maxsize=16)(template_environment.environment().from_string)
    while (message := _read(sys.stdin.buffer)) is not None:
        _write(sys.stdout.buffer, _answer(compiled, message, Limits(**message["limits"])))


def _answer(
    compiled: Callable[[str], jinja2.Template], message: Mapping[str, Any], limits: Limits
) -> Mapping[str, Any]:
    try:
        _limit(limits.memory_bytes, limits.cpu_seconds, limits.wall_seconds)
        try:
            return _rendered(compiled(message["source"]), message["variables"], limits.characters)
        finally:
            _limit(resource.RLIM_INFINITY, 0, 0)
    except MemoryError:
        return {"exceeded": f"takes more than {limits.memory_bytes / 2**20:g} MiB of memory"}
    except jinja2.TemplateSyntaxError as error:
        return {"failed": error.message or "", "line": error.lineno}
    except Exception as error:  # A template is a program: it may fail in any way.
        return {"failed": str(error)[:10_000] or type(error).__name__, "line": None}


def _rendered(template: jinja2.Template, variables: Mapping[str, Any], characters: int) -> Mapping[str, Any]:
    parts: list[str] = []
    length = 0
    for part in template.generate(variables):
        parts.append(part)
        length += len(part)
        if length > characters:
            return {"exceeded": f"writes more than {characters} characters"}
    return {"text": "".join(parts)}


def _limit(memory_bytes: int, cpu_seconds: float, wall_seconds: float) -> None:
    """Sets what this process may take from now on: the kernel ends it, or refuses it memory. 0 s are no limit."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        memory_bytes = most if memory_bytes == resource.RLIM_INFINITY else min(memory_bytes, most)
    with contextlib.suppress(ValueError, OSError):  # macOS
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, most))
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)
