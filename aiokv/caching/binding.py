"""What the forms of a cached function have in common: they look like the function, and bind as functions do."""

import asyncio
import copy
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from aiokv.caching.events import CacheInfo
from aiokv.caching.naming import adopt_script_names, script_names
from aiokv.caching.shipping import Recipe, make_stand_in, recipe_of

# Type parameters cannot all be pickled; see the property.
_ASSIGNED = tuple(name for name in map(str, functools.WRAPPER_ASSIGNMENTS) if name != "__type_params__")


class _SignatureOf:
    """Give the signature of what is asked when it is asked: seldom, while methods are bound at each access."""

    def __get__(self, instance: "CachedCallable | None", owner: type | None = None) -> inspect.Signature:
        if instance is None:
            # The class has none of its own, and is asked, too.
            raise AttributeError("__signature__")
        return instance._signature()  # noqa: SLF001 (this module's own)


class CachedCallable:
    """A cached function, bound to nothing, or to an instance or a class."""

    # The function's own attributes are in the dictionary; what each call needs is found faster outside it.
    __slots__ = ("__dict__", "__weakref__", "_bound", "_cache", "_stand_in")

    decorator_name: ClassVar[str] = ""
    __signature__ = _SignatureOf()

    def __init__(self, recipe: Recipe) -> None:
        self._cache = recipe.cache()
        # It copies the function's own attributes, those of a cached function among them.
        functools.update_wrapper(cast("Callable[..., object]", self), recipe.function, _ASSIGNED)
        for name in [name for name in self.__dict__ if not name.startswith("__") and hasattr(type(self), name)]:
            # Or an attribute of the function would hide a method.
            del self.__dict__[name]
        self._bound: tuple[Any, ...] = ()
        self._stand_in = make_stand_in(recipe, self.__dict__)
        _unbound[self._stand_in] = self

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # What came by value is completed when it is used: what it refers to may come after it.
            if name not in {"_cache", "_near"}:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self._cache = recipe_of(self._stand_in).cache()
            if name == "_near":
                self._near = self._cache.near
            return getattr(self, name)

    # What asyncio.iscoroutinefunction asks for; inspect knows it by the properties below.
    @property
    def _is_coroutine(self) -> object:
        return getattr(asyncio.coroutines, "_is_coroutine", None)

    @property
    def __type_params__(self) -> Any:
        return cast("Any", self._cache.function).__type_params__

    def bound_to(self, instance: object) -> Self:
        """Bind to an instance or a class, as a function in a class does; what is bound stays as it is.

        Args:
            instance: The first argument of every call.

        Returns:
            The bound form.
        """
        if self._bound:
            return self
        bound = object.__new__(type(self))
        # One dictionary for all: a bound form has no attributes of its own.
        bound.__dict__ = self.__dict__
        bound._cache = self._cache
        bound._stand_in = self._stand_in
        bound._bound = (instance,)
        return bound

    # By these, and its annotations, inspect knows it for a function in Python 3.11, and so for a coroutine function.
    @property
    def __code__(self) -> Any:
        return self._cache.function.__code__

    @property
    def __defaults__(self) -> Any:
        return self._cache.function.__defaults__

    @property
    def __kwdefaults__(self) -> Any:
        return self._cache.function.__kwdefaults__

    def _signature(self) -> inspect.Signature:
        if not self._bound:
            return inspect.signature(self._cache.function)
        return inspect.signature(functools.partial(self._cache.function, *self._bound))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if protocol >= _PROTOCOL_OF_STAND_INS:
            return _unpickle, (type(self), self._stand_in, self._bound, script_names())
        # Older ones reach an attribute of the cached function through the cached function itself.
        if self._bound:
            return getattr, (self._bound[0], self._cache.function.__name__)
        return self._cache.function.__qualname__

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        unbound = _unbound.get(self._stand_in)
        # As with methods, whose instance is copied.
        return self if not self._bound or unbound is None else unbound.bound_to(copy.deepcopy(self._bound[0], memo))

    def __eq__(self, other: object) -> bool:
        # As with methods: bound forms are made at each access.
        if not isinstance(other, CachedCallable):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[int, ...]:
        return (id(self._stand_in), *map(id, self._bound))

    def __repr__(self) -> str:
        return f"<{self.decorator_name} {self._cache.keys.prefix}>"

    def info(self) -> CacheInfo:
        """Say what has been served, computed and saved in this process.

        Returns:
            The counts of all calls so far.
        """
        return self._cache.events.info()

    async def aclose(self) -> None:
        """Finish or cancel what this function still does behind its callers in the running loop."""
        await self._cache.aclose()

    def _check_binding(self) -> None:
        """Refuse to manage results of a class method that no class is known of."""
        if self._bound or "." not in self._cache.function.__qualname__:
            return
        owner: Any = sys.modules.get(self._cache.function.__module__)
        *path, name = self._cache.function.__qualname__.split(".")
        for part in path:
            owner = getattr(owner, part, None)
        found: Any = getattr(owner, "__dict__", {}).get(name)
        if isinstance(found, classmethod) and cast("object", found.__func__) is self:
            # From Python 3.13 on a class method hides from what it holds which class it is asked of.
            raise TypeError(f"put @{self.decorator_name} above @classmethod at {self._cache.function.__qualname__}")


# By their stand-ins, so that one that is pickled twice into one pickle, or by name, is one.
_unbound: "weakref.WeakValueDictionary[types.FunctionType, Any]" = weakref.WeakValueDictionary()
_PROTOCOL_OF_STAND_INS = 4


def _unpickle(
    kind: type[CachedCallable], stand_in: types.FunctionType, bound: tuple[Any, ...], names: dict[str, str]
) -> CachedCallable:
    """Return the cached function of a stand-in; where that came by value, a new one, to be completed when it is used."""
    adopt_script_names(names)
    known: CachedCallable | None = None if bound else _unbound.get(stand_in)
    if known is not None:
        return known
    new = object.__new__(kind)
    new.__dict__ = stand_in.__dict__
    new._stand_in, new._bound = stand_in, bound
    if not bound:
        _unbound[stand_in] = new
    return new


def check_coroutine_function(function: object) -> None:
    """Check what is decorated.

    Args:
        function: Anything.

    Raises:
        TypeError: It is no coroutine function.
    """
    name = getattr(function, "__qualname__", None)
    if name is None:
        raise TypeError(f"a {type(function).__name__} is not a coroutine function (async def); call it in one, and cache that")
    if isinstance(function, classmethod | staticmethod):
        raise TypeError(f"put it below @{type(function).__name__}, not above it")
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"{name} is a generator: it has no one result; collect it into a list in a coroutine and cache that")
    if not (inspect.iscoroutinefunction(function) or isinstance(function, CachedCallable)):
        raise TypeError(
            f"{name} is not a coroutine function (async def); for a blocking one, await asyncio.to_thread inside one"
        )
