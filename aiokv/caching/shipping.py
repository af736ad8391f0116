"""How cached functions travel to other processes: by name where functions do, by value where functions do.

Picklers ask that question of functions only. So each cached function has a stand-in: a plain function that is found as an
attribute of the cached one. pickle takes the stand-in by name. cloudpickle takes it by name where the module can be imported,
and by value where it cannot or shall not be. By value, the stand-in carries the recipe that the cache is built from, once it is
needed: what the function refers to is complete by then. No lock, task or result travels.
"""

import contextlib
import copyreg
import dataclasses
import inspect
import os
import types
import typing
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from aiokv.caching.annotation import return_annotation
from aiokv.caching.cache import Cache
from aiokv.caching.callers import as_coroutine_function
from aiokv.caching.codecs import Codec
from aiokv.caching.computing import Compute
from aiokv.caching.keys import KeyMaker
from aiokv.caching.naming import find_named
from aiokv.caching.options import CacheOptions
from aiokv.caching.results import ResultCodec

STAND_IN: Final = "_stand_in"
"""The attribute of a cached function under which its stand-in is found."""


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Recipe:
    """What the cache of one function is built from.

    Args:
        function: The coroutine function, or a plain one.
        make_compute: Adapts it to what a cache computes with.
        part: Returns the type of one stored result for the return annotation.
        options: The program's options.
        codecs: What is done to the JSON of results.
        keys: The arguments of `KeyMaker` beside the function.
        returns: The type to decode to; None takes the annotation.
        batch_size: As for `Cache`.
        is_plain: Whether the function is a plain one.
        hints: Classes that came along with it, with their annotations where these were text.
        token: Tells this decoration apart from all others, wherever it travels.
    """

    function: Callable[..., Any]
    make_compute: Callable[[Callable[..., Awaitable[Any]]], Compute]
    part: Callable[[Any], Any]
    options: CacheOptions
    codecs: tuple[Codec, ...]
    keys: dict[str, Any]
    returns: Any = None
    batch_size: int | None = None
    is_plain: bool = False
    hints: tuple[tuple[type, dict[str, Any]], ...] = ()
    token: str = dataclasses.field(default_factory=lambda: os.urandom(16).hex())

    def cache(self) -> Cache:
        """Return the cache, which is built at the first call.

        Raises:
            TypeError: An option does not fit the function.
            ValueError: An option is not acceptable.
        """
        known: Cache | None = self.__dict__.get("_cache")
        return self._build() if known is None else known

    def _build(self) -> Cache:
        for kind, hints in self.hints:
            _set_hints(kind, hints)
        keys = KeyMaker(self.function, **self.keys)
        # Elsewhere there may be neither the module nor the source that these are made of.
        self.keys["prefix"] = keys.prefix
        if self.keys["version"] is None:
            self.keys["version"] = keys.version
        results = ResultCodec(self.function, self.returns, self.part)
        compute = self.make_compute(as_coroutine_function(self.function) if self.is_plain else self.function)
        cache = Cache(self.function, compute, keys, results, self.codecs, self.options, self.batch_size, is_plain=self.is_plain)
        # One for all threads that build it at the same time.
        return cast("Cache", self.__dict__.setdefault("_cache", cache))

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_cache"}
        # Elsewhere the names in annotations may mean nothing. Where they mean nothing here, the first call says so.
        with contextlib.suppress(Exception):
            returns = self.returns
            if returns is None:
                annotated = return_annotation(self.function)
                returns = self.part(annotated)
                if annotated is not getattr(inspect.unwrap(self.function), "__annotations__", {}).get("return"):
                    state["returns"] = returns
            known = dict(self.hints)
            _collect_hints(returns, known)
            state["hints"] = tuple((kind, hints) for kind, hints in known.items() if hints)
        return state


def make_stand_in(recipe: Recipe, attributes: dict[str, Any]) -> types.FunctionType:
    """Make what picklers decide about.

    Args:
        recipe: How to build the cache.
        attributes: The dictionary of the cached function, which travels with the stand-in.
    """

    def stand_in(*, recipe: Recipe) -> Recipe:
        return recipe

    made = cast("types.FunctionType", stand_in)
    made.__kwdefaults__ = {"recipe": recipe}
    made.__annotations__ = {}
    made.__module__ = recipe.function.__module__
    made.__qualname__ = f"{recipe.function.__qualname__}.{STAND_IN}"
    # The same one: whoever restores the stand-in restores both.
    made.__dict__ = attributes
    return made


def recipe_of(stand_in: types.FunctionType) -> Recipe:
    """Return the recipe that a stand-in carries."""
    return cast("Recipe", (stand_in.__kwdefaults__ or {})["recipe"])


def _holds_text(annotation: Any) -> bool:
    if isinstance(annotation, str | typing.ForwardRef):
        return True
    return any(map(_holds_text, annotation if isinstance(annotation, list | tuple) else typing.get_args(annotation)))


def _collect_hints(returns: Any, known: dict[type, dict[str, Any]]) -> None:
    """Note the annotations of dataclasses, named tuples and typed dictionaries in a type, where these are text."""
    for argument in returns if isinstance(returns, list | tuple) else typing.get_args(returns):
        _collect_hints(argument, known)
    kind = returns if isinstance(returns, type) else typing.get_origin(returns)
    if not isinstance(kind, type) or kind in known or kind.__module__ == "builtins":
        return
    known[kind] = {}
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_field_defaults") or hasattr(kind, "__total__"):
        hints = typing.get_type_hints(kind, include_extras=True)
        written = inspect.get_annotations(kind)
        known[kind] = {name: hints[name] for name, hint in written.items() if _holds_text(hint)}
        _collect_hints([*hints.values(), *kind.__bases__], known)


def _set_hints(kind: Any, hints: dict[str, Any]) -> None:
    """Give the copy of a class that was shipped by value the annotations that its text stood for."""
    if find_named(kind) is kind:
        return
    kind.__annotations__ = {**inspect.get_annotations(kind), **hints}
    for name, field in getattr(kind, "__dataclass_fields__", {}).items():
        field.type = hints.get(name, field.type)


# As a name, which it lacks: or dataclasses that are shipped by value have defaults where they have none.
copyreg.pickle(type(dataclasses.MISSING), lambda _: "MISSING")
