"""What the forms of a cached function have in common: they look like the function, and bind as functions do."""

import asyncio
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

from aiokv.caching.cache import Cache, CacheInfo

R = TypeVar("R")


class _SignatureOf:
    """Give the signature of what is asked when it is asked: seldom, while methods are bound at each access."""

    def __get__(self, instance: "CachedCallable[Any] | None", owner: type | None = None) -> inspect.Signature:
        if instance is None:
            # The class has none of its own, and is asked, too.
            raise AttributeError("__signature__")
        return instance._signature()  # noqa: SLF001 (this module's own)


class CachedCallable(Generic[R]):
    """A cached function, bound to nothing, or to an instance or a class."""

    # The function's own attributes are in the dictionary; what each call needs is found faster outside it.
    __slots__ = ("__dict__", "__weakref__", "_bound", "_cache")

    decorator_name: ClassVar[str] = ""
    __signature__ = _SignatureOf()

    def __init__(self, cache: Cache[R]) -> None:
        # First, since it copies the function's own attributes, those of a cached function among them.
        functools.update_wrapper(cast("Callable[..., object]", self), cache.function)
        self._cache = cache
        self._bound: tuple[Any, ...] = ()
        # What asyncio.iscoroutinefunction asks for in Python 3.11; inspect's own mark came with 3.12.
        self._is_coroutine_marker = getattr(asyncio.coroutines, "_is_coroutine", None)
        mark = getattr(inspect, "markcoroutinefunction", None)
        if mark is not None:
            mark(self)

    @property
    def _is_coroutine(self) -> object:
        return self._is_coroutine_marker

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

    def __reduce__(self) -> Any:
        # By name, as functions are pickled: in the other process it is decorated there.
        if self._bound:
            return getattr, (self._bound[0], self._cache.function.__name__)
        return self._cache.function.__qualname__

    def __eq__(self, other: object) -> bool:
        # As with methods: bound forms are made at each access.
        if not isinstance(other, CachedCallable):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[int, ...]:
        return (id(self._cache), *map(id, self._bound))

    def __repr__(self) -> str:
        return f"<{self.decorator_name} {self._cache.keys.prefix}>"

    def info(self) -> CacheInfo:
        """Say what has been served, computed and saved in this process.

        Returns:
            The counts of all calls so far.
        """
        return self._cache.info()

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
