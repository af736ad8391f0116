"""From a call to its key: the arguments as they are bound, encoded so that no two different calls share a key. Pure.

The encoding is a persistent format: a change of it empties every cache, and golden vectors in the tests hold it still.
Every value is written as a tag of one byte, its length or count, and its content, so that no content can pass for structure.
"""

import dataclasses
import datetime as dt
import decimal
import enum
import hashlib
import inspect
import pathlib
import struct
import sys
import uuid
import zoneinfo
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aiokv.caching.naming import canonical_module
from aiokv.limits import check_entry

DIGEST_BYTES = 16
MAX_PREFIX_CHARS = 512

_FLOAT = struct.Struct(">d")
_CANONICAL_NAN = _FLOAT.pack(float("nan"))
# Equal and of equal type means the same call for these, which lets a call be looked up before it is encoded. Not so for
# floats: 0.0 equals -0.0, and NaN not itself.
_PLAIN_TYPES = frozenset({str, int, bool, bytes, type(None)})
_MAX_REMEMBERED_CALLS = 2_048
_MAX_REMEMBERED_BYTES = 512


class Unencodable(TypeError):  # noqa: N818 (a TypeError by its base's name)
    """Say that a value has no canonical encoding; its `path` says where in the argument it stands."""

    def __init__(self, value: object, path: str = "") -> None:
        super().__init__(f"{type(value).__module__}.{type(value).__qualname__}")
        self.path = path


class KeyMaker:
    """Make the keys of one function's calls.

    Args:
        function: The coroutine function.
        prefix: The readable beginning of its keys; None takes its module and qualified name.
        version: Told apart from every other version, so that raising it leaves old entries behind.
        ignore: Parameters that do not count.
        key: Gives what identifies a call from its arguments, in place of them.
        vary: Gives what a call depends on beside its arguments.

    Raises:
        TypeError: `ignore` names a parameter that the function has not.
        ValueError: The function is local and has no `key`, or the prefix is too long.
    """

    def __init__(  # noqa: PLR0913 (what makes up a key)
        self,
        function: Callable[..., object],
        *,
        prefix: str | None = None,
        version: int | str = 0,
        ignore: Iterable[str] = (),
        key: Callable[..., object] | None = None,
        vary: Callable[..., object] | None = None,
    ) -> None:
        self._name: str = function.__qualname__
        if "<locals>" in self._name and key is None:
            raise ValueError(
                f"{self._name} is defined inside a function: another call of that one makes another {function.__name__}, "
                "and both would share results; move it to the module, or pass key= and count in what it closes over"
            )
        self._prefix = f"{canonical_module(function.__module__)}.{self._name}" if prefix is None else prefix
        if not self._prefix or len(self._prefix) > MAX_PREFIX_CHARS:
            raise ValueError(f"prefix must be 1 to {MAX_PREFIX_CHARS} characters, not {len(self._prefix)}")
        # The rest of a key is digits, and takes a fixed room.
        try:
            check_entry("", f"{self._prefix}:{version}:")
        except ValueError as error:
            raise ValueError(f"prefix and version cannot stand in a key: {error}") from None
        signature = inspect.signature(function)
        ignored = {ignore} if isinstance(ignore, str) else set(ignore)
        if unknown := ignored - set(signature.parameters):
            raise TypeError(
                f"ignore names {sorted(unknown)}, which {self._name} has not; its parameters are {list(signature.parameters)}"
            )
        self._names = tuple(name for name in signature.parameters if name not in ignored)
        self._bind = _compile_binding(function, signature, self._names)
        self._has_more = key is not None or vary is not None
        self._key = key
        self._vary = vary
        self._version = version
        if isinstance(version, bool) or not isinstance(version, int | str):
            raise TypeError(f"version must be int or str, not {type(version).__name__}")
        self._start = b"".join((encode(self._prefix), encode(version), encode(self._names if key is None else ())))
        self._remembered: dict[tuple[object, ...], str] = {}
        # The counted arguments, then their types; only where these are plain does equality mean the same call.
        self.quick = _compile_binding(function, signature, self._names, types=True)

    @property
    def prefix(self) -> str:
        """The readable beginning of every key."""
        return self._prefix

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Make the key of a call.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.

        Returns:
            `prefix:version:digest`, the digest 128 bits of BLAKE2b in hexadecimal.

        Raises:
            TypeError: The arguments do not fit the function, or one of them has no canonical encoding.
        """
        values = self._bind(*args, **kwargs)
        if self._has_more:
            values = self._values_with_more(values, args, kwargs)
        # Each value with its type: 1 and True, which are equal, are two calls.
        call = (*values, *map(type, values))
        plain = _PLAIN_TYPES.issuperset(call[len(values) :])
        if plain and (key := self._remembered.get(call)) is not None:
            return key
        encoded = self._encode(values)
        digest = hashlib.blake2b(encoded, digest_size=DIGEST_BYTES).hexdigest()
        key = f"{self._prefix}:{self._version}:{digest}"
        if plain and len(encoded) <= _MAX_REMEMBERED_BYTES:
            if len(self._remembered) >= _MAX_REMEMBERED_CALLS:
                self._remembered.clear()
            self._remembered[call] = key
        return key

    def plain_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[object, ...] | None:
        """Say what identifies a call of plain arguments in this process, for a look-up that makes no key.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.

        Returns:
            What `quick` gives for this call, or None where equality of that does not mean the same call.
        """
        if self._has_more:
            return None
        call = self.quick(*args, **kwargs)
        return call if _PLAIN_TYPES.issuperset(call[len(call) // 2 :]) else None

    def _values_with_more(self, values: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        if self._key is not None:
            values = (self._key(*args, **kwargs),)
        return values if self._vary is None else (*values, self._vary(*args, **kwargs))

    def _encode(self, values: tuple[object, ...]) -> bytes:
        parts = [self._start]
        names = self._names if self._key is None else ("key=",)
        for name, value in zip((*names, "vary="), values, strict=False):
            try:
                parts.append(encode(value))
            except Unencodable as error:
                own = f"what {name} gives" if name.endswith("=") else f"the argument {name}"
                advice = "" if name.endswith("=") else f"leave it out with ignore=({name!r},), say what counts with key=, or "
                raise TypeError(
                    f"{self._name}: {own}{error.path} is of type {error}, which has no canonical encoding; "
                    f"{advice}give it a __cache_key__ method"
                ) from None
            except RecursionError:
                raise TypeError(f"{self._name}: the argument {name} is nested too deeply, or holds itself") from None
        return b"".join(parts)


def _compile_binding(
    function: Callable[..., object], signature: inspect.Signature, counted: tuple[str, ...], *, types: bool = False
) -> Callable[..., tuple[Any, ...]]:
    """Compile a function of the same signature that gives the counted arguments, with defaults applied, and their types."""
    type_of = "_type"
    while type_of in signature.parameters:
        type_of += "_"
    defaults: dict[str, object] = {type_of: type}
    parameters: list[str] = []
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    for position, (name, parameter) in enumerate(signature.parameters.items()):
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.VAR_POSITIONAL not in kinds and "*" not in parameters:
            parameters.append("*")
        star = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = ""
        if parameter.default is not parameter.empty:
            defaults[f"_default_{position}"] = parameter.default
            default = f"=_default_{position}"
        parameters.append(f"{star}{name}{default}")
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.POSITIONAL_ONLY not in kinds[position + 1 :]:
            parameters.append("/")
    items = [*counted, *(f"{type_of}({name})" for name in counted if types)]
    source = f"lambda {', '.join(parameters)}: ({''.join(f'{item}, ' for item in items)})"
    # Python's own binding, which is the fastest and right by definition; the names are those of a real signature.
    binding: Callable[..., tuple[Any, ...]] = eval(source, defaults)  # noqa: S307
    binding.__qualname__ = function.__qualname__
    return binding


def encode(value: object) -> bytes:
    """Encode a value canonically.

    Args:
        value: None, bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, Enum, date, time,
            datetime, timedelta, Decimal, UUID, Path, class, dataclass, named tuple, pydantic model, numpy array or scalar, an
            object with `__cache_key__()`, and what of these is nested in these.

    Returns:
        Bytes that differ for different values and types, and are the same in every process and on every machine.

    Raises:
        Unencodable: The value, or one inside it, is of another type.
        RecursionError: It holds itself.
    """
    encoder = _ENCODERS.get(type(value))
    return encoder(value) if encoder is not None else _encode_by_kind(value)


def _tagged(tag: bytes, content: bytes) -> bytes:
    return b"%b%d:%b" % (tag, len(content), content)


def _counted(tag: bytes, parts: list[bytes]) -> bytes:
    return b"%b%d:%b" % (tag, len(parts), b"".join(parts))


def _encode_float(value: float) -> bytes:
    return b"f" + (_CANONICAL_NAN if value != value else _FLOAT.pack(value))  # noqa: PLR0124 (NaN alone differs from itself)


def _encode_items(tag: bytes, values: Iterable[object]) -> bytes:
    return _counted(tag, [_inside(value, f"[{index}]") for index, value in enumerate(values)])


def _encode_set(tag: bytes, values: Iterable[object]) -> bytes:
    return _counted(tag, sorted(_inside(value, "{...}") for value in values))


def _encode_dict(values: Mapping[Any, object]) -> bytes:
    # By encoded key: equal dictionaries share an encoding, whatever order they were filled in.
    pairs = sorted((_inside(key, ".keys()"), _inside(value, ".values()")) for key, value in values.items())
    return _counted(b"d", [part for pair in pairs for part in pair])


def _encode_datetime(value: dt.datetime) -> bytes:
    zone = value.tzinfo
    name = ""
    if isinstance(zone, zoneinfo.ZoneInfo) and zone.key is not None:
        # A named zone says more than its offset of the day, which stands in the ISO form.
        name = zone.key
    elif zone is not None and not _is_fixed(zone):
        raise Unencodable(zone, ".tzinfo")
    return _tagged(b"D", f"{value.isoformat()}|{value.fold}|{name}".encode())


def _is_fixed(zone: dt.tzinfo) -> bool:
    """Say whether a time zone is one offset, whatever the day."""
    try:
        return not isinstance(zone, zoneinfo.ZoneInfo) and zone.utcoffset(None) is not None
    except Exception:  # noqa: BLE001 (a class of the program's own)
        return False


def _encode_time(value: dt.time) -> bytes:
    if value.tzinfo is not None:
        raise Unencodable(value.tzinfo, ".tzinfo")
    return _tagged(b"h", f"{value.isoformat()}|{value.fold}".encode())


def _inside(value: object, place: str) -> bytes:
    try:
        return encode(value)
    except Unencodable as error:
        error.path = place + error.path
        raise


def _encode_class(kind: type) -> bytes:
    # Module and name apart: the dots of one must not pass for those of the other.
    return encode(kind.__module__) + encode(kind.__qualname__)


def _encode_object(tag: bytes, value: object, content: bytes) -> bytes:
    kind = type(value)
    if "<locals>" in kind.__qualname__:
        # Each call of the function around it makes another class of the same name.
        raise Unencodable(value)
    return _tagged(tag, _encode_class(kind) + content)


def _encode_fields(tag: bytes, value: object, fields: Iterable[tuple[str, object]]) -> bytes:
    parts = [part for name, field in fields for part in (encode(name), _inside(field, f".{name}"))]
    return _encode_object(tag, value, b"".join(parts))


def _encode_by_kind(value: Any) -> bytes:  # noqa: C901, PLR0911 (one for each kind)
    kind: Any = type(value)
    own_key = getattr(kind, "__cache_key__", None)
    if own_key is not None and not isinstance(value, type):
        return _encode_object(b"k", value, _inside(own_key(value), ".__cache_key__()"))
    if isinstance(value, type) and "<locals>" not in value.__qualname__:
        return _tagged(b"y", _encode_class(value))
    if isinstance(value, enum.Enum):
        return _encode_object(b"e", value, _inside(value.value if value.name is None else value.name, ".value"))
    if kind in _PATHS:
        flavour = b"P" if isinstance(value, pathlib.PurePosixPath) else b"W"
        return _tagged(flavour, str(value).encode("utf-8", "surrogatepass"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type | dict | list | tuple | set | frozenset | str | bytes):
        fields = [(field.name, getattr(value, field.name, _UNSET)) for field in dataclasses.fields(value)]
        return _encode_fields(b"o", value, fields)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return _encode_fields(b"n", value, zip(kind._fields, value, strict=True))
    if hasattr(kind, "__pydantic_fields__"):
        model: Any = value
        fields = [(name, getattr(model, name, _UNSET)) for name in kind.__pydantic_fields__]
        # What a model holds beside its fields counts when two are compared.
        extra, private = getattr(model, "__pydantic_extra__", None), getattr(model, "__pydantic_private__", None)
        return _encode_fields(b"m", value, [*fields, (".extra", extra or {}), (".private", private or {})])
    if (numpy := sys.modules.get("numpy")) is not None:
        array: Any = value
        if kind is numpy.ndarray and not array.dtype.hasobject:
            return _encode_array(b"A", array, numpy)
        if isinstance(value, numpy.generic) and not array.dtype.hasobject:
            return _encode_array(b"a", numpy.asarray(array), numpy)
    raise Unencodable(value)


def _encode_array(tag: bytes, array: Any, numpy: Any) -> bytes:
    shape = encode(tuple(map(int, array.shape)))
    if array.dtype.names is not None:
        # Field by field: the room between them holds whatever was there.
        fields = [part for name in array.dtype.names for part in (encode(name), _encode_array(b"A", array[name], numpy))]
        return _tagged(tag, shape + _counted(b"r", fields))
    # The machine's byte order does not count, the elements do.
    array = numpy.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    content = hashlib.blake2b(array.view(numpy.uint8) if array.size else b"", digest_size=32).digest()
    return _tagged(tag, shape + encode(array.dtype.str) + content)


_UNSET = object()
_PATHS = frozenset({pathlib.PurePosixPath, pathlib.PosixPath, pathlib.PureWindowsPath, pathlib.WindowsPath})

_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda value: b"T" if value else b"F",
    int: lambda value: _tagged(b"i", b"%x" % value),
    float: _encode_float,
    complex: lambda value: b"c" + _encode_float(value.real) + _encode_float(value.imag),
    # A lone surrogate is no UTF-8, but it is an argument like any other.
    str: lambda value: _tagged(b"s", value.encode("utf-8", "surrogatepass")),
    bytes: lambda value: _tagged(b"b", value),
    bytearray: lambda value: _tagged(b"B", bytes(value)),
    list: lambda value: _encode_items(b"l", value),
    tuple: lambda value: _encode_items(b"t", value),
    set: lambda value: _encode_set(b"S", value),
    frozenset: lambda value: _encode_set(b"Z", value),
    dict: _encode_dict,
    dt.datetime: _encode_datetime,
    dt.date: lambda value: _tagged(b"E", value.isoformat().encode()),
    dt.time: _encode_time,
    dt.timedelta: lambda value: _tagged(b"r", f"{value.days} {value.seconds} {value.microseconds}".encode()),
    # Not str(), which the caller's decimal context has a say in.
    decimal.Decimal: lambda value: _tagged(b"x", "{0.sign} {0.digits} {0.exponent}".format(value.as_tuple()).encode()),
    uuid.UUID: lambda value: _tagged(b"u", value.bytes),
}
