"""The return annotation of a function, resolved: names in text, type parameters and `Self`. Pure."""

import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable
from typing import Any, Literal


def return_annotation(function: Callable[..., object]) -> Any:
    """Resolve a function's return annotation alone: others may name what only type checkers import.

    Args:
        function: The function, perhaps wrapped.

    Returns:
        The annotated type, `Any` where there is none or any type; for `Self`, the class that the function is a method of.

    Raises:
        NameError: The annotation names what is not defined, or `Self`, and the class is not found.
    """
    function = inspect.unwrap(function)

    def stub() -> None: ...

    stub.__annotations__ = {"return": getattr(function, "__annotations__", {}).get("return", Any)}
    names: dict[str, Any] = getattr(function, "__globals__", {})
    known = {parameter.__name__: parameter for parameter in getattr(function, "__type_params__", ())}
    returns: Any = None
    while returns is None:
        try:
            returns = typing.get_type_hints(stub, globalns=names, localns=known, include_extras=True)["return"]
        except NameError as error:
            # What the class knows, a method's annotation may name: type parameters and nested classes.
            owner = _owner_of(function)
            parameters = {parameter.__name__: parameter for parameter in getattr(owner, "__type_params__", ())}
            found = {**vars(owner), **parameters}.get(error.name) if owner is not None else None
            if found is None or error.name in known:
                raise
            known[error.name] = found
    if isinstance(returns, typing.TypeVar) and returns.__bound__ is None and not returns.__constraints__:
        return Any
    return _without_self(returns, function)


def _owner_of(function: Any) -> type | None:
    """Return the class that a function is a method of, or None where its name does not lead to it."""
    found: Any = types.SimpleNamespace(**getattr(function, "__globals__", {}))
    for part in getattr(function, "__qualname__", "").split(".")[:-1]:
        found = getattr(found, part, None)
    # Or it is a class of that name from before the module, or the cell of a notebook, was run again.
    members = vars(found).values() if isinstance(found, type) else ()
    return found if any(inspect.unwrap(getattr(member, "__func__", member)) is function for member in members) else None


def _without_self(returns: Any, function: Any) -> Any:
    """Replace `Self` in a type by the class that it stands for."""
    if returns is typing.Self:
        owner = _owner_of(function)
        if owner is None:
            raise NameError(f"Self is the class of {function.__qualname__}, and its name does not lead to one")
        return owner
    return rebuild(returns, lambda argument: _without_self(argument, function))


def without_alias(returns: Any) -> Any:
    """Return what a `type` statement's alias stands for, its arguments in their places; other types as they are.

    Args:
        returns: Any type.

    Returns:
        A type that is no alias.
    """
    while True:
        alias = typing.get_origin(returns) or returns
        if isinstance(alias, type) or not (hasattr(alias, "__value__") and hasattr(alias, "__type_params__")):
            return returns
        value = alias.__value__
        given = dict(zip(alias.__type_params__, typing.get_args(returns), strict=False))
        places = tuple(given.get(place, place) for place in getattr(value, "__parameters__", ()))
        returns = value[places] if given and places else value


def rebuild(returns: Any, replace: Callable[[Any], Any]) -> Any:
    """Replace the arguments of a type.

    Args:
        returns: Any type.
        replace: Returns what stands in the place of an argument.

    Returns:
        The same type with other arguments; the object itself where none is replaced.
    """
    arguments = typing.get_args(returns)
    if typing.get_origin(returns) is Literal:
        return returns
    if typing.get_origin(returns) is typing.Annotated:
        # The rest of the arguments are metadata, not types.
        new = replace(arguments[0])
        return returns if new is arguments[0] else typing.Annotated[new, *returns.__metadata__]
    replaced = tuple(map(replace, arguments))
    if all(new is old for new, old in zip(replaced, arguments, strict=True)):
        return returns
    if isinstance(returns, types.UnionType):
        return functools.reduce(operator.or_, replaced)
    return returns.copy_with(replaced) if hasattr(returns, "copy_with") else typing.get_origin(returns)[replaced]
