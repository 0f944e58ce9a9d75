"""Published files, fetched once and checked."""

import hashlib
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import requests
import urllib3

from ctrl_jax.errors import InputError

MAX_BYTES = 2**30
"""Of a file whose size is not known: the largest published ones have some 100 MB."""
MAX_UNPACKED = 100
"""How many times its own size a .gz may unpack to. Dialogues pack to about a quarter; a bomb to a thousandth."""
STALL_SECONDS = 60.0
"""Without a byte before a download is given up."""
TOTAL_SECONDS = 3600.0
"""For one file, however slowly its bytes come."""
_BLOCK = 2**20


def fetch(url: str, target: Path, *, size: int | None = None, sha256: str | None = None) -> Path:
    """Downloads `url` to `target`, unless it is there.

    `size` in bytes and `sha256` are checked where they are known. A size that is not known is what the server
    announces. A checksum that is not known is that of the first download: it is kept beside the file, as
    `<name>.sha256`, and the file is checked against it whenever it is used, or downloaded once more.

    Raises:
      InputError: where the network fails, is too slow, or the file is not the one recorded or too large. There is
        nothing new at `target` then.
    """
    record = target.with_name(f"{target.name}.sha256")
    known = sha256
    if known is None and record.is_file():
        known = next(iter(record.read_text(encoding="utf-8", errors="replace").split()), None)
    if target.is_file():
        with target.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if known is not None and found != known:
            raise InputError(
                f"{target} has sha256 {found}, and not {known} as when it was downloaded from {url}: it is damaged, "
                "or was changed.",
                field=str(target),
                value=found,
                remedy="Delete it to download it again.",
            )
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.part")
        try:
            found = _download(url, partial, size, known)
            if known is None:
                record.write_text(f"{found}  {target.name}\n", encoding="utf-8")  # as `sha256sum --check` reads it
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    if known is None and not record.is_file():  # an older version has downloaded it
        record.write_text(f"{found}  {target.name}\n", encoding="utf-8")
    return target


def _download(url: str, partial: Path, size: int | None, sha256: str | None) -> str:
    """Writes the file at `url` to `partial`, checked; returns its sha256."""
    digest, received = hashlib.sha256(), 0
    check_unpacked = _unpacked_check(url)
    try:
        with _answer(url) as answer, partial.open("wb") as file:
            announced = answer.headers.get("Content-Length", "")
            if announced.isdecimal():
                if size is not None and int(announced) != size:
                    changed = f"{url} has {announced} bytes, where {size} bytes were expected: it has changed since."
                    raise InputError(changed, field=url, value=int(announced), remedy=_OWN_COPY)
                size = int(announced)
            limit = MAX_BYTES if size is None else size
            if limit > MAX_BYTES:
                problem = f"{url} has {limit} bytes, and more than {MAX_BYTES} are not downloaded."
                raise InputError(problem, field=url, value=limit, remedy=_OWN_COPY)
            for block in _blocks(answer, url):
                received += len(block)
                if received > limit:
                    problem = f"{url} gives more than the {limit} bytes that were expected."
                    raise InputError(problem, field=url, value=received, remedy=_OWN_COPY)
                check_unpacked(block, received)
                file.write(block)
                digest.update(block)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise InputError(
            f"{url} could not be downloaded ({_reason(error)}).",
            field=url,
            value=_reason(error),
            remedy="Try again, or fetch it elsewhere and give `data.path` the folder of the local copy.",
        ) from error
    except OSError as error:  # a full disk: the system does not say where
        error.filename = error.filename or str(partial)
        raise
    found = digest.hexdigest()
    if (size is not None and received != size) or (sha256 is not None and found != sha256):
        raise InputError(
            f"{url} gave {received} bytes with sha256 {found}, where {size} bytes with sha256 {sha256 or 'unknown'} "
            "were expected: it was cut short, or has changed since.",
            field=url,
            value=found,
            remedy="Try again, or give `data.path` a local copy.",
        )
    return found


_OWN_COPY = "If it is what you want, fetch it yourself and give `data.path` the folder of the local copy."


def _answer(url: str) -> requests.Response:
    """The server's answer, whose redirects led to https alone. Its bytes are still to come."""

    def only_https(answer: requests.Response, **_: Any) -> None:
        if answer.is_redirect:
            to = urllib.parse.urljoin(answer.url, answer.headers["Location"])
            if not to.startswith("https://"):
                raise requests.exceptions.InvalidURL(f"it redirects to {to}, which is not https")

    # A server that packs a .gz once more would change its size and checksum.
    answer = requests.get(
        url, stream=True, timeout=STALL_SECONDS, headers={"Accept-Encoding": "identity"}, hooks={"response": only_https}
    )
    answer.raise_for_status()
    return answer


def _blocks(answer: requests.Response, url: str) -> Iterator[bytes]:
    """The bytes as they come, so that the clock is looked at however slow they are."""
    started = time.monotonic()
    while block := answer.raw.read1(_BLOCK):
        yield block
        if time.monotonic() - started > TOTAL_SECONDS:
            raise InputError(
                f"{url} was not downloaded within {TOTAL_SECONDS:.0f} s: the connection is too slow.",
                field=url,
                value=TOTAL_SECONDS,
                remedy="Try again, or fetch it elsewhere and give `data.path` the folder of the local copy.",
            )


def _unpacked_check(url: str) -> Callable[[bytes, int], None]:
    """What refuses a .gz that unpacks to far more than text does; nothing of it is kept."""
    if not url.endswith(".gz"):
        return lambda block, received: None
    unpacker, unpacked = zlib.decompressobj(wbits=31), 0

    def check(block: bytes, received: int) -> None:
        nonlocal unpacker, unpacked
        while block:
            try:
                unpacked += len(unpacker.decompress(block, _BLOCK))
            except zlib.error:
                return  # it is no .gz, as its reader will say
            if unpacked > MAX_UNPACKED * max(received, _BLOCK):
                raise InputError(
                    f"{url} unpacks to more than {MAX_UNPACKED} times its size, which no text does: it is not read.",
                    field=url,
                    value=unpacked,
                    remedy=_OWN_COPY,
                )
            block = unpacker.unconsumed_tail
            if unpacker.eof:  # a .gz may have several members
                block, unpacker = unpacker.unused_data, zlib.decompressobj(wbits=31)

    return check


def _reason(error: Exception) -> str:
    detailed = isinstance(error, requests.HTTPError | requests.exceptions.InvalidURL)
    return str(error) if detailed else type(error).__name__


def fingerprint(files: Mapping[str, Path]) -> str:
    """Names the contents of files: equal for equal bytes under equal keys, in any folder."""
    digest = hashlib.blake2s(digest_size=8)
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
