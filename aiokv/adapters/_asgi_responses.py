"""What of a response the ASGI cache stores, for how long, and the text that it is stored as.

A text is eight hexadecimal digits (the CRC-32 of the rest), a line of JSON, then `t` and the body as it is, or `b` and the body
as base64. A text that its digits do not fit is damaged.
"""

import base64
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from email.utils import parsedate_to_datetime
from hashlib import blake2b
from typing import Any, Final, NamedTuple

import orjson

from aiokv import clock

Headers = list[tuple[bytes, bytes]]
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

# Of these, with a lifetime of their own; 200 with the cache's, too (RFC 9110, 15.1, without 206, 405, 414 and 501).
_OK: Final = 200
_NO_CONTENT: Final = 204
_STATUSES: Final = frozenset({_OK, 203, _NO_CONTENT, 300, 301, 308, 404, 410})
# RFC 9111, sections 5.2.2.2, 5.2.2.8 and 5.2.2.10.
_FORBIDDING_STALE: Final = frozenset({"must-revalidate", "proxy-revalidate", "s-maxage"})
_FORBIDDING: Final = frozenset({"no-store", "no-cache", "private"})
# They have no end.
_ENDLESS: Final = frozenset({"text/event-stream", "multipart/x-mixed-replace"})
_IN_304: Final = frozenset({b"cache-control", b"content-location", b"date", b"etag", b"expires", b"vary"})
# Of the connection, or made anew for each response.
_NOT_STORED: Final = frozenset({b"age", b"connection", b"date", b"keep-alive", b"server", b"trailer", b"transfer-encoding"})
_CHECK_CHARS: Final = 8
_MAX_DIGITS: Final = 15


class StoredResponse(NamedTuple):
    """A response as it was stored."""

    status: int
    headers: Headers
    body: bytes
    made_at: float
    """Seconds since the epoch."""
    fresh_seconds: float

    def is_past_use(self) -> bool:
        """Return whether it is no longer fresh, and says that it must not be served so."""
        stale_seconds = clock.now() - self.made_at - self.fresh_seconds
        if stale_seconds < 0:
            return False
        directives = _directives_of(joined(self.headers))
        window = _number_of(directives.get("stale-while-revalidate", ""))
        return not _FORBIDDING_STALE.isdisjoint(directives) or (window is not None and stale_seconds >= window)

    async def send(self, if_none_match: str, send: Send, *, is_stored: bool) -> None:
        """Send it, or 304 where the client has it."""
        headers = list(self.headers)
        if is_stored:
            headers.append((b"age", str(max(0, int(clock.now() - self.made_at))).encode()))
        etag = next(value for name, value in headers if name == b"etag").removeprefix(b"W/")
        offered = [one.strip().removeprefix("W/").encode("latin-1") for one in if_none_match.split(",")]
        status, body = self.status, self.body
        if status == _OK and (etag in offered or offered == [b"*"]):
            headers = [header for header in headers if header[0] in _IN_304 or header[0] == b"age"]
            status, body = 304, b""
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Rules(NamedTuple):
    """What is stored, and for how long."""

    ttl: float
    vary: tuple[str, ...]
    max_body_bytes: int

    def fresh_seconds(self, status: int, headers: Headers, size_bytes: int, *, is_whole: bool) -> float | None:
        """Return for how many seconds a response is fresh, or None where it must not be stored; names are in lower case.

        Args:
            status: Its status.
            headers: Its headers.
            size_bytes: How much of its body is known.
            is_whole: Whether that is the whole body.
        """
        values = joined(headers)
        directives = _directives_of(values)
        lifetime = _lifetime_of(values, directives)
        seconds = self.ttl if lifetime is None else lifetime - (_number_of(values.get("age", "")) or 0)
        declared_bytes = _number_of(values.get("content-length", ""))
        may_be_stored = (
            status in _STATUSES
            and (status == _OK or lifetime is not None)
            and seconds > 0
            and "set-cookie" not in values
            and _FORBIDDING.isdisjoint(directives)
            and {*_items_of(values.get("vary", ""))} <= {*self.vary}
            and values.get("content-type", "").partition(";")[0].strip().lower() not in _ENDLESS
            and max(size_bytes, declared_bytes or 0) <= self.max_body_bytes
            and not (is_whole and "content-length" in values and declared_bytes != size_bytes)
        )
        return seconds if may_be_stored else None

    def write(self, status: int, headers: Headers, body: bytes, fresh_seconds: float) -> str:
        """Return the text that a response is stored as."""
        values = joined(headers)
        kept = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in headers if name not in _NOT_STORED]
        if "content-length" not in values and status != _NO_CONTENT:
            kept.append(["content-length", str(len(body))])
        if "etag" not in values:
            # Weak, since a compressing middleware may change the bytes.
            kept.append(["etag", f'W/"{blake2b(body, digest_size=16).hexdigest()}"'])
        if not {"max-age", "s-maxage"} & _directives_of(values).keys():
            kept.append(["cache-control", f"max-age={int(fresh_seconds)}"])
        if missing := [name for name in self.vary if name not in _items_of(values.get("vary", ""))]:
            kept.append(["vary", ", ".join(missing)])
        head = orjson.dumps(
            {"status": status, "headers": kept, "made_at": clock.now(), "fresh_seconds": fresh_seconds}
        ).decode()
        try:
            rest = f"{head}\nt{body.decode()}"
        except UnicodeDecodeError:
            rest = f"{head}\nb{base64.b64encode(body).decode()}"
        return _check_of(rest) + rest


def read_response(text: str) -> StoredResponse | None:
    """Return the response that `Rules.write` made a text of, or None where the text is damaged."""
    check, rest = text[:_CHECK_CHARS], text[_CHECK_CHARS:]
    if check != _check_of(rest):
        return None
    head_text, _, kind_and_body = rest.partition("\n")
    head = orjson.loads(head_text)
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head["headers"]]
    body_text = kind_and_body[1:]
    body = body_text.encode() if kind_and_body[0] == "t" else base64.b64decode(body_text)
    return StoredResponse(head["status"], headers, body, head["made_at"], head["fresh_seconds"])


def fresh_seconds_of(text: str) -> float:
    """Return how long a response is fresh that `Rules.write` has just made a text of."""
    seconds: float = orjson.loads(text[_CHECK_CHARS : text.index("\n")])["fresh_seconds"]
    return seconds


def _check_of(rest: str) -> str:
    return f"{zlib.crc32(rest.encode(errors='surrogatepass')):08x}"


def _lifetime_of(values: dict[str, str], directives: dict[str, str]) -> float | None:
    """Return the seconds that a response says it is fresh, 0 where it says that it is not, or None where it says nothing."""
    given = directives.get("s-maxage", directives.get("max-age"))
    if given is not None:
        # One that is no number counts as expired (RFC 9111, 4.2.1).
        return _number_of(given) or 0
    if "expires" not in values:
        return None
    expires_at = _moment_of(values["expires"])
    made_at = _moment_of(values.get("date", ""))
    return 0 if expires_at is None else expires_at - (clock.now() if made_at is None else made_at)


def _moment_of(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None


def joined(headers: Headers) -> dict[str, str]:
    """Return each header's values, joined by commas; names are in lower case."""
    values: dict[str, str] = {}
    for name_bytes, value in headers:
        name = name_bytes.decode("latin-1")
        values[name] = f"{values[name]},{value.decode('latin-1')}" if name in values else value.decode("latin-1")
    return values


def _items_of(text: str) -> list[str]:
    return [item.strip().lower() for item in text.split(",") if item.strip()]


def _directives_of(values: dict[str, str]) -> dict[str, str]:
    """Return the directives of `Cache-Control`, of equal ones the first; without it, what `Pragma` means."""
    directives: dict[str, str] = {}
    for directive in values.get("cache-control", values.get("pragma", "")).split(","):
        name, _, value = directive.partition("=")
        directives.setdefault(name.strip().lower(), value.strip().strip('"'))
    return directives


def _number_of(text: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0")
    return int(digits or "0") if len(digits) <= _MAX_DIGITS else 10**_MAX_DIGITS - 1
