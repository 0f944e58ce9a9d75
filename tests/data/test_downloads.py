import contextlib
import gzip
import hashlib
import resource
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest

from ctrl_jax.data import downloads
from ctrl_jax.data.downloads import fetch, fingerprint
from ctrl_jax.errors import InputError

CONTENT = b"some bytes" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        special = getattr(self, f"_{self.path.strip('/').split('.')[0]}", None)
        if special is not None:
            with contextlib.suppress(OSError):  # the other side has gone
                special()
            return
        self.send_response(200 if self.path != "/missing" else 404)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:5] if self.path == "/cut" else CONTENT)

    def _begin(self, code=200, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _bomb(self):
        packed = gzip.compress(bytes(300 * 2**20), 9)  # to a thousandth
        self._begin(Content_Length=str(len(packed)))
        self.wfile.write(packed)

    def _members(self):
        self._begin()
        self.wfile.write(gzip.compress(CONTENT) * 3)

    def _announced(self):
        self._begin(Content_Length=str(2**40))
        self.wfile.write(CONTENT)

    def _endless(self):
        self._begin()
        while True:
            self.wfile.write(CONTENT)

    def _drip(self):
        self._begin(Content_Length=str(len(CONTENT)))
        for byte in CONTENT:
            self.wfile.write(bytes([byte]))
            time.sleep(0.02)

    def _stall(self):
        self._begin(Content_Length=str(len(CONTENT)))
        self.wfile.write(CONTENT[:5])
        self.server.over.wait(30)

    def _redirect(self):
        self._begin(302, Location=f"{self.server.url}/file")

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.over = [], Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def test_a_file_is_fetched_once_and_checked(server, tmp_path):
    target = tmp_path / "some" / "file"
    for _ in range(2):
        assert fetch(f"{server.url}/file", target, size=len(CONTENT), sha256=SHA256) == target
    assert target.read_bytes() == CONTENT
    assert server.asked == ["/file"]
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_checksum_that_is_not_known_is_that_of_the_first_download(server, tmp_path):
    target, record = tmp_path / "file", tmp_path / "file.sha256"
    fetch(f"{server.url}/file", target)
    assert record.read_text() == f"{SHA256}  file\n"
    assert fetch(f"{server.url}/file", target).read_bytes() == CONTENT
    target.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(InputError, match=rf"{target} has sha256 .*not {SHA256}.*Delete it to download it again"):
        fetch(f"{server.url}/file", target)
    target.unlink()
    fetch(f"{server.url}/file", target)
    target.unlink()
    record.write_text("0" * 64)
    with pytest.raises(InputError, match=f"{SHA256}, where 10000 bytes with sha256 {'0' * 64}"):
        fetch(f"{server.url}/file", target)
    assert not target.exists()


def test_a_file_that_an_older_version_downloaded_is_trusted_from_now_on(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(CONTENT)
    fetch("https://nowhere.invalid/file", target)
    assert (tmp_path / "file.sha256").read_text().split() == [SHA256, "file"]
    target.write_bytes(b"other")
    with pytest.raises(InputError, match="damaged, or was changed"):
        fetch("https://nowhere.invalid/file", target)
    with pytest.raises(InputError, match=f"not {'0' * 64}"):
        fetch("https://nowhere.invalid/file", target, sha256="0" * 64)


@pytest.mark.parametrize(
    ("path", "expected", "limits", "words"),
    [
        ("/bomb.gz", {}, {}, "unpacks to more than 100 times its size"),
        ("/announced", {}, {}, rf"has {2**40} bytes, and more than {2**30} are not downloaded"),
        ("/endless", {}, {"MAX_BYTES": 2**20}, rf"more than the {2**20} bytes"),
        ("/endless", {"size": 7}, {}, "more than the 7 bytes"),
        ("/announced", {"size": 7}, {}, rf"has {2**40} bytes, where 7 bytes were expected"),
        ("/drip", {}, {"TOTAL_SECONDS": 0.3}, "not downloaded within 0 s: the connection is too slow"),
        ("/stall", {}, {"STALL_SECONDS": 0.3}, r"could not be downloaded \(ReadTimeout"),
        ("/redirect", {}, {}, r"could not be downloaded \(it redirects to http://.*/file, which is not https\)"),
    ],
)
def test_what_is_too_large_too_slow_or_elsewhere_is_given_up(
    server, path, expected, limits, words, tmp_path, monkeypatch
):
    for name, value in limits.items():
        monkeypatch.setattr(downloads, name, value)
    with pytest.raises(InputError, match=words) as caught:
        fetch(f"{server.url}{path}", tmp_path / "file", **expected)
    assert "`data.path`" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_gz_of_several_members_is_no_bomb(server, tmp_path):
    assert gzip.decompress(fetch(f"{server.url}/members.gz", tmp_path / "file").read_bytes()) == CONTENT * 3


def test_a_full_disk_names_the_file(server, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError) as failed:
            fetch(f"{server.url}/file", tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.value.filename == str(tmp_path / "file.part")
    assert list(tmp_path.iterdir()) == []


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
    for word in [f"{server.url}{path}", "`data.path`", *words]:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_said_at_once(server, tmp_path):
    server.server_close()
    with pytest.raises(
        InputError, match=rf"{server.url}/file could not be downloaded \(ConnectionError\).*`data.path`"
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
