"""The common base of cached functions, which look like the function and bind as functions do."""

import asyncio
import copy
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from aiokv.caching.events import CacheInfo
from aiokv.caching.naming import adopt_script_names, script_names
from aiokv.caching.shipping import Recipe, make_stand_in, recipe_of

C = TypeVar("C", bound="CachedCallable")

# Type parameters cannot all be pickled; see the property.
_ASSIGNED = ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__")


class _SignatureOf:
    """A signature that is made when it is read: that is seldom, while a method is bound at each access."""

    def __get__(self, instance: "CachedCallable | None", owner: type | None = None) -> inspect.Signature:
        if instance is None:
            # inspect reads this attribute of the class, too, which has no such signature.
            raise AttributeError("__signature__")
        return instance._signature()  # noqa: SLF001 (this module's own)


class CachedCallable:
    """A cached function, bound to nothing, or to an instance or a class."""

    # The dictionary holds the function's own attributes. Each call needs the others, which are faster as slots.
    __slots__ = ("__dict__", "__weakref__", "_bound", "_cache", "_stand_in")

    decorator_name: ClassVar[str] = ""
    __signature__ = _SignatureOf()

    def __init__(self, recipe: Recipe) -> None:
        self._cache = recipe.cache()
        # This also copies the attributes of a function that is itself a cached function.
        functools.update_wrapper(cast("Callable[..., object]", self), recipe.function, _ASSIGNED)
        for name in [name for name in self.__dict__ if not name.startswith("__") and hasattr(type(self), name)]:
            # Else an attribute of the function would hide a method.
            del self.__dict__[name]
        self._bound: tuple[Any, ...] = ()
        self._stand_in = make_stand_in(recipe, self.__dict__)
        _unbound[self._stand_in] = _at_home[recipe.token] = self

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # A function that came by value builds its cache at its first use, when all that it refers to has been unpickled.
            if name not in {"_cache", "_near"}:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self._cache = recipe_of(self._stand_in).cache()
            if name == "_near":
                self._near = self._cache.near
            return getattr(self, name)

    # asyncio.iscoroutinefunction reads this attribute. inspect reads the properties below.
    @property
    def _is_coroutine(self) -> object:
        return getattr(asyncio.coroutines, "_is_coroutine", None)

    @property
    def __type_params__(self) -> Any:
        return cast("Any", self._cache.function).__type_params__

    def bound_to(self, instance: object) -> Self:
        """Bind to an instance or a class, as a function in a class does; a bound form stays as it is.

        Args:
            instance: The first argument of every call.

        Returns:
            The bound form.
        """
        if self._bound:
            return self
        bound = object.__new__(type(self))
        # All bound forms share one dictionary: they have no attributes of their own.
        bound.__dict__ = self.__dict__
        bound._cache = self._cache
        bound._stand_in = self._stand_in
        bound._bound = (instance,)
        return bound

    # By these and the annotations, inspect takes it for a function, and so for a coroutine function (Python 3.11).
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
            token = recipe_of(self._stand_in).token
            return _unpickle, (type(self), self._stand_in, self._bound, token, script_names())
        # Older ones reach an attribute of the cached function through the cached function itself.
        if self._bound:
            return getattr, (self._bound[0], self._cache.function.__name__)
        return self._cache.function.__qualname__

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # As with methods, whose instance is copied.
        return _form(type(self), self._stand_in, copy.deepcopy(self._bound, memo)) if self._bound else self

    def __eq__(self, other: object) -> bool:
        # As with methods: each access makes a new bound form, and these are equal.
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
        """Return what was served, computed and saved in this process.

        Returns:
            The counts of all calls so far.
        """
        return self._cache.events.info()

    async def aclose(self) -> None:
        """Finish or cancel the background work of this function in the running loop."""
        await self._cache.aclose()

    def _check_binding(self) -> None:
        """Refuse to manage the results of a class method whose class is not known."""
        if self._bound or "." not in self._cache.function.__qualname__:
            return
        owner: Any = sys.modules.get(self._cache.function.__module__)
        *path, name = self._cache.function.__qualname__.split(".")
        for part in path:
            owner = getattr(owner, part, None)
        found: Any = getattr(owner, "__dict__", {}).get(name)
        if isinstance(found, classmethod) and cast("object", found.__func__) is self:
            # From Python 3.13 on, classmethod does not pass the class to the object that it wraps.
            raise TypeError(f"put @{self.decorator_name} above @classmethod at {self._cache.function.__qualname__}")


# Those that were decorated here, by their stand-ins and by their tokens: by name, or back from elsewhere, each is itself.
_unbound: "weakref.WeakValueDictionary[types.FunctionType, CachedCallable]" = weakref.WeakValueDictionary()
_at_home: "weakref.WeakValueDictionary[str, CachedCallable]" = weakref.WeakValueDictionary()
_PROTOCOL_OF_STAND_INS = 4


def _unpickle(
    kind: type[CachedCallable], stand_in: types.FunctionType, bound: tuple[Any, ...], token: str, names: dict[str, str]
) -> CachedCallable:
    """Return the cached function of a stand-in; if it came by value, a new one, which builds its cache at its first use."""
    adopt_script_names(names)
    unbound = _unbound.get(stand_in) or _at_home.get(token)
    if unbound is None:
        return _form(kind, stand_in, bound)
    return _form(kind, unbound._stand_in, bound) if bound else unbound  # noqa: SLF001 (of this module)


def _form(kind: type[C], stand_in: types.FunctionType, bound: tuple[Any, ...]) -> C:
    """Make a bound or unbound form without completing it."""
    form = object.__new__(kind)
    form.__dict__ = stand_in.__dict__
    form._stand_in, form._bound = stand_in, bound
    return form


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
