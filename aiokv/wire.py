"""The protocol on the wire, shared by the client and the server: paths, query, bodies, errors.

Source: the official client, fal-ai/fal `projects/fal/src/fal/toolkit/kv.py`, for routes and bodies. That client does not
quote keys, so a server takes everything after `/{db_name}/` as the key. This client quotes every byte that is not unreserved.
"""

import functools
import ipaddress
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal
from urllib.parse import quote

import orjson

from aiokv import clock
from aiokv.bounded_json import parse_object, parse_sole_value
from aiokv.errors import (
    AuthenticationError,
    CallError,
    RejectedError,
    ResponseError,
    StorageFullError,
    ThrottledError,
    UnavailableError,
    ValueTooLargeError,
)
from aiokv.limits import MAX_TTL_SECONDS, MAX_VALUE_BYTES, MIN_TTL_SECONDS, check_db_name, check_entry

Verb = Literal["get", "set", "delete"]

METHODS: Mapping[str, str] = {"get": "GET", "set": "PUT", "delete": "DELETE"}
TOKEN_PATH = "/storage/auth/token"  # noqa: S105 (a path)

NO_SUCH_PATH = "no such path; known: /get/"
"""How the server's error begins where it does not know the path of a request."""

MAX_ERROR_BODY_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 6 * MAX_VALUE_BYTES + 1024
"""Largest answer that can hold a value: JSON may write one byte as six (`\\u0000`)."""

TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})

_FULL = 507
# Not implemented, unknown version, no room left: the server says that it did nothing.
_REFUSING_STATUSES = frozenset({501, 505, _FULL})

# Most names need neither decoding nor a closer look: they begin with a letter or digit, and are far from any limit.
_PLAIN_ENTRY = re.compile(r"([A-Za-z0-9][A-Za-z0-9._~-]{0,63})/([A-Za-z0-9][A-Za-z0-9._~:-]{0,499})")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_MAX_DETAIL_CHARS = 200
_MIN_REDACTED_CHARS = 4
_REDIRECTS, _UNAUTHORIZED, _FORBIDDEN, _TOO_LARGE, _TOO_MANY, _SERVER_ERRORS = 300, 401, 403, 413, 429, 500


def entry_path(verb: Verb, db_name: str, key: str) -> str:
    """Build the path of an entry, percent-encoded.

    Args:
        verb: The call.
        db_name: A checked namespace.
        key: A checked key.

    Returns:
        `/{verb}/{db_name}/{key}`, where only unreserved characters stand for themselves, `/` not among them.
    """
    return f"/{verb}/{_quote(db_name)}/{_quote(key)}"


@functools.lru_cache(maxsize=1024)
def _quote(name: str) -> str:
    # Cached: a program uses the same few names again and again, and quoting costs as much as half of a request's URL.
    return quote(name, safe="")


def parse_entry_path(entry: str) -> tuple[str, str]:
    """Parse namespace and key from a raw path, as either client writes it.

    Args:
        entry: The path as it was sent, after `/{verb}/` and without the query, such as `db/a%2Fb`.

    Returns:
        The namespace and the key, percent-decoded and checked.

    Raises:
        ValueError: An escape is malformed, the bytes are not UTF-8, or a name is not acceptable.
    """
    if plain := _PLAIN_ENTRY.fullmatch(entry):
        return plain[1], plain[2]
    raw_db_name, separator, raw_key = entry.partition("/")
    if not separator:
        raise ValueError("path must be /{verb}/{db_name}/{key}")
    db_name, key = unquote("db_name", raw_db_name), unquote("key", raw_key)
    check_db_name(db_name)
    check_entry(db_name, key)
    return db_name, key


def ttl_query(ttl_seconds: int) -> dict[str, str]:
    """Build the query of a set.

    Args:
        ttl_seconds: A checked time to live.

    Returns:
        The query's one parameter.
    """
    return {"ttl": str(ttl_seconds)}


def parse_ttl_query(query: str) -> int | None:
    """Parse the time to live from a raw query.

    Args:
        query: The raw query without its question mark; parameters other than `ttl` are ignored.

    Returns:
        Seconds, or None where no `ttl` is given.

    Raises:
        ValueError: `ttl` is given more than once, is no plain decimal number, or is outside the range.
    """
    texts = [value for name, _, value in (part.partition("=") for part in query.split("&")) if name == "ttl"]
    if not texts:
        return None
    # int() alone would take "6_0", " 60" and digits of other scripts.
    digits = texts[0]
    if len(texts) > 1 or not (digits.isascii() and digits.isdigit() and len(digits) <= len(str(MAX_TTL_SECONDS))):
        raise ValueError(f"ttl must be one decimal number of seconds, from {MIN_TTL_SECONDS} to {MAX_TTL_SECONDS}")
    ttl_seconds = int(digits)
    if not MIN_TTL_SECONDS <= ttl_seconds <= MAX_TTL_SECONDS:
        raise ValueError(f"ttl must be from {MIN_TTL_SECONDS} to {MAX_TTL_SECONDS} seconds")
    return ttl_seconds


def value_body(value: str) -> bytes:
    """Build the body of a successful get.

    Args:
        value: The stored value.

    Returns:
        `{"value": "..."}` as JSON.
    """
    return orjson.dumps({"value": value})


def parse_value_body(body: bytes) -> str:
    """Parse the body of a successful get.

    Args:
        body: The body of an answer with status 200.

    Returns:
        The value.

    Raises:
        ValueError: The body is not a JSON object with a text under `value`; the message quotes nothing of it.
    """
    value = parse_sole_value(body)
    if value is None:
        answer = parse_object(body)
        value = answer.get("value") if answer is not None else None
    if not isinstance(value, str):
        # One kind of error for every fault of a body.
        raise ValueError(  # noqa: TRY004
            f'the answer\'s body ({len(body):,} bytes) is not a JSON object {{"value": "<text>"}}'
        )
    return value


def check_done_body(body: bytes) -> None:
    """Check the body of a successful set or delete, so that a proxy's page is not taken for the service's answer.

    Args:
        body: The body of an answer with status 200.

    Raises:
        ValueError: The body is not a JSON object; the message quotes nothing of it.
    """
    if parse_object(body) is None:
        raise ValueError(f"the answer's body ({len(body):,} bytes) is not a JSON object")


def error_body(message: str) -> bytes:
    """Build the body of an error.

    Args:
        message: The cause and the remedy, without a value or a secret.

    Returns:
        `{"error": "..."}` as JSON.
    """
    return orjson.dumps({"error": message})


def error_detail(body: bytes, secrets: tuple[str, ...] = ()) -> str:
    """Parse an error's body into text for a message.

    Args:
        body: At most 64 KiB of the answer's body; of HTML and garbage only the size is reported.
        secrets: Texts that an answer may echo and that no message may repeat.

    Returns:
        At most 200 printable characters.
    """
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    detail = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(detail, str) or not detail:
        return f"an answer of {len(body):,} bytes without an error message" if body else "an empty answer"
    return printable(redact(detail, secrets))


def redact(text: str, secrets: tuple[str, ...]) -> str:
    """Replace secrets in a text by `***`.

    Args:
        text: Any text.
        secrets: The secrets. One of fewer than 4 characters stays: it would shred the text, and could be guessed anyway.

    Returns:
        The text without them.
    """
    for secret in secrets:
        if len(secret) >= _MIN_REDACTED_CHARS:
            text = text.replace(secret, "***")
    return text


def printable(text: str) -> str:
    """Return a foreign text in a form that can stand in a message.

    Args:
        text: Any text.

    Returns:
        At most 200 characters of it, with a space for each unprintable one.
    """
    return "".join(char if char.isprintable() else " " for char in text[:_MAX_DETAIL_CHARS])


def error_for_status(status: int, detail: str, *, retry_after: float | None = None, write: bool = False) -> CallError:
    """Return the exception for an answer that is not a success.

    Args:
        status: The HTTP status, any but 200.
        detail: The body's message, from `error_detail`.
        retry_after: Seconds that the service asked to wait, or None.
        write: Whether the request would have changed something.

    Returns:
        The exception. A write that met a 5xx or an unknown 2xx may have been applied; one that met a 3xx, a 4xx, or a 501, 505
        or 507 was not.
    """
    kind: type[CallError]
    if status < _REDIRECTS:
        kind = ResponseError
    elif status in {_UNAUTHORIZED, _FORBIDDEN}:
        kind = AuthenticationError
    elif status == _TOO_LARGE:
        kind = ValueTooLargeError
    elif status == _TOO_MANY:
        kind = ThrottledError
    elif status == _FULL:
        kind = StorageFullError
    elif status >= _SERVER_ERRORS:
        kind = UnavailableError
    else:
        kind = RejectedError
    return kind(
        detail,
        status=status,
        retry_after=retry_after,
        maybe_applied=write and (status < _REDIRECTS or (status >= _SERVER_ERRORS and status not in _REFUSING_STATUSES)),
        transient=status in TRANSIENT_STATUSES,
    )


def parse_retry_after(text: str | None, now: datetime | None = None) -> float | None:
    """Parse a Retry-After header.

    Args:
        text: Seconds or an HTTP date (RFC 9110 section 10.2.3), or None.
        now: The present, with a time zone; None takes the clock.

    Returns:
        Seconds from now, at least 0; None where the header is absent or of neither form.
    """
    if text is None:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    moment = parse_http_date(text)
    return None if moment is None else max(0.0, (moment - (now or datetime.fromtimestamp(clock.now(), UTC))).total_seconds())


def parse_http_date(text: str) -> datetime | None:
    """Parse the date of an HTTP header.

    Args:
        text: An HTTP date (RFC 9110 section 5.6.7), or anything.

    Returns:
        The moment with a time zone, or None where it is no date.
    """
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    # The parser leaves out a zone that is absent or "-0000"; HTTP dates are always UTC.
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def is_loopback(host: str | None) -> bool:
    """Return whether a host is this machine, judged by its name alone.

    Args:
        host: A host name or address, without brackets.

    Returns:
        True for `localhost` and the loopback addresses.
    """
    if host is None:
        return False
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def unquote(argument: str, raw: str) -> str:
    """Decode a part of a raw path or query.

    Args:
        argument: What messages call it.
        raw: The part as it was sent, with bytes that are not UTF-8 as surrogates. A `+` stands for itself.

    Returns:
        The text.

    Raises:
        ValueError: An escape is malformed, or the bytes are not UTF-8.
    """
    data = raw.encode("utf-8", "surrogateescape")
    if _BAD_ESCAPE.search(data):
        raise ValueError(f"{argument} has a malformed percent escape; write a percent sign as %25")
    try:
        return _ESCAPE.sub(lambda match: bytes((int(match[1], 16),)), data).decode()
    except UnicodeDecodeError:
        pass
    raise ValueError(f"{argument} is not UTF-8 once percent-decoded")
