"""Binary content as one JSON text, compressed where that makes it smaller: a persistent format. Pure.

The text is `"`, a mark, base64 and `"`. The mark is `z` where the content is one Zstandard frame with a checksum. It is `u`
where the content is as it was: zstandard is not installed, the content is short, or compression saves less than an eighth.
The content is the length of a head in 4 bytes, the head as JSON, spaces up to a multiple of 16 bytes, and the body.
"""

import binascii
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import orjson

from aiokv.caching.unpackable import Unpackable

MAX_CONTENT_BYTES: Final = 32 * 1024 * 1024
"""The most that the arrays and tables of one result may hold, so that no stored text can fill the memory of a reader."""

PACKAGES: Final = frozenset({"numpy", "pandas", "pyarrow"})
"""The packages whose types are stored so."""

_MIN_COMPRESSED_BYTES = 1024
_LEVEL = 3
# What saves less, such as random numbers, is read twice as fast without.
_WORTH = 7 / 8
_ALIGNMENT = 16
_LENGTH_BYTES = 4
_MAX_HEAD_BYTES = 4 * 1024 * 1024
_MAX_BYTES_IN_ALL = MAX_CONTENT_BYTES + _MAX_HEAD_BYTES + 2 * _ALIGNMENT
# What the parts of one result have taken so far; None where the result is one array or table.
_written: ContextVar[list[int] | None] = ContextVar("_written", default=None)
_read: ContextVar[list[int] | None] = ContextVar("_read", default=None)


@contextmanager
def bounded(*, is_write: bool) -> Iterator[None]:
    """Bound the bytes of all parts of one result that are packed, or unpacked, inside.

    Args:
        is_write: Whether they are packed.
    """
    total = _written if is_write else _read
    token = total.set([0])
    try:
        yield
    finally:
        total.reset(token)


def check_size(size_bytes: int) -> None:
    """Refuse what is over `MAX_CONTENT_BYTES`, before it is copied.

    Args:
        size_bytes: The bytes of an array or a table.

    Raises:
        Unpackable: They are too many.
    """
    if size_bytes > MAX_CONTENT_BYTES:
        raise _too_large(size_bytes)


def check_head(head: object) -> None:
    """Refuse names and attributes that are too large, before they are copied: one text may stand in them many times.

    Args:
        head: What orjson can write.

    Raises:
        Unpackable: Its JSON would have more than 4 MiB.
        RecursionError: It is nested too deeply, or holds itself.
    """
    size_bytes = _count_head(head)
    if size_bytes > _MAX_HEAD_BYTES:
        raise _too_large(size_bytes, _MAX_HEAD_BYTES)


def _count_head(part: object) -> int:
    """Return a lower bound of the bytes of JSON; it ends above the limit."""
    if not isinstance(part, str | list | tuple | dict):
        return 1
    size_bytes = len(part)
    if isinstance(part, str):
        return size_bytes
    for each in itertools.chain(part, part.values()) if isinstance(part, dict) else part:
        if size_bytes > _MAX_HEAD_BYTES:
            break
        size_bytes += _count_head(each)
    return size_bytes


def _too_large(size_bytes: int, limit_bytes: int = MAX_CONTENT_BYTES) -> Unpackable:
    what = "takes" if limit_bytes == MAX_CONTENT_BYTES else "has names and attributes of"
    return Unpackable(
        f"{what} {size_bytes:,} bytes, over the limit of {limit_bytes:,} bytes before compression",
        "return less of it, or split the work into several calls",
        is_size=True,
    )


def pack_content(head: object, body: Sequence[Any]) -> bytes:
    """Make the JSON text of a head and a body.

    Args:
        head: What orjson can write.
        body: Buffers of bytes, in order.

    Returns:
        A JSON text of ASCII characters.

    Raises:
        Unpackable: The body is over `MAX_CONTENT_BYTES`, or the head over 4 MiB.
    """
    size_bytes = sum(len(part) for part in body)
    check_size(size_bytes)
    try:
        check_head(head)
        start = orjson.dumps(head)
    except (orjson.JSONEncodeError, RecursionError):
        raise Unpackable("has names or attributes that JSON does not hold", "give it plain ones") from None
    if len(start) > _MAX_HEAD_BYTES:
        raise _too_large(len(start), _MAX_HEAD_BYTES)
    start += b" " * (-(_LENGTH_BYTES + len(start)) % _ALIGNMENT)
    content = b"".join((len(start).to_bytes(_LENGTH_BYTES, "little"), start, *body))
    written = _written.get()
    if written is not None:
        written[0] += len(content)
        if written[0] > _MAX_BYTES_IN_ALL:
            raise _too_large(written[0])
    zstandard = _find_zstandard()
    if zstandard is not None and len(content) >= _MIN_COMPRESSED_BYTES:
        compressed = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(content)
        if len(compressed) <= _WORTH * len(content):
            return b'"z' + binascii.b2a_base64(compressed, newline=False) + b'"'
    return b'"u' + binascii.b2a_base64(content, newline=False) + b'"'


def unpack_content(json: bytes | str) -> tuple[Any, memoryview]:
    """Read what `pack_content` made, or anything else, in bounded memory.

    Args:
        json: The text.

    Returns:
        The head and the body.

    Raises:
        ValueError: The text is nothing that `pack_content` made, holds too much, or was compressed and zstandard is missing.
    """
    text = json.decode("ascii") if isinstance(json, bytes) else json
    mark = text[:2]
    if mark not in {'"z', '"u'} or text[-1] != '"':
        raise ValueError("the text is no packed content")
    content: bytes = binascii.a2b_base64(text[2:-1], strict_mode=True)
    if mark == '"z':
        content = _decompress(content)
    else:
        _count(len(content))
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    if not _LENGTH_BYTES < end <= min(len(content), _MAX_HEAD_BYTES + _ALIGNMENT):
        raise ValueError("the packed content is cut off")
    return orjson.loads(content[_LENGTH_BYTES:end]), memoryview(content)[end:]


def _decompress(data: bytes) -> bytes:
    zstandard = _find_zstandard()
    if zstandard is None:
        raise ValueError("the packed content needs zstandard")
    try:
        size_bytes = zstandard.frame_content_size(data)
        if not 0 < size_bytes <= _MAX_BYTES_IN_ALL:
            raise ValueError("the packed content declares no size, or too large a one")
        _count(size_bytes)
        # A frame that holds more than it declares is an error here, not more memory.
        plain: bytes = zstandard.ZstdDecompressor().decompress(data, max_output_size=size_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError("the packed content is not Zstandard data") from error
    return plain


def _count(size_bytes: int) -> None:
    """Refuse parts of one result that hold too much in all."""
    read = _read.get()
    if read is not None:
        read[0] += size_bytes
        if read[0] > _MAX_BYTES_IN_ALL:
            raise ValueError("the packed parts hold too much in all")


def _find_zstandard() -> Any:
    """Return the package zstandard, or None where it is not installed."""
    return sys.modules.get("zstandard") or _import_zstandard()


@functools.cache
def _import_zstandard() -> Any:
    try:
        import zstandard  # noqa: PLC0415 (an extra)
    except ImportError:
        return None
    return zstandard
