"""Files of a model's directory: what they are is checked before they are read, and every error names the file.

Directories come from the internet, from full disks and from editors. Only regular files are opened, sizes are bounded
before memory is taken, and whatever still goes wrong is an `InputError` with the file, the reason and what to do.
"""

import contextlib
import json
import math
import reprlib
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ctrl_jax.errors import InputError

JSON_BYTES = 64 << 20
"""Of a config or an index; the largest that are published have a few MiB."""
HEADER_BYTES = 100_000_000
"""Of a safetensors file; the limit of the safetensors library."""
# Of each type of the format; others may come, and a tensor of one is refused where it is wanted.
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
REFETCH = "Fetch it again."


class Tensor(NamedTuple):
    """A tensor of a safetensors file, as its header describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    """Byte of the file at which its data begins."""
    end: int


@contextlib.contextmanager
def reading(place: Path | str, fix: str = REFETCH) -> Iterator[None]:
    """Within, every error but an InputError becomes an InputError with the place, the reason and the fix.

    Also a RecursionError of deep nesting, and a panic of a library in Rust, which is no Exception.
    """
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(
            f"{place} needs more memory than there is ({error or 'MemoryError'}).",
            field=str(place),
            value=None,
            remedy="Free some, or use a smaller model.",
        ) from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"{place} cannot be read: {reason(error)}.", field=str(place), value=reason(error), remedy=fix
        ) from error


def reason(error: BaseException) -> str:
    """An error in a few words."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text[:300]}"


def shown(value: Any) -> str:
    """A value from a file for a message: its repr, of which much is left out if it is long or deep."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_REPR.maxlist = _REPR.maxdict = 8


def exists(file: Path) -> bool:
    """Whether something is there, even if it is a link to nothing."""
    with reading(file):
        return file.is_symlink() or file.exists()


def size(file: Path) -> int:
    """Bytes of a regular file, or of the one that a link leads to.

    Raises:
      InputError: if it is missing, a link to nothing, or no regular file: reading a pipe would never end.
    """
    with reading(file, "Check the path, and that it may be read."):
        try:
            found = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            if file.is_symlink():
                raise InputError(
                    f"{file} is a link to {file.readlink()}, which does not exist.",
                    field=str(file),
                    value=str(file.readlink()),
                    remedy="Fetch the file again.",
                ) from None
            raise InputError(f"{file} is missing.", field=str(file), value=None, remedy="Fetch it.") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise InputError(
            f"{file} is {kind}, where a file belongs.", field=str(file), value=kind, remedy="Replace it by the file."
        )
    return found.st_size


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
      InputError: if it is no regular file, larger than JSON_BYTES, no JSON in UTF-8, or if an object in it gives one
        name two values, of which any reader would pass over one.
    """
    found = size(file)
    if found > JSON_BYTES:
        raise InputError(
            f"{file} has {found:,} bytes; at most {JSON_BYTES:,} are read as JSON.",
            field=str(file),
            value=found,
            remedy=REFETCH,
        )
    with reading(file):
        content = file.read_bytes()
    return parse_json(content, file)


def parse_json(content: bytes, place: Path | str) -> Any:
    """As `read_json`, of bytes."""
    with reading(place):
        try:
            return json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
        except ValueError as error:
            raise InputError(
                f"{place} cannot be read as JSON: {reason(error)}.",
                field=str(place),
                value=reason(error),
                remedy=REFETCH,
            ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        for name, value in pairs:
            if values[name] != value:
                raise ValueError(f"{shown(name)} is {shown(value)} and {shown(values[name])} in one object")
    return values


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name: a length, the header as JSON of that length, then the data.

    Raises:
      InputError: if it is no such file, or its tensors do not fill its data exactly, each once.
    """
    total = size(file)
    with reading(file):
        with file.open("rb") as opened:
            start = opened.read(64)
            if start.startswith(b"version https://git-lfs"):
                raise InputError(
                    f"{file} is a pointer of Git LFS, not the weights.",
                    field=str(file),
                    value=start,
                    remedy="Run git lfs pull in its folder.",
                )
            length = struct.unpack("<Q", start[:8])[0] if total >= 8 else 0
            if not 2 <= length <= min(HEADER_BYTES, total - 8):
                raise _damaged(file, total, f"its header would have {length} bytes")
            opened.seek(8)
            content = opened.read(length)
        header = parse_json(content, f"{file} ({total} bytes) is truncated or no safetensors file: its header")
        if not isinstance(header, dict):
            raise _damaged(file, total, f"its header is {shown(header)}")
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not isinstance(metadata, dict):
            raise _damaged(file, total, f"its __metadata__ is {shown(metadata)}")
        found = {name: _tensor(file, total, name, entry, 8 + length) for name, entry in header.items()}
    end, last = 8 + length, "the header"
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != end:
            raise _damaged(
                file, total, f"the tensor {tensor.name} begins at byte {tensor.start}, where {last} ends at {end}"
            )
        end, last = tensor.end, tensor.name
    if end != total:
        raise _damaged(file, total, f"its tensors end at byte {end}")
    return found


def _tensor(file: Path, total: int, name: str, entry: Any, start: int) -> Tensor:
    if not name.isprintable() or len(name) > 300:
        raise _damaged(file, total, f"it has a tensor named {shown(name)}")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise _damaged(file, total, f"its header says {shown(entry)} of the tensor {name}") from None
    plain = all(type(number) is int and 0 <= number < 2**63 for number in whole) and len(shape) <= 8
    if not plain or not isinstance(dtype, str) or not dtype.isprintable():
        raise _damaged(file, total, f"its header says {shown(entry)} of the tensor {name}")
    needed = math.prod(shape) * BITS[dtype] // 8 if dtype in BITS else end - begin
    if end - begin != needed:
        raise _damaged(
            file, total, f"the tensor {name} of type {dtype} and shape {shown(shape)} has {end - begin} bytes"
        )
    return Tensor(file, name, tuple(shape), dtype, start + begin, start + end)


def _damaged(file: Path, total: int, text: str) -> InputError:
    return InputError(
        f"{file} ({total} bytes) is truncated or no safetensors file: {text}.",
        field=str(file),
        value=text,
        remedy=REFETCH,
    )
