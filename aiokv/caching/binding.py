"""The common base of cached functions, which look like the function and bind as functions do."""

import asyncio
import copy
import functools
import inspect
import operator
import sys
import types
import weakref
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeVar, cast

from aiokv import background
from aiokv.caching.cache import Cache
from aiokv.caching.callers import Caller
from aiokv.caching.events import CacheInfo
from aiokv.caching.naming import adopt_script_names, script_names
from aiokv.caching.shipping import Recipe, make_stand_in, recipe_of

C = TypeVar("C", bound="CachedCallable")
T = TypeVar("T")

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

    # What there is at run time are the forms of each kind; see `_forms_of`.
    __slots__ = ("__weakref__",)

    decorator_name: ClassVar[str] = ""
    __signature__ = _SignatureOf()

    if TYPE_CHECKING:
        _kind: ClassVar[type[Any]]
        _cache: Cache
        _stand_in: Any
        _bound: tuple[Any, ...]
        _quick: Callable[[tuple[Any, ...]], Any] | None

        def bound_to(self, instance: object) -> Self:
            """Bind to an instance or a class, as a function in a class does; a bound form stays as it is.

            Args:
                instance: The first argument of every call.

            Returns:
                The bound form.
            """
            raise NotImplementedError

    @property
    def __type_params__(self) -> Any:
        return cast("Any", self._cache.function).__type_params__

    # By these and the annotations, inspect takes it for a function, and for a coroutine function where it is one (Python 3.11).
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
            return _unpickle, (self._kind, self._stand_in, self._bound, token, script_names())
        # Older ones reach an attribute of the cached function through the cached function itself.
        if self._bound:
            return getattr, (self._bound[0], self._cache.function.__name__)
        return self._cache.function.__qualname__

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # As with methods, whose instance is copied.
        bound: Any = self
        return _bind(bound._unbound, copy.deepcopy(bound._instance, memo)) if self._bound else self  # noqa: SLF001 (of this module)

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


class AwaitedCallable(CachedCallable):
    """A cached coroutine function."""

    __slots__ = ()

    # asyncio.iscoroutinefunction reads this attribute. inspect reads `__code__`.
    @property
    def _is_coroutine(self) -> object:
        return getattr(asyncio.coroutines, "_is_coroutine", None)

    async def aclose(self) -> None:
        """Finish the background work of this function in the running loop, within `read_timeout` seconds, and cancel the rest.

        Calls that somebody awaits are waited for as long; they are not cancelled, and go on after that.
        """
        await self._cache.aclose()


class BlockingCallable(CachedCallable):
    """A cached plain function, whose methods block."""

    __slots__ = ()

    def close(self) -> None:
        """Finish what goes on in the background for this function, within `read_timeout` seconds, and drop the rest.

        Calls in other threads are waited for as long, and go on after that. A refresh in the background cannot be cancelled: it
        goes on in its thread, and its result is not stored. At the end of the interpreter this does nothing.
        """
        if not background.has_ended():
            self._wait(self._cache.aclose)

    def _wait(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine in the background loop, and here the functions that it calls."""
        return Caller().run(make)


class _Unbound(CachedCallable):
    """The form that is bound to nothing."""

    # The dictionary holds the function's own attributes. Calls need the others, which are faster as slots.
    __slots__ = ("__dict__", "_cache", "_quick", "_quick_bound", "_stand_in")

    _bound = ()

    def __init__(self, recipe: Recipe) -> None:
        cache = recipe.cache()
        # This also copies the attributes of a function that is itself a cached function.
        functools.update_wrapper(cast("Callable[..., object]", self), recipe.function, _ASSIGNED)
        for name in [name for name in self.__dict__ if not name.startswith("__") and hasattr(type(self), name)]:
            # Else an attribute of the function would hide a method.
            del self.__dict__[name]
        self._stand_in = make_stand_in(recipe, self.__dict__)
        self._take(cache)
        _unbound[self._stand_in] = _at_home[recipe.token] = self

    def _take(self, cache: Cache) -> None:
        near = cache.near
        self._cache = cache
        self._quick, self._quick_bound = (None, None) if near is None else (near.direct, near.direct_bound)

    def bound_to(self, instance: object) -> Any:
        return _bind(self, instance)


class _Shipped(_Unbound):
    """An unbound form that came by value: it builds its cache at its first use, when what it refers to has been unpickled."""

    __slots__ = ()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in _BUILT:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self._take(recipe_of(self._stand_in).cache())
            # From now on it is an unbound form as others: those without `__getattr__` are read faster. One thread changes the
            # class: where an audit hook lets others run meanwhile, CPython gives up the old class once for each that does.
            claim = object()
            if _completing.setdefault(id(self), claim) is claim:
                try:
                    self.__class__ = _forms_of(self._kind).unbound
                finally:
                    del _completing[id(self)]
            return getattr(self, name)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else _bind(self, instance)


class _Bound(CachedCallable):
    """The form that is bound to an instance or a class; like a method, it passes the attributes of the function on."""

    # No dictionary: one is made at each call of a method.
    __slots__ = ("_instance", "_quick", "_unbound")

    _unbound: _Unbound
    _instance: object

    # Functions in C, since each attribute is read through the slow way of classes with `__getattr__`.
    _cache: Any = property(operator.attrgetter("_unbound._cache"))
    _stand_in: Any = property(operator.attrgetter("_unbound._stand_in"))
    _bound: Any = property(lambda self: (self._instance,))

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name == "_quick":
                # The unbound form may not be built yet.
                self._quick = self._unbound._quick_bound  # noqa: SLF001 (of this module)
                return self._quick
            return getattr(self._unbound, name)

    def __get__(self, _: Any, owner: type | None = None) -> Any:
        return self

    def bound_to(self, instance: object) -> Any:  # noqa: ARG002 (it has one)
        return self


class _OfUnbound:
    """An attribute of bound forms that Python would else find in the class: that of the unbound form."""

    def __init__(self, name: str, of_class: object) -> None:
        self._name = name
        self._of_class = of_class

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self._of_class if instance is None else getattr(instance._unbound, self._name)  # noqa: SLF001 (of this module)


class _ModuleOfUnbound(str):
    """Likewise, for `__module__`, which Python reads in the class as it stands there."""

    __slots__ = ()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else instance._unbound.__module__  # noqa: SLF001 (of this module)


class _Forms(NamedTuple):
    """The classes of one kind of cached function."""

    unbound: type[Any]
    shipped: type[Any]
    bound: type[Any]


_forms: dict[Any, _Forms] = {}


def _forms_of(kind: Any) -> _Forms:
    """Return the classes of a kind of cached function."""
    return _forms.get(kind) or _forms.setdefault(kind, _make_forms(kind))


def _make_forms(kind: Any) -> _Forms:
    """Make the classes of a kind of cached function; all are subclasses of it, and named as it is."""
    names = {"__slots__": (), "_kind": kind, "__doc__": kind.__doc__, "__module__": kind.__module__}
    of_bound = {
        **names,
        "__doc__": _OfUnbound("__doc__", kind.__doc__),
        "__module__": _ModuleOfUnbound(kind.__module__),
        "__annotations__": _OfUnbound("__annotations__", {}),
    }
    bound = type(kind.__name__, (_Bound, kind), of_bound)

    def get(self: Any, instance: Any, _: type | None = None) -> Any:
        # Each call of a method passes here.
        if instance is None:
            return self
        form: Any = bound()
        form._unbound = self  # noqa: SLF001 (of this module)
        form._instance = instance  # noqa: SLF001 (of this module)
        form._quick = self._quick_bound  # noqa: SLF001 (of this module)
        return form

    unbound = type(kind.__name__, (_Unbound, kind), {**names, "__get__": get})
    return _Forms(unbound, type(kind.__name__, (_Shipped, unbound), names), bound)


def make_cached(kind: type[C], recipe: Recipe) -> C:
    """Make a cached function.

    Args:
        kind: `CachedFunction` or `CachedManyFunction`.
        recipe: What it is built from.

    Returns:
        Its unbound form.

    Raises:
        TypeError: An option does not fit the function.
        ValueError: An option is not acceptable.
    """
    return cast("C", _forms_of(kind).unbound(recipe))


def _bind(unbound: _Unbound, instance: object) -> Any:
    """Make a bound form without building the unbound one."""
    bound = _forms_of(unbound._kind).bound()  # noqa: SLF001 (of this module)
    bound._unbound, bound._instance = unbound, instance  # noqa: SLF001 (of this module)
    return bound


_BUILT = frozenset({"_cache", "_quick", "_quick_bound"})
# The claims of those that are changing the class of a shipped form, by its id.
_completing: dict[int, object] = {}
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
        unbound = object.__new__(_forms_of(kind).shipped)
        unbound.__dict__ = stand_in.__dict__
        unbound._stand_in = stand_in
    return unbound.bound_to(bound[0]) if bound else unbound


def is_plain_function(function: Any, decorator_name: str) -> bool:
    """Return whether what is decorated is a plain function; a coroutine function is the other kind that can be.

    Args:
        function: Anything.
        decorator_name: The decorator, for messages.

    Raises:
        TypeError: It is neither.
    """
    name = getattr(function, "__qualname__", None)
    if isinstance(function, classmethod | staticmethod):
        raise TypeError(f"put it below @{type(function).__name__}, not above it")
    if function is None or isinstance(function, str | int | float | bytes | list | dict | tuple):
        raise TypeError(
            f"write @{decorator_name}(60) with its parentheses: without them the first call decorates its argument, "
            f"and {type(function).__name__} is not a function"
        )
    if name is None or isinstance(function, type) or not callable(function):
        kind = f"the class {name}" if isinstance(function, type) else f"a {type(function).__name__}"
        raise TypeError(
            f"{kind} is not a function: what it holds would not count; call it in a def or async def, and cache that"
        )
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"{name} is a generator: it has no one result; collect it into a list in a function and cache that")
    if inspect.iscoroutinefunction(function) or isinstance(function, AwaitedCallable):
        return False
    if not (inspect.isfunction(function) or inspect.ismethod(function) or isinstance(function, BlockingCallable)):
        raise TypeError(
            f"{name} is a {type(function).__name__}, whose code cannot be looked at; "
            "call it in a def or async def, and cache that"
        )
    return True
