"""From a call of the cached function to a call of another: the counted values, `key=`, `vary=` and `store=`.

Each is compiled to a function of the same signature: Python binds arguments itself, which is fastest and always right.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

_POSITIONAL: Final = frozenset({inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD})
_STARS: Final[dict[Any, str]] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_TARGET: Final = "_target"


def compile_values(
    function: Callable[..., object], signature: inspect.Signature, counted: Iterable[str], *, types: bool = False
) -> Callable[..., tuple[Any, ...]]:
    """Compile what gives the counted arguments of a call.

    Args:
        function: The cached function.
        signature: Its signature.
        counted: The names of the parameters that count.
        types: Whether their types follow.

    Returns:
        A function of the same signature that returns them as a tuple, with defaults applied.
    """
    counted = list(counted)
    type_of = _free_name("_type", signature)
    items = [*counted, *(f"{type_of}({name})" for name in counted if types)]
    return _compile(function, signature, f"({''.join(f'{item}, ' for item in items)})", {type_of: type})


def compile_call(
    option: str, target: Callable[..., Any], function: Callable[..., object], signature: inspect.Signature
) -> Callable[..., Any]:
    """Compile a call of a function of the program's with all arguments of a call, defaults applied.

    They go by position as far as it takes them, and by name after that.

    Args:
        option: The option that names it, such as `"key"`, for messages.
        target: The program's function.
        function: The cached function.
        signature: Its signature.

    Returns:
        A function of the same signature.

    Raises:
        TypeError: It is no plain function, or cannot take these arguments.
    """
    known = _parameters_of(option, target)
    takes = None if known is None else sum(parameter.kind in _POSITIONAL for parameter in known.values())
    if known is None or any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in known.values()):
        takes = None
    passed: list[str] = []
    for position, (name, parameter) in enumerate(signature.parameters.items()):
        star = _STARS.get(parameter.kind, "")
        by_name = parameter.kind is parameter.KEYWORD_ONLY or (
            parameter.kind is parameter.POSITIONAL_OR_KEYWORD and takes is not None and position >= takes
        )
        passed.append(f"{name}={name}" if by_name else f"{star}{name}")
    if known is not None and not _fits(known, passed):
        raise TypeError(
            f"{function.__qualname__}: {option}= is called with all arguments of the function, defaults applied, as "
            f"({', '.join(passed)}); what is given takes {_text(known)}; take these, or (*args, **kwargs)"
        )
    return _compile_passing(function, signature, passed, target)


def compile_choice(
    option: str, target: Callable[..., Any], function: Callable[..., object], signature: inspect.Signature
) -> Callable[..., Any]:
    """Compile a call of a function of the program's with those arguments of a call that its parameters name.

    Parameters with defaults are left to it. A single one of another name gets the first argument: of a method, the instance.

    Args:
        option: The option that names it, such as `"store"`, for messages.
        target: The program's function.
        function: The cached function.
        signature: Its signature.

    Returns:
        A function of the same signature.

    Raises:
        TypeError: It is no plain function, or takes what the function has not.
    """
    known = _parameters_of(option, target)
    parameters = signature.parameters
    # Such as operator.attrgetter("kv"), which may say nothing of what it takes.
    wanted = (
        [""]
        if known is None
        else [name for name, one in known.items() if one.default is one.empty and not _STARS.get(one.kind)]
    )
    if all(name in parameters and parameters[name].kind not in _STARS for name in wanted):
        by_name = {name for name in wanted if known is not None and known[name].kind is inspect.Parameter.KEYWORD_ONLY}
        return _compile_passing(function, signature, [f"{name}={name}" if name in by_name else name for name in wanted], target)
    first = next(iter(parameters.values()), None)
    takes_first = known is None or (len(wanted) == 1 and known[wanted[0]].kind in _POSITIONAL)
    if not takes_first or first is None or first.kind is inspect.Parameter.VAR_KEYWORD:
        raise TypeError(
            f"{function.__qualname__}: the function that {option}= names takes {_text(known or {})}; it may take nothing, one "
            f"parameter for the call's first argument, or parameters named as those of the function: {list(parameters)}"
        )
    is_star = first.kind is inspect.Parameter.VAR_POSITIONAL
    passed = f"{first.name}[0] if {first.name} else None" if is_star else first.name
    return _compile_passing(function, signature, [passed], target)


def _parameters_of(option: str, target: Any) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a function of the program's, or None where they cannot be known."""
    if not callable(target) or inspect.iscoroutinefunction(target):
        kind = "a coroutine function" if callable(target) else type(target).__name__
        raise TypeError(f"{option} must be a plain function, not {kind}")
    try:
        return inspect.signature(target).parameters
    except ValueError:
        return None


def _fits(known: Mapping[str, inspect.Parameter], passed: Iterable[str]) -> bool:
    kinds = {parameter.kind for parameter in known.values()}
    args: list[None] = []
    kwargs: dict[str, None] = {}
    for item in passed:
        if item.startswith("**"):
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                return False
        elif item.startswith("*"):
            # What follows the arguments by name would take their places.
            if inspect.Parameter.VAR_POSITIONAL not in kinds or kwargs:
                return False
        elif "=" in item:
            kwargs[item.partition("=")[0]] = None
        else:
            args.append(None)
    try:
        inspect.Signature(list(known.values())).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _text(parameters: Mapping[str, inspect.Parameter]) -> str:
    """Return the names of parameters without defaults, which may hold a secret."""
    return f"({', '.join(_STARS.get(parameter.kind, '') + name for name, parameter in parameters.items())})"


def _compile_passing(
    function: Callable[..., object], signature: inspect.Signature, passed: Iterable[str], target: Callable[..., Any]
) -> Callable[..., Any]:
    name = _free_name(_TARGET, signature)
    return _compile(function, signature, f"{name}({', '.join(passed)})", {name: target})


def _free_name(name: str, signature: inspect.Signature) -> str:
    while name in signature.parameters:
        name += "_"
    return name


def _compile(
    function: Callable[..., object], signature: inspect.Signature, expression: str, known: Mapping[str, object]
) -> Callable[..., Any]:
    """Compile a function of the same signature that returns what an expression of its parameters gives."""
    names = dict(known)
    parameters: list[str] = []
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    for position, (name, parameter) in enumerate(signature.parameters.items()):
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.VAR_POSITIONAL not in kinds and "*" not in parameters:
            parameters.append("*")
        default = ""
        if parameter.default is not parameter.empty:
            names[f"_default_{position}"] = parameter.default
            default = f"=_default_{position}"
        parameters.append(f"{_STARS.get(parameter.kind, '')}{name}{default}")
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.POSITIONAL_ONLY not in kinds[position + 1 :]:
            parameters.append("/")
    # The names come from a real signature, so eval is safe.
    compiled: Callable[..., Any] = eval(f"lambda {', '.join(parameters)}: {expression}", names)  # noqa: S307
    compiled.__qualname__ = function.__qualname__
    return compiled
