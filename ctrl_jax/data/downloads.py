"""Published files, fetched once and checked."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import requests

from ctrl_jax.errors import InputError


def fetch(url: str, target: Path, *, size: int | None = None, sha256: str | None = None) -> Path:
    """Downloads `url` to `target`, unless it is there; `size` in bytes and `sha256` are checked where they are known.

    A size that is not known is what the server announces.

    Errors: InputError where the network fails, or the file is not the one recorded; nothing is left at `target` then.
    """
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    digest, received = hashlib.sha256(), 0
    try:
        # A server that packs a .gz once more would change its size and checksum.
        answer = requests.get(url, stream=True, timeout=60, headers={"Accept-Encoding": "identity"})
        answer.raise_for_status()
        if size is None and "Content-Length" in answer.headers:
            size = int(answer.headers["Content-Length"])
        with partial.open("wb") as file:
            for block in answer.iter_content(2**20):
                file.write(block)
                digest.update(block)
                received += len(block)
    except requests.RequestException as error:
        raise InputError(
            f"{url} could not be downloaded ({_reason(error)}). Try again, or fetch it elsewhere and give --data.path "
            "the folder of the local copy."
        ) from error
    if (size is not None and received != size) or (sha256 is not None and digest.hexdigest() != sha256):
        partial.unlink()
        raise InputError(
            f"{url} gave {received} bytes with sha256 {digest.hexdigest()}, where {size} bytes with sha256 "
            f"{sha256 or 'unknown'} were expected: it was cut short, or has changed since. Try again, or give "
            "--data.path a local copy."
        )
    return partial.replace(target)


def _reason(error: requests.RequestException) -> str:
    return str(error) if isinstance(error, requests.HTTPError) else type(error).__name__


def fingerprint(files: Mapping[str, Path]) -> str:
    """Names the contents of files: equal for equal bytes under equal keys, wherever they lie."""
    digest = hashlib.blake2s(digest_size=8)
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
