import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import preemption, web

PAGE = "<!doctype html><title>é</title><script>let x = 1;</script>"


class Served:
    """A server with answers that the test steers."""

    def __init__(self):
        self.gate = threading.Semaphore(0)
        self.at_gate = threading.Event()
        self.made: list[int] = []
        self.server = web.Server(PAGE, {"count": self.count, "gated": self.gated, "broken": self.broken})
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def count(self, request):
        if request.get("to", 0) < 0:
            raise InputError("to is -1; <b>count</b> up.")
        for number in range(request.get("to", 0)):
            yield {"kind": "number", "value": number, "half": number / 2, "pair": (number, float("nan"))}

    def gated(self, request):
        self.at_gate.set()
        for number in range(request["to"]):
            self.gate.acquire()
            self.made.append(number)
            yield {"kind": "number", "value": number}

    def broken(self, request):
        yield {"kind": "number", "value": 0}
        raise RuntimeError("secret")

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True)
        given = {"Host": f"127.0.0.1:{self.port}"}
        if body is not None:
            given |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in given.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        return connection.getresponse()

    def events(self, name, request):
        response = self.request("POST", f"/{name}", json.dumps(request).encode())
        assert response.status == 200
        return [json.loads(line) for line in response.read().splitlines()]


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.gate.release(1000)
    served.server.shutdown()
    served.thread.join()
    served.server.server_close()


def test_the_page_comes_with_a_policy_that_lets_nothing_else_in(served):
    response = served.request("GET", "/?prompt=x")
    assert (response.status, response.read().decode()) == (200, PAGE)
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in response.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    # printf 'let x = 1;' | openssl dgst -sha256 -binary | base64
    assert policy["script-src"] == "'sha256-qtc3jf64UXA5J6U02kfQ0Cvn9Uz4wXUaN3NNUVgR2v4='"
    assert served.request("GET", "/other").status == 404


def test_it_listens_on_the_loopback_alone(served):
    assert served.server.server_address[0] == "127.0.0.1"
    assert served.server.url == f"http://127.0.0.1:{served.port}/"


def test_ctrl_c_ends_it_well_and_does_not_come_back():
    server = web.Server("", {})
    with preemption.raising():
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        server.serve()
        assert not preemption.came() and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_events_come_as_json_lines(served):
    assert served.events("count", {"to": 2}) == [
        {"kind": "number", "value": 0, "half": 0.0, "pair": [0, "nan"]},
        {"kind": "number", "value": 1, "half": 0.5, "pair": [1, "nan"]},
        {"kind": "done"},
    ]


def test_events_come_as_they_are_made(served):
    response = served.request("POST", "/gated", b'{"to": 2}')
    served.gate.release()
    assert json.loads(response.readline())["value"] == 0
    assert served.made == [0]
    served.gate.release()
    assert json.loads(response.readline())["value"] == 1
    assert json.loads(response.readline()) == {"kind": "done"}


def test_an_input_error_is_told_and_a_broken_answer_does_not_end_the_server(served, capsys):
    assert served.events("count", {"to": -1}) == [{"kind": "error", "text": "to is -1; <b>count</b> up."}]
    *_, last = served.events("broken", {})
    assert last["kind"] == "error"
    assert "RuntimeError" in last["text"] and "secret" not in last["text"]
    assert "secret" in capsys.readouterr().err
    assert served.events("count", {"to": 0}) == [{"kind": "done"}]


def test_one_answer_at_a_time_and_the_next_is_told_to_wait(served):
    first = served.request("POST", "/gated", b'{"to": 1}')
    assert served.at_gate.wait(30)  # its headers come before its turn
    second = served.request("POST", "/count", b'{"to": 1}')
    assert json.loads(second.readline()) == {"kind": "waiting"}
    assert served.made == []
    served.gate.release()
    assert [json.loads(line)["kind"] for line in first.read().splitlines()] == ["number", "done"]
    assert [json.loads(line)["kind"] for line in second.read().splitlines()] == ["number", "done"]


def test_who_goes_away_stops_the_answer(served):
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    connection.sendall(
        f"POST /gated HTTP/1.1\r\nHost: localhost:{served.port}\r\nContent-Type: application/json\r\n"
        'Content-Length: 13\r\n\r\n{"to": 10000}'.encode()
    )
    served.gate.release()
    received = b""
    while b"value" not in received:  # headers and event come in one piece or in two
        part = connection.recv(4096)
        assert part
        received += part
    connection.close()
    served.gate.release(500)
    assert served.events("count", {"to": 0})[-1] == {"kind": "done"}  # once the lock is free
    assert len(served.made) < 500


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "localhost:9999", "Origin": "http://localhost:9999"}, 200),  # through a tunnel
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "127.0.0.1:{port}@evil.example"}, 403),
        ({"Host": None}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Origin": "https://127.0.0.1:{port}"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Length": None}, 411),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": "1000001"}, 413),
        ({"Content_Length": "9" * 5000}, 413),
    ],
)
def test_foreign_and_odd_requests_are_refused(served, headers, status):
    headers = {name: value and value.format(port=served.port) for name, value in headers.items()}
    assert served.request("POST", "/gated", b'{"to": 0}', **headers).status == status
    if status == 403:
        assert served.request("GET", "/", **headers).status == 403


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(served, body):
    assert served.request("POST", "/count", body).status == 400


def test_other_paths_and_methods(served):
    assert served.request("POST", "/nothing", b"{}").status == 404
    assert served.request("PUT", "/count", b"{}").status == 501


def test_a_taken_port_is_told(served):
    with pytest.raises(InputError, match=rf"Port {served.port} .*`port`"):
        web.Server(PAGE, {}, port=served.port)
    with pytest.raises(InputError, match=r"Port 99999 .*`port`"):
        web.Server(PAGE, {}, port=99999)


def test_ctrl_c_ends_it_in_the_middle_of_an_answer():
    program = """
import signal
import time
from ctrl_jax.runtime.web import Server
# A shell that starts tests in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
def slow(request):
    for number in range(1000):
        time.sleep(0.05)
        yield {"kind": "number"}
server = Server("page", {"slow": slow})
print(server.server_address[1], flush=True)
server.serve()
print("ended", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    connection = http.client.HTTPConnection("127.0.0.1", int(process.stdout.readline()), timeout=30)
    connection.request("POST", "/slow", b"{}", {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert b"number" in response.readline()
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out, errors) == (0, "ended\n", "")
    assert time.monotonic() - started < 10
    assert b"done" not in response.read()


def test_a_browser_is_opened_only_where_there_is_a_display(monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not web.open_browser("http://127.0.0.1:1/")
    assert opened == []
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert web.open_browser("http://127.0.0.1:1/")
    assert opened == ["http://127.0.0.1:1/"]
