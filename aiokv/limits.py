"""What the service accepts, checked once, for both sides of the wire.

Source: fal's documentation "Use KV Store" for the value's size and the TTL; RFC 9110 section 4.1 and the common server
limit of 8,190 bytes for a request line. Where the service's own limit is unknown, the strictest known reading is taken,
so that a program that works against one store works against all of them.
"""

from datetime import timedelta
from urllib.parse import quote

from aiokv.errors import ValueTooLargeError, shown

MAX_VALUE_BYTES = 1_900_000
"""Largest value, in bytes of UTF-8 ("1.9 MB" in the service's documentation)."""

MIN_TTL_SECONDS = 60
MAX_TTL_SECONDS = 2_592_000
DEFAULT_TTL_SECONDS = MAX_TTL_SECONDS

MAX_ENTRY_PATH_BYTES = 8_000
"""Largest `db_name` and `key` together, percent-encoded; verb, TTL and a prefix fill the rest of a request line of 8,190."""

# Python refuses to write out an int of thousands of digits.
_SHOWN_TTL_BOUND = 10**15
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
            f"db_name {shown(db_name)} contains '/', which ends a db_name in the service's paths; "
            "use another separator, such as '.' or '-'"
        )
    _check_fits("db_name", len(quote(db_name, safe="")))


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
        _check_fits("key", len(quote(db_name, safe="")) + len(quote(key, safe="")))


def check_value(value: str) -> None:
    """Check a value.

    Args:
        value: Any text of at most 1,900,000 bytes of UTF-8.

    Raises:
        TypeError: It is not a string.
        ValueError: It holds a lone surrogate, which UTF-8 cannot express.
        ValueTooLargeError: It is larger than the limit.
    """
    if not isinstance(value, str):
        raise TypeError(
            f"value must be str, not {type(value).__name__}; for other types use set_json, or encode it to text first"
        )
    check_value_size(len(value) if value.isascii() else len(_utf8("value", value)))


def check_value_size(size_bytes: int) -> None:
    """Check a value's size.

    Args:
        size_bytes: The value's length in bytes of UTF-8.

    Raises:
        ValueTooLargeError: It is larger than 1,900,000 bytes.
    """
    if size_bytes > MAX_VALUE_BYTES:
        raise ValueTooLargeError(
            f"value is {size_bytes:,} bytes of UTF-8, over the limit of {MAX_VALUE_BYTES:,} bytes; "
            "compress it, split it over several keys, or store it elsewhere and keep its address here"
        )


def check_ttl(ttl: int | timedelta | None) -> int:
    """Check a time to live and give it in seconds.

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
        # A ValueError for a wrong type too: every ttl that is refused can be caught as one exception.
        raise ValueError(f"ttl must be int seconds, a timedelta or None, not {type(ttl).__name__}")  # noqa: TRY004
    if not MIN_TTL_SECONDS <= seconds <= MAX_TTL_SECONDS:
        given = f"{seconds:,}" if abs(seconds) < _SHOWN_TTL_BOUND else "a number far from that"
        raise ValueError(
            f"ttl must be from {MIN_TTL_SECONDS} to {MAX_TTL_SECONDS:,} seconds (1 minute to 30 days), not {given}"
        )
    return seconds


def _check_name(argument: str, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be str, not {type(name).__name__}")
    if not name:
        raise ValueError(f"{argument} must not be empty")
    if name in {".", ".."}:
        raise ValueError(f"{argument} must not be {name!r}: proxies drop such path segments; add a prefix")
    if "\0" in name:
        raise ValueError(f"{argument} {shown(name)} contains NUL, which no request line may carry")
    if not name.isascii():
        _utf8(argument, name)


def _check_fits(argument: str, size_bytes: int) -> None:
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
