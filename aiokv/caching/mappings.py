"""Functions from ids to a mapping: the type of one result, and what they may return."""

import collections
import types
import typing
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from aiokv.caching.flights import ABSENT, Call


def value_type(returns: Any) -> Any:
    """Return the type of one result, from the return annotation of a function that returns a mapping.

    Args:
        returns: The annotation, resolved: a mapping type, or a union of such and None.

    Returns:
        The type of the mapping's values; `Any` where the annotation does not say that.

    Raises:
        TypeError: The annotation is no mapping, or a `TypedDict`, whose values have several types.
    """
    returns = _without_names(returns)
    if returns is Any or returns is object:
        return Any
    origin, arguments = typing.get_origin(returns), typing.get_args(returns)
    if origin in {typing.Union, types.UnionType}:
        parts = [value_type(part) for part in arguments if part is not type(None)]
        return typing.Union[tuple(parts)]  # noqa: UP007 (of parts that are not known here)
    kind = returns if origin is None else origin
    if isinstance(kind, type) and issubclass(kind, dict) and hasattr(kind, "__total__"):
        raise TypeError(
            f"the function returns the TypedDict {kind.__qualname__}, whose values are of several types; "
            "annotate a mapping from ids to results, or pass returns= with the type of one result"
        )
    if not (isinstance(kind, type) and issubclass(kind, Mapping)):
        raise TypeError(
            f"the function returns {getattr(kind, '__qualname__', kind)}, not a mapping from ids to results; "
            "make it return one, such as dict[int, User], and annotate that"
        )
    return _value_of_class(kind, arguments)


def _without_names(returns: Any) -> Any:
    """Return the type that `Annotated`, an alias or a `NewType` stands for."""
    while True:
        origin = typing.get_origin(returns)
        alias = returns if origin is None else origin
        if origin is typing.Annotated:
            returns = typing.get_args(returns)[0]
        elif hasattr(alias, "__value__") and hasattr(alias, "__type_params__"):
            # An alias of a `type` statement.
            returns = _with_arguments(alias.__value__, alias.__type_params__, typing.get_args(returns))
        elif hasattr(returns, "__supertype__"):
            returns = returns.__supertype__
        else:
            return returns


def _with_arguments(generic: Any, parameters: Sequence[Any], arguments: Sequence[Any]) -> Any:
    known = dict(zip(parameters, arguments, strict=False))
    wanted = getattr(generic, "__parameters__", ())
    return generic[tuple(known.get(parameter, Any) for parameter in wanted)] if wanted else generic


def _value_of_class(kind: type, arguments: tuple[Any, ...]) -> Any:
    if kind is collections.Counter:
        return int
    if kind.__module__ in {"builtins", "collections", "collections.abc", "types"}:
        return arguments[1] if len(arguments) == 2 else Any  # noqa: PLR2004 (a mapping's key and value)
    # A class of the program: its bases say which mapping it is.
    bases = kind.__dict__.get("__orig_bases__", kind.__bases__)
    parameters = dict.fromkeys(parameter for base in bases for parameter in getattr(base, "__parameters__", ()))
    for base in bases:
        origin = typing.get_origin(base) or base
        if isinstance(origin, type) and issubclass(origin, Mapping):
            mapping = _with_arguments(base, getattr(kind, "__parameters__", tuple(parameters)), arguments)
            return _value_of_class(origin, typing.get_args(mapping))
    return Any


def compute_many(function: Callable[..., Awaitable[Any]]) -> Callable[[Sequence[Call]], Coroutine[Any, Any, Sequence[Any]]]:
    """Adapt a function from ids to a mapping to what a cache computes with.

    Args:
        function: The program's function.

    Returns:
        A function from calls to a result for each, or `ABSENT`.
    """
    name = function.__qualname__

    async def compute(calls: Sequence[Call]) -> Sequence[Any]:
        first = calls[0]
        position = first.id_position
        ids = [call.args[position] for call in calls]
        # A list of its own, which it may change.
        returned = await function(*first.args[:position], list(ids), *first.args[position + 1 :], **first.kwargs)
        if returned is not None and not isinstance(returned, Mapping):
            raise TypeError(f"{name} must return a mapping from ids to results, not {type(returned).__name__}")
        # A copy: it may be a view of what goes on changing.
        results = {} if returned is None else dict(returned)
        _check_types_of_ids(name, ids, results)
        return [results.get(id_, ABSENT) for id_ in ids]

    return compute


def _check_types_of_ids(name: str, ids: Sequence[object], results: Mapping[Any, object]) -> None:
    """Refuse results under ids of another type, such as "1" for 1: these ids would be computed at every call."""
    missing = [id_ for id_ in ids if id_ not in results]
    if not missing or len(missing) + len(results) == len(ids):
        return
    asked = set(ids)
    others = {_text(key): key for key in results if key not in asked}
    for id_ in missing:
        other = others.get(_text(id_))
        if other is not None and type(other) is not type(id_):
            raise TypeError(
                f"{name} was asked for an id of type {type(id_).__name__} and returned a result for one of type "
                f"{type(other).__name__} with the same text; return results under the ids that were asked for"
            )


def _text(id_: object) -> str:
    return id_.decode(errors="replace") if isinstance(id_, bytes) else str(id_)
