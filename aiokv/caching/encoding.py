"""The canonical encoding of values: different values have different bytes, in every process and on every machine. Pure.

The encoding is a persistent format: a change of it empties every cache, and golden vectors in the tests guard it.
Every value is written as a tag of one byte and a content that shows where it ends: by a fixed length, a length before it, or
a byte after it that cannot be part of it (0xFF after UTF-8, a point after values). So no content looks like structure.
The name of a class and the names of its fields are encoded once, and forgotten with the class.
"""

import dataclasses
import datetime as dt
import enum
import functools
import struct
import sys
import types
import uuid
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from aiokv.caching.foreign import find_identity
from aiokv.caching.naming import HEAP_TYPE, Unencodable, class_identity, type_identity

Encoder = Callable[[Any], bytes]

_FLOAT = struct.Struct(">d")
_MOMENT = struct.Struct(">HBBBBBIB")
_DATE = struct.Struct(">HBB")
_TIME = struct.Struct(">BBBIB")
_NO_ZONE = b"N"
_MODEL_SLOTS = frozenset({"__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__"})
_CANONICAL_NAN = _FLOAT.pack(float("nan"))
# Time zones that have one offset all year, beside `datetime.timezone`. Any other class of zone may change with the date.
_FIXED_ZONES = frozenset(
    ["pydantic_core._pydantic_core.TzInfo", "dateutil.tz.tz.tzutc", "dateutil.tz.tz.tzoffset", "pytz.UTC", "pytz._FixedOffset"]
)


class FieldWithoutValue:
    """The value of a field that was never set; it has no encoding."""


_UNSET = FieldWithoutValue()


def encode(value: object) -> bytes:
    """Encode a value canonically.

    The order of dictionaries counts, since a function can see it; that of sets does not. Dataclasses, named tuples and
    pydantic models count with their whole state: fields, other attributes, slots, and of models which fields were set, extra
    and private ones. Values of cached properties do not count. Enum members count by name and value, classes by module and
    name. The classes of fixed time zones and the layout of arrays do not count.

    Args:
        value: None, bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range, Ellipsis, Enum,
            date, time, datetime, timedelta, timezone, ZoneInfo, Decimal, Fraction, UUID, Path, class, dataclass, named tuple,
            pydantic model, numpy array or scalar, DataFrame, Series, Index, Timestamp or Timedelta of pandas, Table or
            RecordBatch of pyarrow, an object with `__cache_key__()`, and what of these is nested in these.

    Returns:
        Bytes that differ for different values and types, and are the same in every process and on every machine.

    Raises:
        Unencodable: The value, or one inside it, is of another type.
        RecursionError: It holds itself.
    """
    return _ENCODERS[type(value)](value)


def is_settled(value: object) -> bool:
    """Return whether a value can never change, and so its encoding cannot either.

    Args:
        value: Any value.

    Returns:
        True for scalars, classes, and for tuples, frozensets and enum members of such; False where that is not certain.
    """
    kind = type(value)
    if kind in _ATOMS or _seldom_encoder(kind) is not None:
        return True
    if kind is tuple or kind is frozenset:
        return all(map(is_settled, value))  # type: ignore[call-overload]
    if kind is dt.datetime or kind is dt.time:
        return value.tzinfo is None or is_settled(value.tzinfo)  # type: ignore[attr-defined]
    if isinstance(value, enum.Enum):
        return not hasattr(kind, "__cache_key__") and is_settled(value._value_)
    return isinstance(value, type)


def slot_names(kind: type) -> list[str]:
    """Return the names of the slots of a class and its bases, in a fixed order.

    Args:
        kind: A class.

    Returns:
        The names, mangled as their attributes are.
    """
    return sorted(
        {name for base in kind.__mro__ for name, item in vars(base).items() if type(item) is types.MemberDescriptorType}
    )


def _close(tag: bytes, parts: Iterable[bytes]) -> bytes:
    return b"".join((tag, *parts, b"."))


def _encode_float(value: float) -> bytes:
    return b"f" + (_CANONICAL_NAN if value != value else _FLOAT.pack(value))  # noqa: PLR0124 (NaN alone differs from itself)


def _encode_text(value: str) -> bytes:
    try:
        return b"s" + value.encode() + b"\xff"
    except UnicodeEncodeError:
        # A lone surrogate is not UTF-8, but arguments may hold one.
        return b"s" + value.encode("utf-8", "surrogatepass") + b"\xff"


def _encode_items(tag: bytes, values: Iterable[object]) -> bytes:
    parts = [tag]
    try:
        for value in values:
            parts.append(_ENCODERS[type(value)](value))  # noqa: PERF401 (the count so far says where an error is)
    except Unencodable as error:
        error.path = f"[{len(parts) - 1}]{error.path}"
        raise
    parts.append(b".")
    return b"".join(parts)


def _encode_set(tag: bytes, values: Iterable[object]) -> bytes:
    try:
        return _close(tag, sorted(map(encode, values)))
    except Unencodable as error:
        error.path = "{...}" + error.path
        raise


def _encode_dict(values: dict[Any, object]) -> bytes:
    parts = [b"d"]
    try:
        for key, value in values.items():
            parts.append(_ENCODERS[type(key)](key))
            parts.append(_ENCODERS[type(value)](value))
    except Unencodable as error:
        index, is_value = divmod(len(parts) - 1, 2)
        error.path = f".{'values' if is_value else 'keys'}()[{index}]{error.path}"
        raise
    parts.append(b".")
    return b"".join(parts)


def _encode_datetime(value: dt.datetime) -> bytes:
    moment = _MOMENT.pack(
        value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond, value.fold
    )
    return b"D%b%b" % (moment, _NO_ZONE if value.tzinfo is None else _encode_zone(value.tzinfo, ".tzinfo"))


def _encode_date(value: dt.date) -> bytes:
    return b"E" + _DATE.pack(value.year, value.month, value.day)


def _encode_time(value: dt.time) -> bytes:
    moment = _TIME.pack(value.hour, value.minute, value.second, value.microsecond, value.fold)
    return b"h%b%b" % (moment, _NO_ZONE if value.tzinfo is None else _encode_zone(value.tzinfo, ".tzinfo"))


def _encode_timedelta(value: dt.timedelta) -> bytes:
    return b"r%d %d %d;" % (value.days, value.seconds, value.microseconds)


def _encode_zone(zone: dt.tzinfo, path: str = "") -> bytes:
    kind = type(zone)
    if _seldom_encoder(kind) is _encode_zone:
        try:
            # Zones that were read from a file, whose key is only a label, cannot be pickled.
            zone.__reduce__()
        except Exception:  # noqa: BLE001 (PicklingError, whose module is large)
            raise Unencodable(kind, "was read from a file: take ZoneInfo(name)", path) from None
        return _close(b"Q", [encode(zone.key)])  # type: ignore[attr-defined]
    if kind is dt.timezone or f"{kind.__module__}.{kind.__qualname__}" in _FIXED_ZONES:
        return _close(b"Q", [encode(zone.utcoffset(None)), encode(zone.tzname(None))])
    if hasattr(kind, "__cache_key__"):
        return encode(zone)
    raise Unencodable(kind, "may have any offset: take datetime.timezone or zoneinfo.ZoneInfo", path)


def _encode_class(kind: type) -> bytes:
    return b"y" + encode(class_identity(kind))


def _encoder_of(kind: type) -> Encoder:
    """Make the encoder of a class, which may hold what belongs to the class, but not the class itself."""
    encoder: Encoder | None = None
    if issubclass(kind, type):
        encoder = _encode_class
    elif hasattr(kind, "__cache_key__"):
        encoder = _own_key_encoder(kind)
    elif issubclass(kind, enum.Enum):
        encoder = _enum_encoder(kind)
    elif dataclasses.is_dataclass(kind):
        encoder = _state_encoder(b"o", kind, tuple(field.name for field in dataclasses.fields(kind)), object)
    elif issubclass(kind, tuple) and hasattr(kind, "_fields"):
        encoder = _state_encoder(b"n", kind, (), tuple)
    elif hasattr(kind, "__pydantic_fields_set__") and hasattr(kind, "__pydantic_fields__"):
        encoder = _model_encoder(kind)
    elif (foreign := find_identity(kind)) is not None:
        encoder = _foreign_encoder(*foreign)
    if encoder is None:
        raise Unencodable(kind)
    return encoder


def _foreign_encoder(tag: bytes, identify: Callable[[Any], object]) -> Encoder:
    return lambda value: tag + encode(identify(value))


def _own_key_encoder(kind: type) -> Encoder:
    head = _encode_class(kind)

    def encode_own_key(value: Any) -> bytes:
        try:
            # Of the class, as Python looks up special methods.
            return b"k" + head + encode(type(value).__cache_key__(value))
        except Unencodable as error:
            error.path = ".__cache_key__()" + error.path
            raise

    return encode_own_key


def _enum_encoder(kind: type[enum.Enum]) -> Encoder:
    head, is_flag = _encode_class(kind), issubclass(kind, enum.Flag)

    def encode_member(member: Any) -> bytes:
        # Versions of Python name combined flags in different ways.
        name = None if is_flag else member._name_
        try:
            content = encode(member._value_)
        except Unencodable as error:
            if type(member).__members__.get(name) is not member:
                error.path = ".value" + error.path
                raise
            content = b"-"
        return b"e" + head + encode(name) + content

    return encode_member


def _check_layout(kind: type, base: type) -> None:
    """Refuse a class with state that is neither in attributes nor in slots nor in what `base` holds."""
    for parent in kind.__mro__:
        new = getattr(parent, "__new__", None)
        if not parent.__flags__ & HEAP_TYPE or (isinstance(new, types.BuiltinFunctionType) and new.__self__ is parent):
            if parent is not base:
                raise Unencodable(kind, f"also is a {parent.__qualname__}, whose content has no canonical encoding")
            return


def _cached_properties(kind: type) -> frozenset[str]:
    attributes = {name: item for base in reversed(kind.__mro__) for name, item in vars(base).items()}
    return frozenset(name for name, item in attributes.items() if isinstance(item, functools.cached_property))


def _state_encoder(tag: bytes, kind: type, fields: tuple[str, ...], base: type) -> Encoder:
    """Make the encoder of a class whose instances have fields, other attributes, slots and, where they are tuples, items."""
    _check_layout(kind, base)
    head = tag + _encode_class(kind) + encode(getattr(kind, "_fields", None) if base is tuple else fields)
    slots = tuple(name for name in slot_names(kind) if name not in fields)
    known = _cached_properties(kind).union(fields)

    def encode_state(value: Any) -> bytes:
        name = ""
        parts = [head]
        try:
            for name in fields:
                content = getattr(value, name, _UNSET)
                parts.append(_ENCODERS[type(content)](content))
            if base is tuple:
                name = "[:]"
                parts.append(encode(tuple(tuple.__iter__(value))))
            attributes = getattr(value, "__dict__", {})
            if slots or not known.issuperset(attributes):
                more = {slot: content for slot in slots if (content := getattr(value, slot, _UNSET)) is not _UNSET}
                more.update({key: attributes[key] for key in attributes if key not in known})
                for name in sorted(more):
                    parts.append(encode(name))
                    parts.append(encode(type_identity(more[name]) if name == "__orig_class__" else more[name]))
        except Unencodable as error:
            error.path = f".{name}{error.path}"
            raise
        parts.append(b".")
        return b"".join(parts)

    return encode_state


def _model_encoder(kind: Any) -> Encoder:
    """Make the encoder of a class of pydantic models: fields, which of them were set, extra and private ones, and slots."""
    _check_layout(kind, object)
    fields = tuple(kind.__pydantic_fields__)
    cached, every = _cached_properties(kind).difference(fields), frozenset(fields)
    head = b"m" + _encode_class(kind) + encode(fields)
    slots = tuple(name for name in slot_names(kind) if name not in _MODEL_SLOTS)

    def encode_model(model: Any) -> bytes:
        state, fields_set = model.__dict__, model.__pydantic_fields_set__
        parts = [head]
        names = tuple(state)
        if names != fields:
            names = tuple(name for name in names if name not in cached)
            state = {name: state[name] for name in names}
        parts.append(b"=" if names == fields else encode(names))
        try:
            for value in state.values():
                parts.append(_ENCODERS[type(value)](value))  # noqa: PERF401 (the count so far says where an error is)
        except Unencodable as error:
            error.path = f".{names[len(parts) - 2]}{error.path}"
            raise
        parts.append(bytes([name in fields_set for name in fields]))
        if not fields_set <= every:
            parts.append(encode(sorted(fields_set - every)))
        extra, private = model.__pydantic_extra__, model.__pydantic_private__
        if extra or private or slots:
            parts.append(
                _encode_dict({"extra": extra, "private": private, **{name: getattr(model, name, None) for name in slots}})
            )
        parts.append(b".")
        return b"".join(parts)

    return encode_model


class _Encoders(dict[type, Encoder]):
    """Encoders by the type of a value; those of the program's classes are made when first asked for."""

    def __missing__(self, kind: type) -> Encoder:
        if (seldom := _seldom_encoder(kind)) is not None:
            return self.setdefault(kind, seldom)
        if type(kind).__eq__ is not type.__eq__:
            # Two classes may be equal here, so they must not share an encoder.
            return _encoder_of(kind)
        encoder = _ENCODER_BY_CLASS.get(kind)
        if encoder is None:
            encoder = _ENCODER_BY_CLASS[kind] = _encoder_of(kind)
        return encoder


_ENCODER_BY_CLASS: weakref.WeakKeyDictionary[type, Encoder] = weakref.WeakKeyDictionary()

_BUILTIN: dict[type, Encoder] = {
    type(None): lambda _: b"N",
    type(...): lambda _: b"X",
    bool: lambda value: b"T" if value else b"F",
    int: lambda value: b"i%x;" % value,
    float: _encode_float,
    complex: lambda value: b"c" + _encode_float(value.real) + _encode_float(value.imag),
    str: _encode_text,
    bytes: lambda value: b"b%d:%b" % (len(value), value),
    bytearray: lambda value: b"B%d:%b" % (len(value), value),
    list: lambda value: _encode_items(b"l", value),
    tuple: lambda value: _encode_items(b"t", value),
    set: lambda value: _encode_set(b"S", value),
    frozenset: lambda value: _encode_set(b"Z", value),
    dict: _encode_dict,
    range: lambda value: _encode_items(b"R", (value.start, value.stop, value.step)),
    dt.datetime: _encode_datetime,
    dt.date: _encode_date,
    dt.time: _encode_time,
    dt.timedelta: _encode_timedelta,
    dt.timezone: _encode_zone,
    uuid.UUID: lambda value: b"u" + value.bytes,
}
# By class name: module and encoder. A value of such a class has imported its module; most programs need none of these.
_SELDOM: dict[str, tuple[str, Encoder]] = {
    "ZoneInfo": ("zoneinfo", _encode_zone),
    # Not str(), which the caller's decimal context has a say in.
    "Decimal": ("decimal", lambda value: "x{0.sign} {0.digits} {0.exponent};".format(value.as_tuple()).encode()),
    "Fraction": ("fractions", lambda value: _encode_items(b"q", (value.numerator, value.denominator))),
    **dict.fromkeys(["PosixPath", "PurePosixPath"], ("pathlib", lambda value: b"P" + _encode_text(str(value)))),
    **dict.fromkeys(["WindowsPath", "PureWindowsPath"], ("pathlib", lambda value: b"W" + _encode_text(str(value)))),
}
_ENCODERS = _Encoders(_BUILTIN)


def _seldom_encoder(kind: type) -> Encoder | None:
    module, encoder = _SELDOM.get(kind.__name__, ("", None))
    return encoder if encoder is not None and getattr(sys.modules.get(module), kind.__name__, None) is kind else None


_MUTABLE = frozenset({bytearray, list, tuple, set, frozenset, dict, dt.datetime, dt.time})
_ATOMS = frozenset(_BUILTIN) - _MUTABLE
