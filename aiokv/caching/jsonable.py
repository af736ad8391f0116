"""Whether JSON can hold a value, and the first part that it cannot hold. Pure."""

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Final, NamedTuple, cast

MAX_PATH_CHARS: Final = 200
ATOMS: Final = frozenset({str, int, bool, bytes, type(None)})
"""Types of which two values are the same wherever they are equal and of one type."""

_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1
_NATIVE_ATOMS = frozenset({str, int, bool, type(None)})
_CONTAINERS = (list, tuple, set, frozenset, deque)


class Difference(NamedTuple):
    """The first place where two values differ.

    Args:
        path: The way to it, such as `.items[3]`, without keys that are data.
        reason: What differs, without the values.
        is_type: Whether the types differ there, so that no value of this type can be stored.
        types: What came back and what was stored, where these are of two types.
    """

    path: str
    reason: str
    is_type: bool
    types: tuple[type, type] | None = None

    def under(self, step: str) -> "Difference":
        """Return the same difference, seen from the object that holds it."""
        return self._replace(path=f"{step}{self.path}"[:MAX_PATH_CHARS])


def is_native(value: object) -> bool:
    """Return whether JSON has a form for each type in a value, and each float is finite.

    Args:
        value: What a function returned.

    Returns:
        False where a part is not exactly a str, int, float, bool, None, list or dict with str keys.

    Raises:
        RecursionError: The value is nested too deeply, or holds itself.
    """
    kind = type(value)
    if kind in _NATIVE_ATOMS:
        return True
    if kind is dict:
        for key, item in cast("dict[object, object]", value).items():
            if type(key) is not str or (type(item) not in _NATIVE_ATOMS and not is_native(item)):
                return False
        return True
    if kind is list:
        for item in cast("list[object]", value):  # noqa: SIM110 (a generator would cost twice)
            if type(item) not in _NATIVE_ATOMS and not is_native(item):
                return False
        return True
    return kind is float and math.isfinite(cast("float", value))


def find_not_native(value: object) -> Difference | None:  # noqa: PLR0911 (one for each fault)
    """Find the first part of a value that JSON would change.

    Args:
        value: What a function returned.

    Returns:
        Where and why, or None where JSON holds all of it.

    Raises:
        RecursionError: The value is nested too deeply, or holds itself.
    """
    kind = type(value)
    if kind is list:
        for index, item in enumerate(cast("list[object]", value)):
            if (found := find_not_native(item)) is not None:
                return found.under(f"[{index}]")
        return None
    if kind is dict:
        for key, item in cast("dict[object, object]", value).items():
            if type(key) is not str:
                return Difference("", f"has a key of type {type(key).__qualname__}", is_type=True)
            if (found := find_not_native(key) or find_not_native(item)) is not None:
                return found.under("[...]")
        return None
    if kind in _NATIVE_ATOMS or kind is float:
        reason = unholdable(value)
        return None if reason is None else Difference("", f"holds {reason}", is_type=False)
    # The bool of numpy is called bool, too.
    name = f"numpy.{kind.__qualname__}" if kind.__module__ == "numpy" else kind.__qualname__
    return Difference("", f"is of type {name}", is_type=True)


def find_unholdable(value: object) -> str | None:
    """Find what JSON cannot hold in a value of a type that it can hold.

    Args:
        value: What a function returned, which pydantic could not write or read back.

    Returns:
        What the value holds, such as `"NaN or infinity"`, or None where it found nothing.
    """
    seen: set[int] = set()
    stack: list[object] = [value]
    while stack:
        value = stack.pop()
        reason = unholdable(value)
        if reason is not None:
            return reason
        if type(value) in ATOMS or id(value) in seen:
            continue
        seen.add(id(value))
        stack.extend(_children(value))
    return None


def models_in(value: object) -> Iterator[Any]:
    """Walk through the pydantic models of a value, in an order that is the same for a copy of the value.

    Args:
        value: What a function returned, or what was read back.

    Yields:
        Each model before the models that it holds, without models in sets, which have no order.

    Raises:
        RecursionError: The value is nested too deeply, or holds itself.
    """
    kind = type(value)
    if kind in ATOMS or kind is float:
        return
    if hasattr(kind, "__pydantic_fields_set__"):
        yield value
    if isinstance(value, set | frozenset):
        return
    for child in _children(value):
        if type(child) not in ATOMS:
            yield from models_in(child)


def unholdable(value: object) -> str | None:
    """Find what JSON cannot hold in one value, without its parts.

    Args:
        value: A value of a type that JSON can hold.

    Returns:
        What the value holds, such as `"NaN or infinity"`, or None.
    """
    if isinstance(value, float):
        return None if math.isfinite(value) else "NaN or infinity"
    if isinstance(value, str):
        return None if value.isascii() or _is_utf8(value) else "a lone surrogate"
    if isinstance(value, int):
        return None if _MIN_INT <= value <= _MAX_INT else "an int of more than 64 bits"
    if isinstance(value, bytes):
        return None if _is_utf8_bytes(value) else "bytes that are not UTF-8"
    if type(value).__module__ == "decimal" and not getattr(value, "is_finite", bool)():
        return "a Decimal that is NaN or infinite"
    return None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_utf8_bytes(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _in_order(value: dict[Any, Any]) -> Iterable[Any]:
    """Return the keys sorted where they can be: a `TypedDict` may come back in another order."""
    try:
        return sorted(value)
    except TypeError:
        return value


def _children(value: object) -> Iterator[object]:
    """Return the parts of a container, model or dataclass."""
    if isinstance(value, dict):
        return chain(value.keys(), map(value.__getitem__, _in_order(value)))
    if isinstance(value, _CONTAINERS):
        return iter(value)
    kind = type(value)
    if hasattr(kind, "__pydantic_fields__") or hasattr(kind, "__pydantic_fields_set__"):
        names: Iterator[str] = iter(cast("Any", kind).__pydantic_fields__)
        extra = getattr(value, "__pydantic_extra__", None)
        return chain((getattr(value, name, None) for name in names), () if extra is None else extra.values())
    if dataclasses.is_dataclass(kind):
        return (getattr(value, field.name, None) for field in dataclasses.fields(kind))
    return iter(())
