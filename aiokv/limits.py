"""The limits of the service, checked once, for both sides of the wire.

Source: fal's documentation "Use KV Store" for the value's size and the TTL; RFC 9110 section 4.1 and the common server
limit of 8,190 bytes for a request line. Where the service's own limit is unknown, the strictest known one is taken,
so that a program that works against one store works against all of them.
"""

from collections.abc import AsyncIterable, Iterable, Mapping
from datetime import timedelta
from typing import Any

from aiokv.errors import ValueTooLargeError, truncated

MAX_VALUE_BYTES = 1_900_000
"""Largest value, in bytes of UTF-8 ("1.9 MB" in the service's documentation)."""

MIN_TTL_SECONDS = 60
MAX_TTL_SECONDS = 2_592_000
DEFAULT_TTL_SECONDS = MAX_TTL_SECONDS

MAX_ENTRY_PATH_BYTES = 8_000
"""Largest `db_name` and `key` together, percent-encoded; verb, TTL and a prefix fill the rest of a request line of 8,190."""

_UNRESERVED = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-~"
# Python refuses to write out an int of thousands of digits.
_MAX_PRINTED_TTL = 10**15
# One character is at most four bytes of UTF-8, and a byte at most three when percent-encoded.
_MAX_QUOTED_BYTES_PER_CHAR = 12


def check_db_name(db_name: str) -> None:
    """Check a store's namespace.

    Args:
        db_name: Any non-empty text without `/` and NUL, other than `.` and `..`.

    Raises:
        TypeError: It is not a string.
        ValueError: It is empty, `.`, `..`, holds `/`, NUL or a lone surrogate, or is too long for a request line.
    """
    _check_name("db_name", db_name)
    if "/" in db_name:
        raise ValueError(
            f"db_name {truncated(db_name)} contains '/', which ends a db_name in the service's paths; "
            "use another separator, such as '.' or '-'"
        )
    _check_fits("db_name", db_name)


def check_entry(db_name: str, key: str) -> None:
    """Check a key, and that it fits a request line together with a namespace that `check_db_name` has accepted.

    Args:
        db_name: A checked namespace.
        key: Any non-empty text without NUL, other than `.` and `..`.

    Raises:
        TypeError: The key is not a string.
        ValueError: It is empty, `.`, `..`, holds NUL or a lone surrogate, or is too long for a request line.
    """
    _check_name("key", key)
    if (len(db_name) + len(key)) * _MAX_QUOTED_BYTES_PER_CHAR > MAX_ENTRY_PATH_BYTES:
        _check_fits("key", db_name + key)


def check_entries(db_name: str, keys: Iterable[str]) -> list[str]:
    """Check several keys.

    Args:
        db_name: A checked namespace.
        keys: Keys as for `check_entry`.

    Returns:
        The keys, each once, in the order of first appearance.

    Raises:
        TypeError: A key is not a string, or `keys` is one or no iterable of them.
        ValueError: A key is not acceptable.
    """
    if (way_out := _way_from("a list", keys)) is not None:
        raise TypeError(f"keys must be an iterable of str, not {_kind(keys)}; {way_out}")
    names = list(keys)
    for key in names:
        check_entry(db_name, key)
    return list(dict.fromkeys(names))


def check_prefix(db_name: str, prefix: str) -> None:
    """Check what the keys of a listing begin with.

    Args:
        db_name: A checked namespace.
        prefix: Any text without NUL, the empty one too.

    Raises:
        TypeError: It is not a string.
        ValueError: It holds NUL or a lone surrogate, or is too long for a request line.
    """
    # Not as a key: `.` is the beginning of some.
    if not isinstance(prefix, str) or prefix not in {"", ".", ".."}:
        _check_name("prefix", prefix)
    _check_fits("prefix", db_name + prefix)


def check_value(value: str, name: str = "value") -> None:
    """Check a value.

    Args:
        value: Any text of at most 1,900,000 bytes of UTF-8.
        name: What messages call it, such as `value of 'key'`.

    Raises:
        TypeError: It is not a string.
        ValueError: It holds a lone surrogate, which UTF-8 cannot express.
        ValueTooLargeError: It is larger than the limit.
    """
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be str, not {type(value).__name__}; for other types use set_json, or encode it to text first"
        )
    check_value_size(len(value) if value.isascii() else len(_utf8(name, value)), name)


def check_mapping(values: Any) -> dict[str, str]:
    """Check that something maps keys to values; look at none of them.

    Args:
        values: A mapping, or what `dict` takes in place of one.

    Returns:
        A copy.

    Raises:
        TypeError: It is something else.
    """
    if isinstance(values, Mapping):
        return dict(values)
    way_out = _way_from("a dict", values)
    if way_out is None:
        try:
            return dict(values)
        except (TypeError, ValueError):
            way_out = "pass a dict, such as {'key': 'value'}"
    raise TypeError(f"values must be a mapping of keys to values, not {_kind(values)}; {way_out}")


def check_values(values: Mapping[str, str]) -> None:
    """Check several values.

    Args:
        values: Each value by its key.

    Raises:
        TypeError: As for `check_value`; the message names the key.
        ValueError: As for `check_value`; the message names the key.
        ValueTooLargeError: As for `check_value`; the message and the error's `key` name the key.
    """
    for key, value in values.items():
        try:
            check_value(value)
        except (TypeError, ValueError):
            name = f"value of {truncated(key)}"
        else:
            continue
        # Again, for a message with the key in it.
        try:
            check_value(value, name)
        except ValueTooLargeError as error:
            error.key = key
            raise


def size_bytes(text: str) -> int:
    """Return the size of a checked text in bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def check_value_size(size_bytes: int, name: str = "value") -> None:
    """Check a value's size.

    Args:
        size_bytes: The value's length in bytes of UTF-8.
        name: What messages call the value.

    Raises:
        ValueTooLargeError: It is larger than 1,900,000 bytes.
    """
    if size_bytes > MAX_VALUE_BYTES:
        raise ValueTooLargeError(
            f"{name} is {size_bytes:,} bytes of UTF-8, over the limit of {MAX_VALUE_BYTES:,} bytes; "
            "compress it, split it over several keys, or store it elsewhere and keep its address here"
        )


def check_ttl(ttl: int | timedelta | None) -> int:
    """Check a time to live and return it in seconds.

    Args:
        ttl: Whole seconds from 60 to 2,592,000 (30 days), a `timedelta` of the same range, or None for 30 days.

    Returns:
        The time to live in seconds.

    Raises:
        ValueError: It is of another type, no whole number of seconds, or outside the range.
    """
    if ttl is None:
        return DEFAULT_TTL_SECONDS
    if isinstance(ttl, timedelta):
        if ttl.microseconds:
            raise ValueError(f"ttl must be a whole number of seconds, not {ttl.total_seconds()} s")
        seconds = ttl.days * 86_400 + ttl.seconds
    elif isinstance(ttl, int) and not isinstance(ttl, bool):
        seconds = ttl
    else:
        # A ValueError for a wrong type too: one exception for every ttl that is refused.
        raise ValueError(f"ttl must be int seconds, a timedelta or None, not {type(ttl).__name__}")  # noqa: TRY004
    if not MIN_TTL_SECONDS <= seconds <= MAX_TTL_SECONDS:
        given = f"{seconds:,}" if abs(seconds) < _MAX_PRINTED_TTL else "a number far from that"
        raise ValueError(
            f"ttl must be from {MIN_TTL_SECONDS} to {MAX_TTL_SECONDS:,} seconds (1 minute to 30 days), not {given}"
        )
    return seconds


def _way_from(wanted: str, given: Any) -> str | None:
    """Return what to do about one text, bytes, or what cannot be iterated over; None where it is an iterable of others."""
    if isinstance(given, str):
        return f"put it in {wanted}"
    if isinstance(given, bytes | bytearray | memoryview):
        return f"decode it, and put it in {wanted}"
    if isinstance(given, AsyncIterable):
        return f"collect it in {wanted} first, with `async for`"
    try:
        iter(given)
    except TypeError:
        return f"pass {wanted}, an empty one for nothing"
    return None


def _kind(given: object) -> str:
    name = type(given).__name__
    return f"one {name}" if isinstance(given, str | bytes | bytearray | memoryview) else name


def _check_name(argument: str, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be str, not {type(name).__name__}")
    if not name:
        raise ValueError(f"{argument} must not be empty")
    if name in {".", ".."}:
        raise ValueError(f"{argument} must not be {name!r}: proxies drop such path segments; add a prefix")
    if "\0" in name:
        raise ValueError(f"{argument} {truncated(name)} contains NUL, which no request line may carry")
    if not name.isascii():
        _utf8(argument, name)


def _check_fits(argument: str, text: str) -> None:
    if len(text) * _MAX_QUOTED_BYTES_PER_CHAR <= MAX_ENTRY_PATH_BYTES:
        return
    data = text.encode(errors="surrogatepass")
    # As `urllib.parse.quote` would have it, which takes a tenth of a second for a megabyte.
    size_bytes = len(data) + 2 * len(data.translate(None, _UNRESERVED))
    if size_bytes > MAX_ENTRY_PATH_BYTES:
        raise ValueError(
            f"{argument} is too long for a request line: db_name and key are {size_bytes:,} bytes percent-encoded, "
            f"over the limit of {MAX_ENTRY_PATH_BYTES:,}; use a digest of it as the key"
        )


def _utf8(argument: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        # Not chained: a UnicodeEncodeError holds the whole text.
        position, size_chars = error.start, len(text)
    raise ValueError(
        f"{argument} ({size_chars:,} characters) holds a lone surrogate at position {position}, "
        "which UTF-8 cannot express; decode the original bytes with errors='replace'"
    )
