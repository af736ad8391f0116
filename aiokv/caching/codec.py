"""From a result to text and back: what a hit returns equals what the miss returned, or it is not stored. Pure."""

import base64
import contextlib
import dataclasses
import hashlib
import inspect
import math
import os
import re
import types
import typing
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from datetime import datetime, time
from typing import Any, Literal, Protocol, cast

import orjson

from aiokv.errors import ConfigurationError

MAX_DECOMPRESSED_BYTES = 256 * 1024 * 1024

_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1
_SCHEMA_BYTES = 4
_NONCE_BYTES = 12
_MAX_PATH_CHARS = 200
_KEY_BYTES = 32
_ATOMS = frozenset({str, int, float, bool, type(None), bytes})


class Codec(Protocol):
    """A step between a result's JSON and what is stored; steps are applied in order, and undone in reverse."""

    name: str
    """Stored with each entry, without `+`; another name is another format."""
    required: bool
    """Whether an entry that has not been through this step is refused."""

    def encode(self, data: bytes, key: str) -> bytes | None:
        """Apply the step.

        Args:
            data: What the step before gave.
            key: The entry's key, to bind the data to.

        Returns:
            The changed data, or None to pass them on as they are.
        """
        ...

    def decode(self, data: bytes, key: str) -> bytes:
        """Undo the step.

        Args:
            data: What `encode` gave.
            key: The entry's key.

        Returns:
            What `encode` was given.

        Raises:
            ValueError: The data are not what `encode` gave for this key.
        """
        ...


JSON: tuple[Codec, ...] = ()
"""No step: the result's JSON is stored as it is."""


class Zstd:
    """Compress with Zstandard (needs `aiokv[zstd]`), so that a result well past the limit as JSON may still fit.

    Args:
        min_bytes: Shorter results are stored as they are.
        level: 1 (fast) to 22 (small).

    Raises:
        ConfigurationError: The package zstandard is not installed.
    """

    name = "zstd"
    required = False

    def __init__(self, *, min_bytes: int = 1024, level: int = 3) -> None:
        try:
            import zstandard  # noqa: PLC0415 (an extra)
        except ImportError as error:
            raise ConfigurationError("Zstd needs the package zstandard: pip install 'aiokv[zstd]'") from error
        self._zstandard = zstandard
        self._min_bytes = min_bytes
        self._level = level

    def encode(self, data: bytes, key: str) -> bytes | None:  # noqa: ARG002 (compression binds to nothing)
        """Compress; see `Codec.encode`."""
        if len(data) < self._min_bytes:
            return None
        # With a checksum: or a bit that has changed in the store would pass for another result.
        return self._zstandard.ZstdCompressor(level=self._level, write_checksum=True).compress(data)

    def decode(self, data: bytes, key: str) -> bytes:  # noqa: ARG002 (likewise)
        """Decompress, up to 256 MiB; see `Codec.decode`."""
        try:
            size_bytes = self._zstandard.frame_content_size(data)
            if not 0 <= size_bytes <= MAX_DECOMPRESSED_BYTES:
                raise ValueError("the compressed result says no size, or one past any use")
            return self._zstandard.ZstdDecompressor().decompress(data, max_output_size=size_bytes, allow_extra_data=False)
        except self._zstandard.ZstdError as error:
            raise ValueError("the result is not Zstandard data") from error


class Encrypted:
    """Encrypt and authenticate with AES-256-GCM (needs `aiokv[crypto]`); an entry is bound to its key.

    Args:
        key: 32 bytes, or a list of such for rotation: the first encrypts, each decrypts. `Encrypted.new_key()` makes one.

    Raises:
        ConfigurationError: The package cryptography is not installed, or a key is not 32 bytes.
    """

    name = "aesgcm"
    required = True

    def __init__(self, key: bytes | Sequence[bytes]) -> None:
        try:
            from cryptography.exceptions import InvalidTag  # noqa: PLC0415 (an extra)
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 (likewise)
        except ImportError as error:
            raise ConfigurationError("Encrypted needs the package cryptography: pip install 'aiokv[crypto]'") from error
        keys = [key] if isinstance(key, bytes) else list(key)
        if not keys or any(not isinstance(one, bytes) or len(one) != _KEY_BYTES for one in keys):
            raise ConfigurationError(
                f"Encrypted takes a key of {_KEY_BYTES} bytes or a list of such; Encrypted.new_key() makes one"
            )
        self._invalid_tag = InvalidTag
        self._ciphers = [AESGCM(one) for one in keys]

    @staticmethod
    def new_key() -> bytes:
        """Make a key.

        Returns:
            32 random bytes, to be kept where secrets are kept.
        """
        return os.urandom(_KEY_BYTES)

    def __repr__(self) -> str:
        return f"Encrypted(<{len(self._ciphers)} keys>)"

    def encode(self, data: bytes, key: str) -> bytes | None:
        """Encrypt; see `Codec.encode`."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._ciphers[0].encrypt(nonce, data, key.encode())

    def decode(self, data: bytes, key: str) -> bytes:
        """Decrypt with whichever key fits; see `Codec.decode`."""
        nonce, sealed = data[:_NONCE_BYTES], data[_NONCE_BYTES:]
        for cipher in self._ciphers:
            try:
                return cipher.decrypt(nonce, sealed, key.encode())
            except (self._invalid_tag, ValueError):
                continue
        raise ValueError("the result was not encrypted with any of the keys, or not for this entry")


class ResultCodec:
    """Turn one function's results into text and back.

    Args:
        function: The function, for its name and its return annotation.
        returns: The type to decode to, where the annotation does not say it; None takes the annotation.
        steps: What is done to the JSON.
        part: Gives the type of a stored result from the annotation, where a part of what is returned is stored.
    """

    def __init__(
        self,
        function: Callable[..., object],
        returns: Any,
        steps: Codec | Sequence[Codec] | None,
        part: Callable[[Any], Any] = lambda returns: returns,
    ) -> None:
        self._function = function
        self._name = function.__qualname__
        self._returns = returns
        self._part = part
        self._steps: tuple[Codec, ...] = () if steps is None else _as_tuple(steps)
        names = [step.name for step in self._steps]
        if len(set(names)) < len(names) or any({"+", "@"} & set(name) or not name for name in names):
            raise ConfigurationError(f"codec steps must have different names without '+' and '@', not {names}")
        self._adapter: Any = None
        self._resolved = False
        self._schema = ""
        # Decodes without asking whether it is known yet how: for what this codec has made or read before.
        self.loads: Callable[[bytes | str], Any] = self.load
        # What an annotation refers to may be defined later in its module: then at the first call.
        with contextlib.suppress(NameError, AttributeError):
            self._resolve()

    def encode(self, result: object, key: str) -> tuple[str, str]:
        """Make a result's text.

        Args:
            result: What the function returned.
            key: The entry's key.

        Returns:
            The payload, and the names of the steps that were applied, with a mark of the type where one is annotated.

        Raises:
            TypeError: The result would come back changed; the message says how to mend that.
        """
        data = self.to_json(result)
        applied: list[str] = []
        for step in self._steps:
            changed = step.encode(data, key)
            if changed is not None:
                data = changed
                applied.append(step.name)
        payload = base64.b85encode(data).decode() if applied else data.decode()
        return payload, "+".join(applied) + self._schema

    def to_json(self, result: object) -> bytes:
        """Make a result's JSON.

        Args:
            result: What the function returned.

        Returns:
            The JSON.

        Raises:
            TypeError: The result would come back changed; the message says how to mend that.
        """
        self.resolve()
        return self._dump(result)

    def decode(self, payload: str, applied: str, key: str) -> Any:
        """Make a result from its text.

        Args:
            payload: What `encode` gave.
            applied: The steps that were applied.
            key: The entry's key.

        Returns:
            A result that nobody else holds.

        Raises:
            ValueError: The text is not of this function's results, as these are today.
        """
        self.resolve()
        return self._load(self.undo(payload, applied, key))

    def undo(self, payload: str, applied: str, key: str) -> bytes | str:
        """Undo the steps, and give the result's JSON.

        Args:
            payload: What `encode` gave.
            applied: The steps that were applied.
            key: The entry's key.

        Returns:
            The JSON.

        Raises:
            ValueError: A step is not known here, a required one is missing, or the data do not fit.
        """
        self.resolve()
        if not self._steps and applied == self._schema:
            return payload
        # What a function returned before its annotation was changed is not what it returns.
        if not applied.endswith(self._schema) or "@" in (applied := applied.removesuffix(self._schema)):
            raise ValueError("the result is of another type than this function returns today")
        names = applied.split("+") if applied else []
        steps = {step.name: step for step in self._steps}
        expected = [step.name for step in self._steps if step.name in names]
        if names != expected or any(step.required and step.name not in names for step in self._steps):
            raise ValueError(f"the result went through {applied or 'no step'}, not through the steps that are expected here")
        if not names:
            return payload
        data = base64.b85decode(payload)
        for name in reversed(names):
            data = steps[name].decode(data, key)
        return data

    def load(self, text: bytes | str) -> Any:
        """Make a result from its JSON.

        Args:
            text: What `undo` gave.

        Returns:
            A result that nobody else holds.

        Raises:
            ValueError: The JSON is not of this function's results.
        """
        self.resolve()
        return self._load(text)

    def resolve(self) -> None:
        """Find out what the function returns, unless that is known; at the latest before it is run for the first time.

        Raises:
            TypeError: Its return annotation cannot be resolved or decoded to; the message says how to mend that.
        """
        if self._resolved:
            return
        try:
            self._resolve()
        except NameError as error:
            raise TypeError(
                f"{self._name}: the return annotation cannot be resolved ({error}); import what it names, or pass returns="
            ) from None

    def _resolve(self) -> None:
        returns = self._part(_return_annotation(self._function)) if self._returns is None else self._returns
        adapter = None if _is_json_native_type(returns) else _type_adapter(returns, self._name)
        if returns is not Any:
            mark = hashlib.blake2b(_type_text(returns).encode(), digest_size=_SCHEMA_BYTES).hexdigest()
            self._schema = f"@{mark}"
        self._adapter = adapter
        self.loads = orjson.loads if adapter is None else adapter.validate_json
        self._resolved = True

    def _dump(self, result: object) -> bytes:
        if self._adapter is None:
            if (path := _not_native(result)) is not None:
                path = path if len(path) <= _MAX_PATH_CHARS else f"{path[:_MAX_PATH_CHARS]}..."
                raise TypeError(
                    f"{self._name}: its result{path}, which JSON would change; annotate the return type (needs "
                    "'aiokv[pydantic]'), pass returns=, or return str, int, float, bool, None, list and dict with str keys"
                )
            try:
                return orjson.dumps(result)
            except orjson.JSONEncodeError:
                raise TypeError(f"{self._name}: its result is nested too deeply for JSON; return something flatter") from None
        try:
            data = cast("bytes", self._adapter.dump_json(result, warnings="error"))
            back = self._adapter.validate_json(data)
        except (ValueError, TypeError, RecursionError) as error:
            # Not chained: pydantic's errors quote the value.
            reason = type(error).__name__
        else:
            if not (type(back) is type(result) and _same(back, result)):
                reason = "it comes back as another value"
            elif not _same_types(back, result):
                reason = "a part of it comes back as another type"
            else:
                return data
        raise TypeError(
            f"{self._name}: its result of type {type(result).__name__} does not survive the way through JSON as the annotated "
            f"type ({reason}); make the return annotation say exactly what is returned, or pass returns="
        )

    def _load(self, text: bytes | str) -> Any:
        if self._adapter is None:
            return orjson.loads(text)
        return self._adapter.validate_json(text)


def _as_tuple(steps: Codec | Sequence[Codec]) -> tuple[Codec, ...]:
    return tuple(steps) if isinstance(steps, Sequence) else (steps,)


def _same(back: Any, result: Any) -> bool:  # noqa: PLR0911 (one for each kind)
    """Say whether two values are equal, where NaN counts as itself; never by their texts, which may leave fields out."""
    try:
        if bool(back == result):
            return True
    except Exception:  # noqa: BLE001 (what cannot be compared is not known to be the same)
        return False
    if type(back) is not type(result):
        return False
    if isinstance(back, float):
        return math.isnan(back) and math.isnan(result)
    if isinstance(back, list | tuple):
        return len(back) == len(result) and all(map(_same, back, result))
    if isinstance(back, dict):
        return back.keys() == result.keys() and all(_same(back[key], result[key]) for key in back)
    if hasattr(type(back), "__pydantic_fields__"):
        parts = ("__dict__", "__pydantic_extra__", "__pydantic_private__")
        return all(_same(getattr(back, part, None), getattr(result, part, None)) for part in parts)
    if dataclasses.is_dataclass(back):
        return all(
            _same(getattr(back, field.name, None), getattr(result, field.name, None)) for field in dataclasses.fields(back)
        )
    return False


def _same_types(back: Any, result: Any) -> bool:  # noqa: PLR0911 (one for each kind)
    """Say whether the parts of two equal values are of the same types: True equals 1, and a str that is an enum its text."""
    kind = type(back)
    if kind is not type(result):
        # What is annotated as float may be an int, by the language's own rules.
        return kind is float and type(result) is int
    if kind in _ATOMS:
        return True
    if isinstance(back, datetime | time):
        # The second of two like hours would come back as the first; with a zone, its offset tells them apart.
        return back.tzinfo is not None or back.fold == result.fold
    if isinstance(back, list | tuple | deque):
        return getattr(back, "maxlen", None) == getattr(result, "maxlen", None) and all(map(_same_types, back, result))
    if isinstance(back, dict):
        if isinstance(back, defaultdict) and back.default_factory is not result.default_factory:
            return False
        keys = {key: key for key in result}
        return all(_same_types(key, keys.get(key)) and _same_types(item, result.get(key)) for key, item in back.items())
    if isinstance(back, set | frozenset):
        items = {item: item for item in result}
        return all(_same_types(item, items[item]) for item in back if item in items)
    if hasattr(kind, "__pydantic_fields__"):
        parts = ("__dict__", "__pydantic_extra__", "__pydantic_private__")
        return all(_same_types(getattr(back, part, None), getattr(result, part, None)) for part in parts)
    if dataclasses.is_dataclass(back):
        names = [field.name for field in dataclasses.fields(back) if field.compare]
        return all(_same_types(getattr(back, name, None), getattr(result, name, None)) for name in names)
    return True


def _return_annotation(function: Callable[..., object]) -> Any:
    """Resolve the return annotation alone: others may name what only type checkers import."""
    function = inspect.unwrap(function)

    def stub() -> None: ...

    stub.__annotations__ = {"return": getattr(function, "__annotations__", {}).get("return", Any)}
    names: dict[str, Any] = getattr(function, "__globals__", {})
    return typing.get_type_hints(stub, globalns=names, include_extras=True)["return"]


def _is_json_native_type(returns: Any) -> bool:
    """Say whether values of a type are their own JSON, as far as the type can say it."""
    # By identity: an annotation's metadata may not be hashable.
    if any(returns is native for native in (Any, None, type(None), str, int, float, bool, dict, list, object)):
        return True
    origin, arguments = typing.get_origin(returns), typing.get_args(returns)
    if origin is list:
        return all(map(_is_json_native_type, arguments))
    if origin is dict:
        return not arguments or (arguments[0] is str and _is_json_native_type(arguments[1]))
    if origin in {typing.Union, types.UnionType}:
        return all(map(_is_json_native_type, arguments))
    if origin is Literal:
        return all(type(argument) in {str, int, bool, type(None)} for argument in arguments)
    return False


def _type_adapter(returns: Any, name: str) -> Any:
    try:
        from pydantic import ConfigDict, PydanticUserError, TypeAdapter  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise TypeError(
            f"{name}: to decode results to {_type_name(returns)}, install pydantic: pip install 'aiokv[pydantic]'; "
            "or return str, int, float, bool, None, list and dict with str keys"
        ) from error
    config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="strings")
    try:
        try:
            adapter = TypeAdapter(returns, config=config)
        except PydanticUserError as error:
            if error.code != "type-adapter-config-unused":
                raise
            # A model, dataclass or TypedDict brings a configuration of its own.
            adapter = TypeAdapter(returns)
        if not adapter.pydantic_complete:
            # A NameError, where a field names a class that is not defined yet.
            adapter.rebuild(raise_errors=True)
    except PydanticUserError as error:
        if error.code == "class-not-fully-defined":
            raise NameError(f"a field of {_type_name(returns)} names what is not defined") from None
        hint = "take TypedDict from typing_extensions" if error.code == "typed-dict-version" else "pass returns="
        raise TypeError(f"{name}: results of type {_type_name(returns)} cannot be decoded; {hint}") from error
    return adapter


def _type_text(returns: Any) -> str:
    """Write a type so that another type reads differently, the same in every process."""
    # A class by its name; its own fields may change, which decoding finds out.
    text = f"{returns.__module__}.{returns.__qualname__}" if isinstance(returns, type) else str(returns)
    # What an annotation's metadata may hold, such as a function, has another address in each process.
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", text)


def _type_name(returns: Any) -> str:
    return str(getattr(returns, "__name__", returns))


def _not_native(value: object, path: str = "") -> str | None:  # noqa: C901, PLR0911 (one branch for each type of JSON)
    """Say where and what JSON would change of a value, or None where it would come back the same."""
    kind = type(value)
    if kind is str:
        text = cast("str", value)
        return None if text.isascii() or _is_utf8(text) else f"{path} holds a lone surrogate"
    if kind in {bool, type(None)}:
        return None
    if kind is int:
        return None if _MIN_INT <= cast("int", value) <= _MAX_INT else f"{path} is an int of more than 64 bits"
    if kind is float:
        return None if math.isfinite(cast("float", value)) else f"{path} is NaN or infinite"
    try:
        if kind is list:
            items = enumerate(cast("list[object]", value))
            return next((found for index, item in items if (found := _not_native(item, f"{path}[{index}]")) is not None), None)
        if kind is dict:
            for key, item in cast("dict[object, object]", value).items():
                if type(key) is not str or not _is_utf8(key):
                    return f"{path} has a key of type {type(key).__name__} that JSON cannot hold"
                if (found := _not_native(item, f"{path}[...]")) is not None:
                    return found
            return None
    except RecursionError:
        return f"{path} is nested too deeply, or holds itself"
    return f"{path} is of type {kind.__qualname__}"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
