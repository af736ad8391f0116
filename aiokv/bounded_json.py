"""JSON from others, parsed in bounded memory: a byte of it can otherwise become fifty."""

import re
from typing import Any

import orjson

# JSON of this size is parsed whatever it holds.
_MAX_BUILT_BYTES = 64 * 1024
_BEFORE_VALUE = re.compile(rb'[ \t\r\n]*+\{[ \t\r\n]*+"value"[ \t\r\n]*+:[ \t\r\n]*+"')
_AFTER_VALUE = re.compile(rb'"[ \t\r\n]*+\}[ \t\r\n]*+\Z')
_MAX_AFTER_VALUE_BYTES = 16
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
# Matches at every quotation mark, with the text's end or without, so that a search takes linear time.
_TEXT_OR_REST = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


def parse_object(body: bytes) -> dict[str, Any] | None:
    """Parse a JSON object, in memory of about the size of its texts: an answer of brackets would take fifty times its size.

    Args:
        body: An answer's body.

    Returns:
        The object; None where the body is none, or has more than 64 KiB outside of its texts.
    """
    if len(body) > _MAX_BUILT_BYTES and not _is_mostly_text(body):
        return None
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        # Not chained: the decoder's error holds the whole body.
        return None
    return parsed if isinstance(parsed, dict) else None


def parse_object_of(body: bytes | bytearray, max_parts: int) -> dict[str, Any] | None:
    """Parse a JSON object of a bounded number of members and items.

    Args:
        body: A body of any size.
        max_parts: Most objects, lists, members and items in it, however deep they lie.

    Returns:
        The object; None where the body is none, or has more parts.
    """
    # Each part has one of these marks, or is the first one behind such a mark. Most bodies have few within their texts, too.
    if _count_parts(body) > max_parts and _count_parts(_TEXT_OR_REST.sub(b"", body, 2 * max_parts + 2)) > max_parts:
        return None
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def parse_sole_value(body: bytes) -> str | None:
    """Parse the text of a large `{"value": "<text>"}` without building anything else.

    Args:
        body: An answer's body.

    Returns:
        The text; None where there is more, or anything else, and where the body is so small that `parse_object` serves.
    """
    if len(body) <= _MAX_BUILT_BYTES:
        return None
    before, after = _BEFORE_VALUE.match(body), _AFTER_VALUE.search(body, len(body) - _MAX_AFTER_VALUE_BYTES)
    if before is None or after is None:
        return None
    try:
        # What begins with a quotation mark can be nothing but one text.
        text = orjson.loads(memoryview(body)[before.end() - 1 : after.start() + 1])
    except orjson.JSONDecodeError:
        return None
    return text if isinstance(text, str) else None


def _count_parts(body: bytes | bytearray) -> int:
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def _is_mostly_text(body: bytes) -> bool:
    """Return whether a JSON body has at most 64 KiB outside of its texts, and so holds few objects."""
    outside_bytes = position = 0
    while outside_bytes <= _MAX_BUILT_BYTES:
        start = body.find(b'"', position)
        if start < 0:
            return outside_bytes + len(body) - position <= _MAX_BUILT_BYTES
        text = _TEXT.match(body, start)
        if text is None:
            return False
        # The text itself is an object, too.
        outside_bytes += start - position + 1
        position = text.end()
    return False
