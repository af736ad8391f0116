"""What is stored of an HTTP response: its text in the store, its keys, and how long it is kept."""

import base64
import binascii
import calendar
import re
from collections.abc import Iterable, Mapping
from email.utils import parsedate_tz
from hashlib import blake2b
from typing import Final

import orjson

from aiokv import clock
from aiokv.limits import MAX_TTL_SECONDS, MIN_TTL_SECONDS

_FORMAT: Final = "r1"
_POINTER: Final = "v1"
_DIGEST_BYTES: Final = 20
_WEEK_SECONDS: Final = 604_800
_DIRECTIVE: Final = re.compile(r'([!#$%&\'*+.^`|~\w-]+)\s*(?:=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*)))?')
_SECONDS: Final = re.compile(r"[0-9]+", re.ASCII).fullmatch
_MAX_SECONDS: Final = 2**31
_ENOUGH_DIGITS: Final = 11

Pairs = tuple[tuple[str, str], ...]
"""Headers in their order, each with its own spelling."""


class StoredResponse:
    """A whole response, as it is stored.

    Args:
        status: Its status code.
        reason: Its reason phrase.
        headers: Its headers, without cookies.
        body: Its body, as the client's `read()` returns it.
        vary: The names of the request's headers that chose it, in lower case, each with a digest of its value.
        is_decoded: Whether the client has undone the content's encoding.
        received: When it came, or was last validated, in seconds since the epoch.
        extra_age: Seconds of age on arrival that its `Date` does not show.
    """

    __slots__ = ("body", "extra_age", "headers", "is_decoded", "reason", "received", "status", "vary")

    def __init__(  # noqa: PLR0913, PLR0917 (each is a part of a response)
        self,
        status: int,
        reason: str,
        headers: Pairs,
        body: bytes,
        vary: Mapping[str, str],
        is_decoded: bool,  # noqa: FBT001 (stored by position)
        received: float,
        extra_age: int,
    ) -> None:
        self.status = status
        self.reason = reason
        self.headers = headers
        self.body = body
        self.vary = vary
        self.is_decoded = is_decoded
        self.received = received
        self.extra_age = extra_age

    def header(self, name: str) -> str:
        """Return the values of a header, joined by commas; "" where there is none."""
        return ", ".join([value for key, value in self.headers if key.lower() == name])


def encode(stored: StoredResponse) -> str | None:
    """Return the text of a response, or None where it cannot be written as text.

    Args:
        stored: The response.
    """
    try:
        body, is_text = stored.body.decode(), True
    except UnicodeDecodeError:
        body, is_text = base64.b64encode(stored.body).decode("ascii"), False
    vary, received = dict(stored.vary), stored.received
    try:
        head = orjson.dumps(
            [stored.status, stored.reason, stored.headers, vary, stored.is_decoded, received, stored.extra_age, is_text]
        )
    except TypeError:
        # A header that is no UTF-8.
        return None
    return f"{_FORMAT}{head.decode()}\n{body}"


def decode(text: str) -> StoredResponse | None:
    """Return the response of a text, or None where the text is none of ours.

    Args:
        text: What the store holds.
    """
    head, newline, body = text.partition("\n")
    if not newline or not head.startswith(_FORMAT):
        return None
    try:
        status, reason, headers, vary, is_decoded, received, extra_age, is_text = orjson.loads(head[len(_FORMAT) :])
        content = body.encode() if is_text else base64.b64decode(body, validate=True)
        pairs = tuple([(name + "", value + "") for name, value in headers])
        if not (isinstance(status, int) and 200 <= status <= 599):  # noqa: PLR2004 (final ones)
            return None
        if not (isinstance(reason, str) and isinstance(received, float)):
            return None
        return StoredResponse(status, reason, pairs, content, dict(vary), bool(is_decoded), received, int(extra_age))
    except (ValueError, TypeError, binascii.Error):
        return None


def encode_pointer(names: Iterable[str], generation: str) -> str:
    """Return the text that stands in place of a response which depends on headers of the request.

    Args:
        names: Which headers, in lower case.
        generation: A random text: responses that an older pointer led to are not found any more.
    """
    return _POINTER + orjson.dumps([sorted(names), generation]).decode()


def decode_pointer(text: str) -> tuple[list[str], str] | None:
    """Return the names and the generation of a pointer, or None where the text is none.

    Args:
        text: What the store holds.
    """
    if not text.startswith(_POINTER):
        return None
    try:
        names, generation = orjson.loads(text[len(_POINTER) :])
        return [name + "" for name in names], generation + ""
    except (ValueError, TypeError):
        return None


def digest(*parts: str) -> str:
    """Return a digest of texts that no other texts have; it tells nothing of them.

    Args:
        parts: The texts.
    """
    state = blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        data = part.encode(errors="surrogatepass")
        state.update(b"%d:" % len(data))
        state.update(data)
    return state.hexdigest()


def directives(value: str) -> dict[str, str | None]:
    """Return the directives of a `Cache-Control` header, in lower case, each with its argument or None.

    Args:
        value: The header; several lines joined by commas.
    """
    found: dict[str, str | None] = {}
    if value:
        for name, quoted, plain in _DIRECTIVE.findall(value):
            found.setdefault(name.lower(), quoted or plain or None)
    return found


def seconds_of(found: Mapping[str, str | None], name: str) -> int | None:
    """Return the seconds that a directive names, or None where it is absent or no number.

    Args:
        found: Directives.
        name: Which.
    """
    value = found.get(name)
    return read_seconds(value) if value is not None and _SECONDS(value) else None


def read_seconds(digits: str) -> int:
    """Return the seconds that digits name, 2 ** 31 at most, as RFC 9111 says in section 1.2.2.

    Args:
        digits: As many as there are.
    """
    return min(int(digits.lstrip("0")[:_ENOUGH_DIGITS] or "0"), _MAX_SECONDS)


def time_of(date: str) -> int | None:
    """Return the seconds since the epoch of an HTTP date, or None.

    Args:
        date: The header.
    """
    try:
        parsed = parsedate_tz(date)
        return None if parsed is None else calendar.timegm(parsed[:6])
    except (ValueError, OverflowError, IndexError, TypeError):
        return None


def is_whole(stored: StoredResponse, method: str) -> bool:
    """Return whether a body is as long as its header says.

    Args:
        stored: The response.
        method: That of its request.
    """
    length = stored.header("content-length")
    # A decoded body has another length, and a HEAD none.
    return not length or method == "HEAD" or bool(stored.header("content-encoding")) or length == str(len(stored.body))


def keep_seconds(stored: StoredResponse, *, is_shared: bool, revalidate_seconds: int) -> int | None:
    """Return for how long a response is kept: while it is fresh, may be served stale, or is of use to validate.

    Args:
        stored: The response.
        is_shared: Whether the cache is a shared one.
        revalidate_seconds: How long one with a validator is kept after that.

    Returns:
        A time to live that stores take, or None where it is not worth storing.
    """
    found = directives(stored.header("cache-control"))
    lifetime = _lifetime(stored, found, is_shared=is_shared)
    windows = [seconds_of(found, "stale-while-revalidate") or 0, seconds_of(found, "stale-if-error") or 0]
    seconds = lifetime + max(windows) - age_of(stored)
    if stored.header("etag") or stored.header("last-modified"):
        seconds = max(0, seconds) + revalidate_seconds
    return min(max(seconds, MIN_TTL_SECONDS), MAX_TTL_SECONDS) if seconds > 0 else None


def stale_seconds(stored: StoredResponse, *, is_shared: bool) -> int:
    """Return for how many seconds a response has no longer been fresh, below 0 where it still is.

    Args:
        stored: The response.
        is_shared: Whether the cache is a shared one.
    """
    return age_of(stored) - _lifetime(stored, directives(stored.header("cache-control")), is_shared=is_shared)


def age_of(stored: StoredResponse) -> int:
    """Return the age of a response in seconds.

    Args:
        stored: The response.
    """
    date = time_of(stored.header("date"))
    return stored.extra_age if date is None else max(0, stored.extra_age + int(clock.now()) - date)


def _lifetime(stored: StoredResponse, found: Mapping[str, str | None], *, is_shared: bool) -> int:
    """Return about how long a response is fresh; hishel alone decides whether it is."""
    seconds = seconds_of(found, "s-maxage") if is_shared else None
    if seconds is None:
        seconds = seconds_of(found, "max-age")
    if seconds is not None:
        return seconds
    date, expires = time_of(stored.header("date")) or int(clock.now()), stored.header("expires")
    if expires:
        return (time_of(expires) or 0) - date
    modified = time_of(stored.header("last-modified"))
    return 0 if modified is None else min(_WEEK_SECONDS, max(0, int(clock.now()) - modified) // 10)


def names_of(vary: str) -> list[str] | None:
    """Return which headers of a request choose a response, in lower case, or None where anything may.

    Args:
        vary: The header of the response.
    """
    names = sorted({name.strip().lower() for name in vary.split(",")} - {""})
    return None if "*" in names else names
