"""What the storages for hishel keep in a store, as text."""

import base64
import math
from collections.abc import Iterable
from email.utils import formatdate
from typing import Final, NamedTuple

import orjson
from hishel import Headers, Request, Response

from aiokv.adapters import _http_entries as entries
from aiokv.limits import MAX_TTL_SECONDS, MIN_TTL_SECONDS

ENTRY_PREFIX: Final = "hishel-entry:"
"""The keys of entries begin so."""

_FORMAT: Final = "s1"
_INDEX_PREFIX: Final = "hishel-key:"
_NEVER_STORED: Final = frozenset({"set-cookie", "set-cookie2"})


class Row(NamedTuple):
    """One entry in the list of its key.

    Args:
        id: Of the entry, as hexadecimal digits.
        ends: When it ends, in seconds since the epoch; None for no such end.
        idle_seconds: For how long it may go unread.
        touched: When it was stored or read, in seconds since the epoch.
    """

    id: str
    ends: float | None
    idle_seconds: float | None
    touched: float

    def expires(self) -> float:
        """Return when the entry expires, in seconds since the epoch."""
        idle = math.inf if self.idle_seconds is None else self.touched + self.idle_seconds
        return min(math.inf if self.ends is None else self.ends, idle)


def ttl_of(seconds: float) -> int:
    """Return a time to live that stores take; the exact end is in what is stored.

    Args:
        seconds: For how long.
    """
    return MAX_TTL_SECONDS if seconds >= MAX_TTL_SECONDS else max(MIN_TTL_SECONDS, math.ceil(seconds))


def index_key(key: str) -> str:
    """Return the key of the list of a key's entries.

    Args:
        key: One of hishel's.
    """
    # Some name their keys themselves, by what may be a secret.
    return _INDEX_PREFIX + entries.digest(key)


def encode_rows(rows: Iterable[Row]) -> str:
    """Return the text of a list of entries.

    Args:
        rows: The entries.
    """
    return orjson.dumps([list(row) for row in rows]).decode()


def decode_rows(text: str | None) -> list[Row]:
    """Return a list of entries, empty where the text is none.

    Args:
        text: What the store holds.
    """
    try:
        return [Row(*row) for row in orjson.loads(text or "[]")]
    except (ValueError, TypeError):
        return []


def encode(request: Request, response: Response, body: bytes, names: Iterable[str], ends: float | None) -> str | None:
    """Return the text of an entry, or None where it cannot be written as text.

    Args:
        request: The request.
        response: The response.
        body: Its body.
        names: The headers of the request that it depends on.
        ends: When it ends, in seconds since the epoch; None for no such end.
    """
    try:
        content, is_text = body.decode(), True
    except UnicodeDecodeError:
        content, is_text = base64.b64encode(body).decode("ascii"), False
    chosen_by = {name: request.headers.get_list(name) for name in names if name in request.headers}
    headers = {name: response.headers.get_list(name) for name in response.headers if name not in _NEVER_STORED}
    try:
        head = orjson.dumps([request.method, request.url, chosen_by, list(names), response.status_code, headers, ends, is_text])
    except TypeError:
        # A header that is no UTF-8.
        return None
    return f"{_FORMAT}{head.decode()}\n{content}"


def decode(text: str) -> tuple[Request, Response, bytes, list[str], float | None] | None:
    """Return the parts of an entry, or None where the text is none.

    Args:
        text: What the store holds.
    """
    head, newline, content = text.partition("\n")
    if not newline or not head.startswith(_FORMAT):
        return None
    try:
        method, url, chosen_by, names, status, headers, ends, is_text = orjson.loads(head[len(_FORMAT) :])
        body = content.encode() if is_text else base64.b64decode(content, validate=True)
        response = Response(status, Headers(headers))
        if not (isinstance(status, int) and 200 <= status <= 599 and _is_whole(response, body, method)):  # noqa: PLR2004 (final)
            return None
        return Request(method, url, Headers(chosen_by)), response, body, names, ends
    except (ValueError, TypeError, AttributeError):
        return None


def depend_on_host(headers: Headers) -> Headers:
    """Return headers that make hishel compare the `Host` of requests, which its keys do not hold.

    Args:
        headers: Those of a response.
    """
    names = entries.names_of(headers.get("vary", "")) or []
    if "host" in names:
        return headers
    return Headers({**{name: headers.get_list(name) or [] for name in headers}, "vary": [", ".join([*names, "host"])]})


def correct_dates(headers: Headers, now: float) -> Headers:
    """Return headers of a response that has just come, with dates by our clock where that of the origin is ahead.

    Args:
        headers: The headers.
        now: Seconds since the epoch.
    """
    date = entries.time_of(headers.get("date", ""))
    if date is None or date <= now:
        return headers
    lists = {name: headers.get_list(name) or [] for name in headers}
    for name in ("date", "expires"):
        time = entries.time_of(headers.get(name, ""))
        if time is not None:
            lists[name] = [formatdate(max(0, time - date + int(now)), usegmt=True)]
    return Headers(lists)


def _is_whole(response: Response, body: bytes, method: str) -> bool:
    length = response.headers.get("content-length", "")
    return not length or method == "HEAD" or "content-encoding" in response.headers or length == str(len(body))
