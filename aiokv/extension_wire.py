"""The protocol's extensions on the wire, shared by the client and the server: paths, queries, listings, claims.

`docs/protocol.md` describes them. Batches are in `aiokv.batch_wire`, the stream of a watch in `aiokv.event_wire`. Every
`ValueError` of the three names the rule that was broken, and no value; JSON of any size is parsed in memory of about its size.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode

import orjson

from aiokv.backends.capabilities import (
    MAX_BATCH_KEYS,
    Capabilities,
    Cleared,
    KeyInfo,
    Page,
)
from aiokv.bounded_json import parse_object_of
from aiokv.limits import MAX_ENTRY_PATH_BYTES, check_db_name, check_entry
from aiokv.wire import unquote

EXTENSIONS_HEADER: Final = "Aiokv-Extensions"
"""The header of every answer of a server that has extensions; `parse_extensions` reads it."""

MAX_EXTENSION_ANSWER_BYTES: Final = 17 * 1024 * 1024
"""Larger than any answer: 1,000 of the longest keys take 16 MB as JSON, the largest value 11.4 MB, 8 MiB of values less."""

MAX_PARTS: Final = 10 * MAX_BATCH_KEYS
"""More members and items than any request or answer has."""

_MAX_CURSOR_CHARS = MAX_ENTRY_PATH_BYTES
# A client may know claims without renewals, so those have a name of their own.
_NAMES: Mapping[str, str] = {"batch": "batch", "scan": "scan", "claim": "claims, renew", "watch": "watch"}
_KNOWN_NAMES = frozenset({"batch", "scan", "claims", "renew", "watch"})
_MAX_HEADER_CHARS = 1_000
_LIMIT = re.compile(r"[0-9]{1,4}")


class Listing(NamedTuple):
    """The query of `/keys/{db_name}` and `/count/{db_name}`."""

    prefix: str = ""
    cursor: str | None = None
    limit: int = MAX_BATCH_KEYS


def extensions_of(capabilities: Capabilities) -> str:
    """Build the header that names a server's extensions.

    Args:
        capabilities: Those of its backend.

    Returns:
        The header's text, such as `batch, scan, claims, renew, watch`; "" where there are none, and no header then.
    """
    return ", ".join(name for field, name in _NAMES.items() if getattr(capabilities, field) is not None)


def parse_extensions(text: str | None) -> frozenset[str]:
    """Parse the header that names a server's extensions.

    Args:
        text: The header's text, or None where the answer has none.

    Returns:
        Those of `batch`, `scan`, `claims`, `renew` and `watch` that are in it; others are ignored.
    """
    names = (name.strip(" \t") for name in (text or "")[:_MAX_HEADER_CHARS].split(","))
    return _KNOWN_NAMES.intersection(names)


def batch_path(db_name: str) -> str:
    """Build the path of a batch, percent-encoded."""
    return f"/batch/{quote(db_name, safe='')}"


def watch_path(db_name: str) -> str:
    """Build the path of a watch, percent-encoded."""
    return f"/watch/{quote(db_name, safe='')}"


def keys_path(db_name: str, listing: Listing = Listing()) -> str:  # noqa: B008 (immutable)
    """Build the path and query of a listing (GET) and of a step of clearing (DELETE).

    Args:
        db_name: A checked namespace.
        listing: Prefix, cursor and limit.

    Returns:
        `/keys/{db_name}?...`, percent-encoded.
    """
    query = {"prefix": listing.prefix, "after": listing.cursor or "", "limit": str(listing.limit)}
    return f"/keys/{quote(db_name, safe='')}?{build_query({name: text for name, text in query.items() if text})}"


def count_path(db_name: str, prefix: str = "") -> str:
    """Build the path and query of a count, percent-encoded."""
    query = f"?{build_query({'prefix': prefix})}" if prefix else ""
    return f"/count/{quote(db_name, safe='')}{query}"


def parse_db_path(raw: str) -> str:
    """Parse the namespace of a path without a key.

    Args:
        raw: What stands behind `/batch/`, `/keys/`, `/count/` or `/watch/`, as it was sent.

    Returns:
        The namespace, decoded and checked.

    Raises:
        ValueError: It is malformed or not acceptable.
    """
    db_name = unquote("db_name", raw)
    check_db_name(db_name)
    return db_name


def check_no_query(query: str) -> None:
    """Check the query of a batch or a watch, which take no parameters.

    Args:
        query: The raw query without its question mark.

    Raises:
        ValueError: It is not empty.
    """
    if query:
        raise ValueError("this path takes no query parameters")


def parse_listing_query(query: str, db_name: str, *, allowed: Collection[str] = ("prefix", "after", "limit")) -> Listing:
    """Parse the query of a listing, a count or a clear.

    Args:
        query: The raw query without its question mark.
        db_name: The namespace.
        allowed: The parameters that the path takes.

    Returns:
        Prefix, cursor and limit; the defaults for what is not given.

    Raises:
        ValueError: A parameter is unknown, given twice or not acceptable: a misspelt prefix must not clear everything.
    """
    given = parse_query(query, allowed)
    prefix = given.get("prefix", "")
    if prefix not in {"", ".", ".."}:
        try:
            check_entry(db_name, prefix)
        except ValueError as error:
            raise ValueError(f"prefix: {error}") from None
    cursor = given.get("after")
    if cursor is not None and not 0 < len(cursor) <= _MAX_CURSOR_CHARS:
        raise ValueError("after must be the `next` of the page before; leave it out for the first page")
    limit = given.get("limit", str(MAX_BATCH_KEYS))
    if not _LIMIT.fullmatch(limit) or not 1 <= int(limit) <= MAX_BATCH_KEYS:
        raise ValueError(f"limit must be a decimal number from 1 to {MAX_BATCH_KEYS:,}")
    return Listing(prefix, cursor, int(limit))


def parse_answer(body: bytes) -> dict[str, Any]:
    """Parse the body of any answer of an extension, in bounded memory.

    Args:
        body: The body, of any size.

    Returns:
        The JSON object.

    Raises:
        ValueError: It is none, or has far more in it than the largest answer.
    """
    answer = parse_object_of(body, MAX_PARTS)
    if answer is None:
        raise ValueError(
            f"the answer's body ({len(body):,} bytes) is not a JSON object, or has far more in it than was asked for"
        )
    return answer


def shorten_cursor(cursor: str, prefix: str) -> str:
    """Leave the prefix out of a backend's cursor, which may hold the longest key: both stand in one request line.

    Args:
        cursor: The backend's cursor.
        prefix: The prefix of the listing.

    Returns:
        The cursor for the client; `restore_cursor` reads it.
    """
    before, found, after = cursor.partition(prefix) if prefix else (cursor, "", "")
    return f"{len(before)}:{before}{after}" if found else f":{cursor}"


def restore_cursor(text: str, prefix: str) -> str:
    """Return a backend's cursor.

    Args:
        text: What `shorten_cursor` returned.
        prefix: The prefix of the listing.

    Returns:
        The cursor.

    Raises:
        ValueError: It is no such text.
    """
    place, colon, rest = text.partition(":")
    if not colon or (place and not _LIMIT.fullmatch(place)):
        raise ValueError("after must be the `next` of the page before")
    return rest[: int(place)] + prefix + rest[int(place) :] if place else rest


def page_body(page: Page, prefix: str = "", *, is_ordered: bool) -> bytes:
    """Build the answer of a listing.

    Args:
        page: The page.
        prefix: What its keys begin with.
        is_ordered: Whether keys come in the order of their code points.

    Returns:
        `{"keys": [...], "next": "cursor", "ordered": true}` as JSON.
    """
    keys = [{"key": key, "expires_at": round(at, 6), "value_bytes": size} for key, at, size in page.infos]
    cursor = None if page.cursor is None else shorten_cursor(page.cursor, prefix)
    return orjson.dumps({"keys": keys, "next": cursor, "ordered": is_ordered})


def parse_page(body: bytes, listing: Listing) -> tuple[Page, bool]:
    """Parse the answer of a listing.

    Args:
        body: The body of an answer with status 200.
        listing: What was asked for.

    Returns:
        The page, and whether keys come in the order of their code points.

    Raises:
        ValueError: The body is no such answer.
    """
    answer = parse_answer(body)
    keys, cursor, is_ordered = answer.get("keys"), _parse_next(answer), answer.get("ordered")
    if not isinstance(keys, list) or len(keys) > listing.limit:
        raise ValueError(f"the answer's member keys must be a list of at most {listing.limit:,}")
    if not isinstance(is_ordered, bool):
        raise ValueError("the answer's member ordered must be true or false")  # noqa: TRY004 (one kind for every fault)
    return Page([_parse_info(info, listing.prefix) for info in keys], cursor), is_ordered


def count_body(count: int) -> bytes:
    """Build the answer of a count."""
    return orjson.dumps({"count": count})


def parse_count(body: bytes) -> int:
    """Parse the answer of a count, with status 200; raise `ValueError` where the body is none."""
    return _parse_number(parse_answer(body), "count")


def cleared_body(cleared: Cleared, prefix: str = "") -> bytes:
    """Build the answer of a step of clearing.

    Args:
        cleared: What the step has done.
        prefix: What the keys begin with.

    Returns:
        `{"deleted": 5, "next": "cursor"}` as JSON.
    """
    cursor = None if cleared.cursor is None else shorten_cursor(cleared.cursor, prefix)
    return orjson.dumps({"deleted": cleared.deleted, "next": cursor})


def parse_cleared(body: bytes, listing: Listing) -> Cleared | int:
    """Parse the answer of a step of clearing.

    Args:
        body: The body of an answer with status 200.
        listing: What was asked for.

    Returns:
        What the step has done. Of a server that does not know `next`, how many entries it has deleted.

    Raises:
        ValueError: The body is no such answer.
    """
    answer = parse_answer(body)
    deleted = _parse_number(answer, "deleted", listing.limit)
    return Cleared(deleted, _parse_next(answer)) if "next" in answer else deleted


def build_query(parameters: Mapping[str, str]) -> str:
    """Build a query without its question mark, percent-encoded."""
    return urlencode(parameters, quote_via=quote, safe="")


def parse_query(query: str, allowed: Collection[str]) -> dict[str, str]:
    """Parse a query.

    Args:
        query: The raw query without its question mark.
        allowed: The parameters that the path takes.

    Returns:
        Those that are given, decoded.

    Raises:
        ValueError: A parameter is unknown, given twice or malformed.
    """
    given: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, _, text = part.partition("=")
        if name not in allowed or name in given:
            raise ValueError(f"the query may hold {', '.join(allowed)}, each once")
        given[name] = unquote(name, text)
    return given


def _parse_number(answer: Mapping[str, Any], name: str, most: int | None = None) -> int:
    number = answer.get(name)
    if type(number) is not int or number < 0 or (most is not None and number > most):
        raise ValueError(f"the answer's member {name} must be a number of entries that was asked for")
    return number


def _parse_next(answer: Mapping[str, Any]) -> str | None:
    cursor = answer.get("next")
    if cursor is not None and not (isinstance(cursor, str) and 0 < len(cursor) <= _MAX_CURSOR_CHARS):
        raise ValueError(f"the answer's member next must be null or a text of at most {_MAX_CURSOR_CHARS:,} characters")
    return cursor


def _parse_info(info: object, prefix: str) -> KeyInfo:
    if isinstance(info, dict):
        key, expires_at, value_bytes = info.get("key"), number_in(info.get("expires_at")), info.get("value_bytes")
        is_size = type(value_bytes) is int and value_bytes >= 0
        if isinstance(key, str) and key and key.startswith(prefix) and expires_at is not None and is_size:
            return KeyInfo(key, expires_at, info["value_bytes"])
    raise ValueError("each key of the answer must have a key with the prefix, a time of expiry and a size")


def number_in(given: object) -> float | None:
    """Return a number of JSON; None where it is something else."""
    # A bool is an int, too; of JSON no number is infinite.
    return float(given) if isinstance(given, int | float) and not isinstance(given, bool) else None
