"""The type of one result, from the return annotation of a function that returns a mapping. Pure."""

import collections
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any


def value_type(returns: Any) -> Any:
    """Find the type of one result in the return annotation of a function that gives a mapping.

    Args:
        returns: The annotation, resolved: a mapping type, or a union of such and None.

    Returns:
        The type of the mapping's values; `Any` where the annotation does not say it.

    Raises:
        TypeError: It is no mapping, or a `TypedDict`, whose values differ.
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
    """Look through metadata, aliases and new names to the type that they stand for."""
    while True:
        origin = typing.get_origin(returns)
        alias = returns if origin is None else origin
        if origin is typing.Annotated:
            returns = typing.get_args(returns)[0]
        elif hasattr(alias, "__value__") and hasattr(alias, "__type_params__"):
            # Of a `type` statement.
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
    # A class of the program's: what it says of the mapping that it is.
    bases = kind.__dict__.get("__orig_bases__", kind.__bases__)
    parameters = dict.fromkeys(parameter for base in bases for parameter in getattr(base, "__parameters__", ()))
    for base in bases:
        origin = typing.get_origin(base) or base
        if isinstance(origin, type) and issubclass(origin, Mapping):
            said = _with_arguments(base, getattr(kind, "__parameters__", tuple(parameters)), arguments)
            return _value_of_class(origin, typing.get_args(said))
    return Any
