import hashlib
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from ctrl_jax.data.downloads import fetch, fingerprint
from ctrl_jax.errors import InputError

CONTENT = b"some bytes" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(200 if self.path != "/missing" else 404)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:5] if self.path == "/cut" else CONTENT)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
        yield server
        server.shutdown()


def test_a_file_is_fetched_once_and_checked(server, tmp_path):
    target = tmp_path / "some" / "file"
    for _ in range(2):
        assert fetch(f"{server.url}/file", target, size=len(CONTENT), sha256=SHA256) == target
    assert target.read_bytes() == CONTENT
    assert server.asked == ["/file"]
    assert [path.name for path in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("path", "expected", "words"),
    [
        ("/file", {"size": 7}, ["10000 bytes", "7 bytes"]),
        ("/file", {"sha256": "0" * 64}, [SHA256, "0" * 64]),
        ("/file", {"size": len(CONTENT), "sha256": "0" * 64}, [SHA256, "0" * 64]),
        ("/missing", {}, ["404"]),
        ("/cut", {}, []),
        ("/cut", {"size": len(CONTENT)}, []),
    ],
)
def test_another_file_than_recorded_is_refused(server, path, expected, words, tmp_path):
    with pytest.raises(InputError) as caught:
        fetch(f"{server.url}{path}", tmp_path / "file", **expected)
    for word in [f"{server.url}{path}", "--data.path", *words]:
        assert word in str(caught.value)
    assert not (tmp_path / "file").exists()


def test_no_network_is_said_at_once(server, tmp_path):
    server.server_close()
    with pytest.raises(
        InputError, match=rf"{server.url}/file could not be downloaded \(ConnectionError\).*--data.path"
    ):
        fetch(f"{server.url}/file", tmp_path / "file")


def test_a_fingerprint_is_of_the_contents_under_their_names(tmp_path):
    a, b, copy = (tmp_path / name for name in ("a", "b", "copy"))
    for path, content in ((a, b"1"), (b, b"2"), (copy, b"1")):
        path.write_bytes(content)
    assert fingerprint({"train": a, "test": b}) == fingerprint({"test": b, "train": copy})
    assert (
        len({fingerprint(files) for files in ({"train": a}, {"test": a}, {"train": b}, {"train": a, "test": b})}) == 4
    )
