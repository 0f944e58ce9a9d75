"""A page for this machine alone: a loopback HTTP server of one HTML page and the functions behind its buttons.

The page posts JSON to `/<name>` and reads JSON lines back as they are made. One function runs at a time; the next
waits, and the page says so.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import traceback
import urllib.parse
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import preemption
from ctrl_jax.runtime.stages import plain

Answer = Callable[[dict[str, Any]], Iterator[Mapping[str, Any]]]
"""A request's JSON object to the events that answer it, each of which `stages.plain` makes JSON. Raises InputError."""

MAX_BYTES = 1_000_000
"""Of a request."""
LAST_TOKEN_SECONDS = 30
"""How long `serve` waits on its way out for the step that the device is in."""


class Server(ThreadingHTTPServer):
    """Serves `page` at `/` and `answers` at their names, on a port of 127.0.0.1, by default a free one.

    An answer's events reach the page as {"kind": ..., ...}. The server's own kinds are `waiting` (another answer is
    being made), `error` (with its text: an InputError's, or that something broke) and `done`, which is always last
    where there was no error.

    Raises:
      InputError: if the port is taken.
    """

    daemon_threads = True

    def __init__(self, page: str, answers: Mapping[str, Answer], *, port: int = 0):
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"Port {port} of 127.0.0.1 cannot be had ({error}); choose another `port`.") from None
        self.page = page.encode()
        # Nothing but the page's own scripts runs, and it speaks to this server alone.
        scripts = [hashlib.sha256(text.encode()).digest() for text in re.findall(r"<script>(.*?)</script>", page, re.S)]
        hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in scripts) or "'none'"
        self.content_policy = (
            f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self.answers = answers
        self.busy = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def serve(self) -> None:
        """Serves until Ctrl-C. An answer in the making ends at its next event."""
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            preemption.answered()
        finally:
            self.closing.set()
            self.server_close()
            # An interpreter that exits under a running program of the device dies noisily.
            self.busy.acquire(timeout=LAST_TOKEN_SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser that goes away in the middle is no news.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def open_browser(url: str) -> bool:
    """Opens the page where there is a display to open it on; whether it did."""
    has_display = sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    return has_display and webbrowser.open(url)


class _Gone(Exception):
    """The browser has closed the connection: nobody reads what would be answered."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60.0

    def do_GET(self) -> None:
        if not self._is_local():
            return
        if urllib.parse.urlsplit(self.path).path != "/":
            self._refuse(404, "There is only one page here, at /.")
            return
        self._begin(200, "text/html; charset=utf-8")
        self.wfile.write(self.server.page)

    def do_POST(self) -> None:
        if not self._is_local():
            return
        answer = self.server.answers.get(self.path.removeprefix("/"))
        request = self._request() if answer else None
        if answer is None:
            self._refuse(404, f"Nothing answers at {self.path}.")
        elif request is not None:
            self._begin(200, "application/x-ndjson; charset=utf-8")
            with contextlib.suppress(_Gone):
                self._stream(answer, request)

    def _is_local(self) -> bool:
        """Whether the request came to this machine by name, and from its own page; else it is refused.

        A foreign site whose name resolves to 127.0.0.1 (DNS rebinding) shows in the Host header, and a foreign page in
        Origin. The port may differ from the server's: a tunnel's does.
        """
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        if re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", host) and origin in (None, f"http://{host}"):
            return True
        self._refuse(403, "This page serves its own machine only; open it as it was printed.")
        return False

    def _request(self) -> dict[str, Any] | None:
        """The JSON object of the request; None where it is refused."""
        size = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json":
            self._refuse(415, "Send a JSON object as application/json.")
        elif not size.isdecimal():
            self._refuse(411, "Send a Content-Length.")
        elif len(size) > 12 or int(size) > MAX_BYTES:
            self._refuse(413, f"The request has {size[:12]} bytes or more; the most is {MAX_BYTES}.")
        else:
            try:
                request = json.loads(self.rfile.read(int(size)))
            except (ValueError, RecursionError):
                request = None
            if isinstance(request, dict):
                return request
            self._refuse(400, "The request is not a JSON object.")
        return None

    def _stream(self, answer: Answer, request: dict[str, Any]) -> None:
        if not self.server.busy.acquire(blocking=False):
            self._send({"kind": "waiting"})
            self.server.busy.acquire()
        try:
            for event in answer(request):
                if self.server.closing.is_set():
                    return
                self._send(event)
            self._send({"kind": "done"})
        except InputError as error:
            self._send({"kind": "error", "text": str(error)})
        except _Gone:
            raise
        except Exception as error:
            traceback.print_exc()
            self._send({"kind": "error", "text": f"It broke: {type(error).__name__}. The terminal has the traceback."})
        finally:
            self.server.busy.release()

    def _send(self, event: Mapping[str, Any]) -> None:
        line = json.dumps(plain(event)).encode() + b"\n"
        try:
            self.wfile.write(line)
        except OSError:
            raise _Gone from None

    def _begin(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", self.server.content_policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def _refuse(self, status: int, text: str) -> None:
        self._begin(status, "text/plain; charset=utf-8")
        self.wfile.write(f"{text}\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for the person."""
