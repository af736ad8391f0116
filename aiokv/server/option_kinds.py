"""The kinds of values that the server's options have: texts, numbers, sizes, seconds, flags."""

import contextlib
import math
import re
import sys
from collections.abc import Callable

from aiokv.backends.redis.options import DURABILITIES
from aiokv.record import Record

Reader = Callable[[object], object]
"""Return the value that a flag's text, a variable's text or a file's value means; raise ValueError where it means none."""


class Kind(Record):
    """What an option's value may be.

    Args:
        metavar: What the help calls it.
        rule: What a message calls it.
        read: Reads it.
        is_free: Whether no bounds apply.
        may_be_shown: Whether a message may repeat a wrong one; a URL may hold a secret.
    """

    metavar: str
    rule: str
    read: Reader
    is_free: bool = False
    may_be_shown: bool = True


_DECIMAL = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?", re.ASCII)
_SIZE_TEXT = re.compile(r"([0-9.]+) ?([kmgt]?)(i?)b?", re.ASCII | re.IGNORECASE)
_UNITS = {
    "": (1, 1),
    "k": (1000, 1024),
    "m": (1000**2, 1024**2),
    "g": (1000**3, 1024**3),
    "t": (1000**4, 1024**4),
}
_FLAG_TEXTS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _read_text(raw: object) -> str:
    if not isinstance(raw, str) or not raw or "\0" in raw:
        raise ValueError
    return raw


def _read_durability(raw: object) -> str:
    if raw not in DURABILITIES:
        raise ValueError
    return str(raw)


def _read_whole(raw: object) -> int:
    # int() alone would take "6_0" and digits of other scripts.
    if isinstance(raw, str) and raw.isascii() and raw.isdigit() and len(raw) <= len(str(sys.maxsize)):
        return int(raw)
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    raise ValueError


def _read_number(raw: object) -> float:
    if isinstance(raw, str) and _DECIMAL.fullmatch(raw):
        return float(raw)
    if isinstance(raw, (int, float)) and not isinstance(raw, bool):
        with contextlib.suppress(OverflowError):
            number = float(raw)
            if math.isfinite(number):
                return number
    raise ValueError


def read_size(raw: object) -> int:
    """Return the bytes that a size means.

    Args:
        raw: A whole number, or a text such as `64MiB`, `1.9MB`, `2G` or `5000`.

    Returns:
        The size in bytes.

    Raises:
        ValueError: It means no whole number of bytes.
    """
    match = _SIZE_TEXT.fullmatch(raw) if isinstance(raw, str) else None
    if match is None:
        return _read_whole(raw)
    number, prefix, binary = match.groups()
    digits = _DECIMAL.fullmatch(number)
    if digits is None or (binary and not prefix):
        raise ValueError
    whole, fraction = digits[1], digits[2] or ""
    size = int(whole + fraction) * _UNITS[prefix.lower()][binary != ""]
    # Whole bytes alone: 1.9MB is 1,900,000.
    bytes_, rest = divmod(size, int(f"1{'0' * len(fraction)}"))
    if rest:
        raise ValueError
    return bytes_


def _read_flag(raw: object) -> bool:
    value = _FLAG_TEXTS.get(raw.lower()) if isinstance(raw, str) else raw
    if not isinstance(value, bool):
        raise ValueError  # noqa: TRY004 (one exception for all that cannot be read)
    return value


TEXT = Kind("TEXT", "a text that is not empty", _read_text, is_free=True, may_be_shown=False)
URL = TEXT._replace(metavar="URL")
FILE = TEXT._replace(metavar="F")
WHOLE = Kind("N", "a whole number", _read_whole)
NUMBER = Kind("N", "a number", _read_number)
SIZE = Kind("SIZE", "a size (such as 64MiB, 1.9MB or 4096)", read_size)
SECONDS = Kind("SECONDS", "a number of seconds", _read_number)
FLAG = Kind("", "true or false", _read_flag, is_free=True)
DURABILITY = Kind("D", "acked or replicated", _read_durability, is_free=True)
