"""Whether a value came back from JSON as it was: by exact type and complete state, never by `==` alone. Pure."""

import dataclasses
import enum
import functools
import inspect
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from typing import Any, Final, cast

from aiokv.caching.jsonable import ATOMS, Difference, unholdable
from aiokv.caching.packed import packed_is_same
from aiokv.caching.packing import PACKAGES

_MISSING: Final = object()
# Modules of the standard library whose types compare by their whole state. Their names, since imports cost time.
_EQUALITY_MODULES = frozenset({"datetime", "uuid", "ipaddress", "re", "zoneinfo", "fractions"})

Orders = Sequence[Mapping[str, object]]


_CHANGED = Difference("", "comes back as another value", is_type=False)
_REORDERED = Difference("", "comes back in another order", is_type=False)
_UNDECLARED = Difference("", "has keys that its TypedDict does not declare", is_type=True)
_RESIZED = Difference("", "comes back with more or fewer items", is_type=False)


def difference(back: Any, result: Any, orders: Orders = ()) -> Difference | None:
    """Find the first difference between a value and what came back of it.

    An int may come back as the equal float. An aware time may come back with the offset in place of its zone. A dict with the
    keys of a `TypedDict` may come back in the declared order. Cached properties do not count. NaN equals NaN.

    Args:
        back: What came back.
        result: What was stored.
        orders: The fields of each `TypedDict` that may occur, in the order in which they are declared.

    Returns:
        The first difference in type or state, or None.

    Raises:
        RecursionError: The value is nested too deeply.
    """
    kind = type(back)
    if kind is not type(result):
        return _differ_in_type(back, result)
    if kind in ATOMS:
        return None if back == result else _CHANGED
    compare = _BY_TYPE.get(kind)
    return (_comparison_of(kind) if compare is None else compare)(back, result, orders)


def _differ_in_type(back: Any, result: Any) -> Difference | None:
    if type(back) is float and type(result) is int:
        # By the rules of Python's type hints, `float` accepts an int.
        return None if back == result else _CHANGED
    if type(back).__module__ == "numpy" and type(result).__qualname__ == "memmap" and isinstance(result, type(back)):
        # It is stored as the array that it is.
        return _differ_as_packed(back, result, ())
    reason = None if isinstance(result, bytes) else unholdable(result)
    if reason is not None:
        return Difference("", f"holds {reason}, which has no form in JSON here", is_type=False)
    reason = f"comes back as {type(back).__qualname__}, not {type(result).__qualname__}"
    return Difference("", reason, is_type=True, types=(type(back), type(result)))


def _differ_as_floats(back: float, result: float, _: Orders) -> Difference | None:
    if back == result:
        # The sign of zero counts, which == ignores.
        return None if back or math.copysign(1.0, back) == math.copysign(1.0, result) else _CHANGED
    return None if back != back and result != result else _CHANGED  # noqa: PLR0124 (NaN)


def _differ_as_float_bases(back: float, result: float, orders: Orders) -> Difference | None:
    # As plain floats: a subclass may define another ==.
    return _differ_as_floats(float.__pos__(back), float.__pos__(result), orders)


def _differ_as_complex(back: complex, result: complex, orders: Orders) -> Difference | None:
    return _differ_as_floats(back.real, result.real, orders) or _differ_as_floats(back.imag, result.imag, orders)


def _differ_as_times(back: Any, result: Any, _: Orders) -> Difference | None:
    if (back.tzinfo is None) is not (result.tzinfo is None) or back.utcoffset() != result.utcoffset():
        return _CHANGED
    # Where there is an offset, fold adds nothing. Across zones, == is False for a whole hour of the year (PEP 495).
    if back.tzinfo is None and back.fold != result.fold:
        return _CHANGED
    return None if back.replace(tzinfo=None, fold=0) == result.replace(tzinfo=None, fold=0) else _CHANGED


def _differ_as_sequences(back: Sequence[Any], result: Sequence[Any], orders: Orders) -> Difference | None:
    if len(back) != len(result):
        return _RESIZED
    for index, (one, other) in enumerate(zip(back, result, strict=True)):
        kind = type(one)
        if kind in ATOMS and kind is type(other) and one == other:
            continue
        if (found := difference(one, other, orders)) is not None:
            return found.under(f"[{index}]")
    return None


def _differ_as_deques(back: deque[Any], result: deque[Any], orders: Orders) -> Difference | None:
    return _CHANGED if back.maxlen != result.maxlen else _differ_as_sequences(back, result, orders)


def _differ_as_dicts(back: dict[Any, Any], result: dict[Any, Any], orders: Orders) -> Difference | None:
    if len(back) != len(result):
        is_typed = len(back) < len(result) and any(back.keys() <= order.keys() for order in orders)
        return _UNDECLARED if is_typed else _RESIZED
    for (key, one), (other_key, other) in zip(back.items(), result.items(), strict=True):
        if type(key) is not str or type(other_key) is not str:
            if (found := difference(key, other_key, orders)) is not None:
                return _REORDERED if key in result else found.under("[...]")
        elif key != other_key:
            return _differ_as_typed_dicts(back, result, orders)
        kind = type(one)
        if kind in ATOMS and kind is type(other) and one == other:
            continue
        if (found := difference(one, other, orders)) is not None:
            return found.under("[...]")
    return None


def _differ_as_typed_dicts(back: dict[Any, Any], result: dict[Any, Any], orders: Orders) -> Difference | None:
    if back.keys() != result.keys():
        return _CHANGED
    if not any([name for name in order if name in back] == list(back) for order in orders):
        return _REORDERED
    return _differ_as_dicts(back, {name: result[name] for name in back}, orders)


def _differ_as_defaultdicts(back: Any, result: Any, orders: Orders) -> Difference | None:
    return _CHANGED if back.default_factory is not result.default_factory else _differ_as_dicts(back, result, orders)


def _differ_as_sets(back: set[Any], result: set[Any], orders: Orders) -> Difference | None:
    if len(back) != len(result):
        return _RESIZED
    others = {item: item for item in result}
    missing = 0
    for item in back:
        other = others.get(item, _MISSING)
        if other is not _MISSING:
            if (found := difference(item, other, orders)) is not None:
                return found.under("[...]")
        elif type(item) is float and math.isnan(item):
            missing += 1
        else:
            return _CHANGED.under("[...]")
    lost = sum(1 for item in result if item not in back)
    nans = sum(1 for item in result if type(item) is float and math.isnan(item) and item not in back)
    return None if missing == lost == nans else _CHANGED


def _differ_as_identities(back: object, result: object, _: Orders) -> Difference | None:
    return None if back is result else _CHANGED


def _differ_as_equals(back: object, result: object, _: Orders) -> Difference | None:
    try:
        return None if bool(back == result) else _CHANGED
    except Exception:  # noqa: BLE001 (what cannot be compared is not known to be the same)
        return _CHANGED


def _differ_as_packed(back: object, result: object, _: Orders) -> Difference | None:
    return None if packed_is_same(back, result) else _CHANGED


def _differ_as_decimals(back: Any, result: Any, _: Orders) -> Difference | None:
    # The exponent counts, too: 1.0 == 1.00.
    return None if back.as_tuple() == result.as_tuple() else _CHANGED


def _differ_as_paths(back: object, result: object, _: Orders) -> Difference | None:
    # By text: paths of Windows are equal where only their case differs.
    return None if str(back) == str(result) else _CHANGED


def _differ_as_models(back: Any, result: Any, orders: Orders) -> Difference | None:
    if back.__pydantic_fields_set__ != result.__pydantic_fields_set__:
        return Difference("", "comes back with other model_fields_set", is_type=False)
    if (found := _differ_in_dicts(back, result, orders)) is not None:
        return found
    extra, other_extra = back.__pydantic_extra__, result.__pydantic_extra__
    if (extra or other_extra) and (found := difference(extra, other_extra, orders)) is not None:
        return found.under(".model_extra")
    private, other_private = back.__pydantic_private__, result.__pydantic_private__
    if private is None and other_private is None:
        return None
    if (found := _differ_in_state(private or {}, other_private or {}, orders, type(back))) is not None:
        return Difference("", "loses a private attribute", is_type=False)
    own_slots = [name for name in _slots(type(back)) if not name.startswith("__pydantic_")]
    return _differ_in_slots(back, result, own_slots, orders) if own_slots else None


def _differ_in_dicts(back: Any, result: Any, orders: Orders) -> Difference | None:
    return _differ_in_state(getattr(back, "__dict__", {}), getattr(result, "__dict__", {}), orders, type(back))


def _differ_in_state(
    state: Mapping[str, Any], other_state: Mapping[str, Any], orders: Orders, owner: type
) -> Difference | None:
    """Compare attributes by name; the values of cached properties do not count."""
    if state.keys() != other_state.keys():
        for name in state.keys() ^ other_state.keys():
            if not isinstance(inspect.getattr_static(owner, name, None), functools.cached_property):
                return Difference("", "loses or gains an attribute that is not a field", is_type=False)
    for name, one in state.items():
        other = other_state.get(name, _MISSING)
        kind = type(one)
        if other is _MISSING or (kind in ATOMS and kind is type(other) and one == other):
            continue
        if (found := difference(one, other, orders)) is not None:
            return found.under(f".{name}")
    return None


def _slots(kind: type) -> list[str]:
    """Return the names of the slots of a class and its bases, mangled where they are private."""
    names: list[str] = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name in {"__dict__", "__weakref__"}:
                continue
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return names


def _differ_in_slots(back: Any, result: Any, names: Sequence[str], orders: Orders) -> Difference | None:
    for name in names:
        one, other = getattr(back, name, _MISSING), getattr(result, name, _MISSING)
        if one is other:
            continue
        if one is _MISSING or other is _MISSING:
            return Difference("", "loses or gains an attribute", is_type=False)
        if (found := difference(one, other, orders)) is not None:
            return found.under(f".{name}")
    return None


def _differ_as_objects(back: Any, result: Any, orders: Orders) -> Difference | None:
    found = _differ_as_bases(back, result, orders) or _differ_in_own_state(back, result, orders)
    if found is not None and hasattr(type(back), "get_secret_value"):
        return Difference("", f"is a {type(back).__qualname__}, which is masked in JSON", is_type=True)
    return found


def _differ_as_bases(back: Any, result: Any, orders: Orders) -> Difference | None:
    """Compare what a class inherits from a built-in type."""
    for base, compare in _BY_BASE:
        if isinstance(back, base) and (found := compare(back, result, orders)) is not None:
            return found
    for base in _EQUALITY_BASES:
        if isinstance(back, base) and cast("Any", base).__eq__(back, result) is not True:
            return _CHANGED
    return None


def _differ_in_own_state(back: Any, result: Any, orders: Orders) -> Difference | None:
    """Compare by the `==` of the class, and by all attributes."""
    kind = type(back)
    slots = _slots(kind)
    # The items of a named tuple are compared already; arrays among them have no `==` of one bool.
    is_tuple = cast("Any", kind).__eq__ is tuple.__eq__
    if cast("Any", kind).__eq__ is object.__eq__:
        if not slots and not hasattr(back, "__dict__"):
            # Its state cannot be read.
            return _differ_as_identities(back, result, orders)
    elif not (dataclasses.is_dataclass(kind) or is_tuple) and (found := _differ_as_equals(back, result, orders)) is not None:
        return found
    return _differ_in_dicts(back, result, orders) or _differ_in_slots(back, result, slots, orders)


def _comparison_of(kind: type) -> "_Comparison":
    if hasattr(kind, "__pydantic_fields_set__"):
        return _differ_as_models
    if issubclass(kind, enum.Enum):
        return _differ_as_identities
    module = kind.__module__.partition(".")[0]
    if module in _EQUALITY_MODULES:
        return _differ_as_equals
    if module in PACKAGES:
        return _differ_as_packed
    if module == "decimal":
        return _differ_as_decimals
    return _differ_as_paths if module == "pathlib" else _differ_as_objects


_Comparison = Callable[[Any, Any, Orders], Difference | None]
_BY_TYPE: dict[type, _Comparison] = {
    float: _differ_as_floats,
    complex: _differ_as_complex,
    datetime: _differ_as_times,
    time: _differ_as_times,
    list: _differ_as_sequences,
    tuple: _differ_as_sequences,
    deque: _differ_as_deques,
    dict: _differ_as_dicts,
    OrderedDict: _differ_as_dicts,
    Counter: _differ_as_dicts,
    defaultdict: _differ_as_defaultdicts,
    set: _differ_as_sets,
    frozenset: _differ_as_sets,
}
_BY_BASE: tuple[tuple[type | tuple[type, ...], _Comparison], ...] = (
    ((list, tuple), _differ_as_sequences),
    (deque, _differ_as_deques),
    (defaultdict, _differ_as_defaultdicts),
    (dict, _differ_as_dicts),
    ((set, frozenset), _differ_as_sets),
    (float, _differ_as_float_bases),
    (complex, _differ_as_complex),
    ((datetime, time), _differ_as_times),
)
_EQUALITY_BASES: tuple[type, ...] = (str, int, bytes, date, timedelta)
