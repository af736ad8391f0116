"""From a call to its key: the bound arguments are encoded so that no two different calls share a key."""

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aiokv.caching.arguments import compile_call, compile_values
from aiokv.caching.encoding import encode, is_settled, slot_names
from aiokv.caching.fingerprint import fingerprint
from aiokv.caching.naming import Unencodable, canonical_module
from aiokv.limits import check_entry

DIGEST_BYTES = 16
MAX_PREFIX_CHARS = 512

# The number grows when the same call gets another digest than before.
_FORMAT = b"2"
# Where such arguments are equal and of one type, the calls are the same, so a key can be looked up without encoding. Not so
# for floats: 0.0 equals -0.0, and NaN does not equal itself.
_PLAIN_TYPES = frozenset({str, int, bool, bytes, type(None)})
# Two generations of remembered calls: when the younger is full, the older is forgotten.
_MAX_REMEMBERED_CALLS = 1_024
_MAX_REMEMBERED_BYTES = 512


class KeyMaker:
    """The keys of one function's calls.

    Args:
        function: The coroutine function.
        prefix: The readable beginning of its keys; None takes its module and qualified name. Two functions share results
            where both prefix and version are the same.
        version: A part of the keys. None takes the fingerprint of the function's own source: a changed body gets new keys, a
            changed comment, layout, docstring, decorator above or annotation does not. The fingerprint ignores functions that
            the body calls, and globals that it reads: where they change, pass a version.
        ignore: Parameters that do not count.
        key: Returns what identifies a call from all its arguments, defaults applied, in place of them.
        vary: Returns what a call depends on beside its arguments, from these.

    Raises:
        TypeError: `ignore` names a parameter that the function does not have, `key` or `vary` cannot take the arguments,
            `version` is of another type, or the function is a method that is bound to an instance and has no `key`.
        ValueError: The function is local and has no `key`, or the prefix is too long.
    """

    def __init__(  # noqa: PLR0913 (what makes up a key)
        self,
        function: Callable[..., object],
        *,
        prefix: str | None = None,
        version: int | str | None = None,
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
        if key is None:
            _check_unbound(function, self._name, counts_class=version is None)
        if version is None:
            version = fingerprint(function)
        elif isinstance(version, bool) or not isinstance(version, int | str):
            raise TypeError(f"version must be int, str or None, not {type(version).__name__}")
        self.prefix = f"{canonical_module(function.__module__)}.{self._name}" if prefix is None else str(prefix)
        self.version = str(version)
        # A plain int or str, also where it is of a subclass.
        version = self.version if isinstance(version, str) else int(version)
        if not self.prefix or len(self.prefix) > MAX_PREFIX_CHARS:
            raise ValueError(f"prefix must be 1 to {MAX_PREFIX_CHARS} characters, not {len(self.prefix)}")
        self._start = f"{self.prefix}:{version}:"
        # The rest of a key is a fixed number of digits.
        try:
            check_entry("", self._start)
        except ValueError as error:
            raise ValueError(f"prefix and version cannot stand in a key: {error}") from None
        self._signature = inspect.signature(function)
        parameters = self._signature.parameters
        ignored = {ignore} if isinstance(ignore, str) else set(ignore)
        if unknown := ignored - set(parameters):
            raise TypeError(
                f"ignore names {sorted(unknown)}, which {self._name} has not; its parameters are {list(parameters)}"
            )
        self._names = tuple(name for name in parameters if name not in ignored)
        # Each call makes the dictionary of `**` parameters anew, so only its items can change.
        self._keywords = [
            index for index, name in enumerate(self._names) if parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        ]
        self.values = compile_values(function, self._signature, self._names)
        self._has_more = key is not None or vary is not None
        self._key = None if key is None else compile_call("key", key, function, self._signature)
        self._vary = None if vary is None else compile_call("vary", vary, function, self._signature)
        self.leaves_out = bool(ignored) or (key is not None and bool(parameters))
        self._head = b"".join(map(encode, (_FORMAT, self.prefix, version, self._names if key is None else ())))
        self._young: dict[tuple[object, ...], str] = {}
        self._old: dict[tuple[object, ...], str] = {}
        # How many positional arguments of a call are all that counts; and of a call of a bound form, whose first one does not.
        self.direct_counts: tuple[int | None, int | None] = self._count_direct(parameters)
        # Returns the counted arguments, then their types. Where all types are plain, equal tuples mean the same call.
        self.quick = compile_values(function, self._signature, self._names, types=True)

    def _count_direct(self, parameters: Mapping[str, inspect.Parameter]) -> tuple[int | None, int | None]:
        positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
        names, count = tuple(parameters), len(self._names)
        if self._has_more or not count or any(parameter.kind not in positional for parameter in parameters.values()):
            return None, None
        return (count if self._names == names else None), (count if self._names == names[1:] else None)

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
        if self._has_more:
            return self._make_digest(self._values_with_more(args, kwargs))
        # Each value with its type: 1 and True, which are equal, are two calls.
        call = self.quick(*args, **kwargs)
        values = call[: len(call) // 2]
        return self._plain_key(call, values) if _PLAIN_TYPES.issuperset(call[len(values) :]) else self._make_digest(values)

    def make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, bool]:
        """Return the key of a call, and whether that key is final.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.

        Returns:
            The key as `__call__` returns it; and True where it is made of arguments that can never change, so that making it
            again is needless.

        Raises:
            TypeError: See `__call__`.
        """
        if self._has_more:
            return self._make_digest(self._values_with_more(args, kwargs)), False
        call = self.quick(*args, **kwargs)
        try:
            # Only calls of plain arguments are remembered, with their types.
            key = self._young.get(call)
        except TypeError:
            key = None
        if key is not None:
            return key, True
        values = call[: len(call) // 2]
        if _PLAIN_TYPES.issuperset(call[len(values) :]):
            return self._plain_key(call, values), True
        return self._make_digest(values), all(
            all(map(is_settled, value.values())) if index in self._keywords else is_settled(value)
            for index, value in enumerate(values)
        )

    def plain_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[object, ...] | None:
        """Return what identifies a call of plain arguments in this process, for a look-up that makes no key.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.

        Returns:
            What `quick` returns for this call, or None where equality of that does not mean the same call.
        """
        if self._has_more:
            return None
        call = self.quick(*args, **kwargs)
        return call if _PLAIN_TYPES.issuperset(call[len(call) // 2 :]) else None

    def copies(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Copy a call, so that what its caller changes afterwards does not reach the copy.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.

        Returns:
            The arguments, of which those that count and can change are deep copies. Ignored arguments, objects with
            `__cache_key__` and, with `key=`, what has no canonical encoding stay as they are. None where there is no copy, or
            the copy has another key.

        Raises:
            TypeError: See `__call__`.
        """
        key = self(args, kwargs)
        bound = self._signature.bind(*args, **kwargs)
        memo: dict[int, Any] = {}
        try:
            for name in self._names:
                if name in bound.arguments and (self._key is None or _is_encodable(bound.arguments[name])):
                    bound.arguments[name] = _copy(bound.arguments[name], memo)
            copied = bound.args, bound.kwargs
            return copied if self(*copied) == key else None
        except Exception:  # noqa: BLE001 (copying runs code of the arguments' classes)
            return None

    def _plain_key(self, call: tuple[object, ...], values: tuple[object, ...]) -> str:
        """Return the key of a call of plain arguments, from memory where it was made lately."""
        key = self._young.get(call)
        if key is not None:
            return key
        key = self._old.get(call)
        if key is None:
            encoded = self._encode(values)
            key = self._start + hashlib.blake2b(encoded, digest_size=DIGEST_BYTES).hexdigest()
            if len(encoded) > _MAX_REMEMBERED_BYTES:
                return key
        if len(self._young) >= _MAX_REMEMBERED_CALLS:
            self._old, self._young = self._young, {}
        self._young[call] = key
        return key

    def _values_with_more(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        values = self.values(*args, **kwargs)
        if self._key is not None:
            values = (self._key(*args, **kwargs),)
        return values if self._vary is None else (*values, self._vary(*args, **kwargs))

    def _make_digest(self, values: tuple[object, ...]) -> str:
        return self._start + hashlib.blake2b(self._encode(values), digest_size=DIGEST_BYTES).hexdigest()

    def _encode(self, values: tuple[object, ...]) -> bytes:
        parts = [self._head]
        try:
            for value in values:
                parts.append(encode(value))  # noqa: PERF401 (the count so far says which argument an error is about)
        except (Unencodable, RecursionError) as error:
            raise self._refusal(len(parts) - 1, error) from None
        return b"".join(parts)

    def _refusal(self, index: int, error: Unencodable | RecursionError) -> TypeError:
        name = (*(self._names if self._key is None else ("key=",)), "vary=")[index]
        place = f"what {name} returns" if name.endswith("=") else f"the argument {name}"
        if isinstance(error, RecursionError):
            return TypeError(f"{self._name}: {place} is nested too deeply, or holds itself")
        advice = "" if name.endswith("=") else f"leave it out with ignore=({name!r},), say what counts with key=, or "
        return TypeError(f"{self._name}: {place}{error.path} is of type {error}; {advice}give it a __cache_key__ method")


def _check_unbound(function: Any, name: str, *, counts_class: bool) -> None:
    """Refuse a method of an object: neither its arguments nor its code say what the object holds."""
    bound: tuple[Any, ...] = getattr(function, "_bound", None) or ((function.__self__,) if inspect.ismethod(function) else ())
    if not bound or (counts_class and inspect.ismethod(function) and isinstance(bound[0], type) and _is_encodable(bound[0])):
        return
    of_class = isinstance(bound[0], type)
    owner = f"the class {bound[0].__qualname__}, which" if of_class else f"a {type(bound[0]).__qualname__}: what that holds"
    raise TypeError(
        f"{name} is bound to {owner} would not count; decorate the method in its class, "
        "cache a def or async def that calls it, or pass key= and count in what differs"
    )


def _is_encodable(value: object) -> bool:
    try:
        encode(value)
    except (Unencodable, RecursionError):
        return False
    return True


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    if is_settled(value):
        return value
    _keep_own_keys(value, memo, set())
    return copy.deepcopy(value, memo)


def _keep_own_keys(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Enter the objects with `__cache_key__` inside a value in the memo of `deepcopy`, so that it does not copy them."""
    if id(value) in seen or is_settled(value):
        return
    seen.add(id(value))
    kind = type(value)
    if hasattr(kind, "__cache_key__"):
        memo[id(value)] = value
        return
    inner: list[object] = []
    if isinstance(value, dict):
        inner += [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inner += value
    inner += getattr(value, "__dict__", {}).values()
    inner += [getattr(value, name, None) for name in slot_names(kind)]
    for each in inner:
        _keep_own_keys(each, memo, seen)
