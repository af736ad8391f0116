"""A small cache in this process, in front of the store. There is no invalidation between processes: its time bounds its age."""

import itertools
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Hashable
from datetime import timedelta
from typing import Any, Final

from aiokv import clock
from aiokv.caching.events import EventKind, Events
from aiokv.caching.generations import Place
from aiokv.caching.modes import Mode, cache_mode
from aiokv.caching.results import ResultCodec
from aiokv.store import AsyncKVStore

MISSED: Final[Any] = object()
"""Stands for a result that is not there."""

# A slot's own objects: the record, its key with a target, its places in two dictionaries, two numbers.
_SLOT_BYTES = 768
_IMMUTABLE_TYPES = frozenset({str, int, float, bool, type(None)})
_MAX_CALL_CHARS = 512


_numbers = itertools.count()


class Slot:
    """One result: its JSON, decoded anew at each hit, or the value itself where nobody can change that."""

    __slots__ = ("by_call", "call", "counts", "json", "key", "kinds", "size_bytes", "until", "value", "visited")

    def __init__(self, key: str, json: bytes | str | None, value: Any, until: float, size_bytes: int) -> None:
        self.key = key
        self.json = json
        self.value: Any = value
        self.until = until
        self.size_bytes = size_bytes
        self.visited = False
        # Where else it can be looked up, and under which arguments. Equal ones may be of other types: 1 equals True.
        self.by_call: dict[tuple[object, ...], Slot] | None = None
        self.call: tuple[object, ...] | None = None
        # Their types; the type itself where there is one argument.
        self.kinds: type | tuple[object, ...] = ()
        # Those of the function, for the call that finds the slot by its arguments.
        self.counts: dict[EventKind, int] | None = None

    def forget(self) -> None:
        """Serve nobody any more, whoever still holds this slot."""
        # First: a reader takes the result before it looks at this time, and so has it whole.
        self.until = -math.inf
        self.json = self.value = None
        if self.by_call is not None and self.by_call.get(self.call or ()) is self:
            self.by_call.pop(self.call or (), None)


class NearCache:
    """Hold results in this process for a short time; pass one to several functions to bound their memory together.

    Each hit decodes the result anew unless it is a str, int, float, bool or None, so that callers cannot change what others
    get. When it is full, what has not been asked for since it came goes first (second chance). Time is counted by the
    monotonic clock.

    Args:
        ttl: For how long, in seconds or as a `timedelta`; no longer than the result is fresh.
        max_bytes: How much memory the results may take, about.

    Raises:
        TypeError: `ttl` is of another type.
        ValueError: An argument is not more than 0.
    """

    def __init__(self, ttl: float | timedelta, max_bytes: int = 16 * 1024 * 1024) -> None:
        if isinstance(ttl, bool) or not isinstance(ttl, int | float | timedelta):
            raise TypeError(f"near ttl must be seconds or a timedelta, not {type(ttl).__name__}")
        self.ttl_seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else float(ttl)
        if not 0 < self.ttl_seconds < math.inf:
            raise ValueError(f"near ttl must be more than 0 seconds, not {ttl!r}")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes <= 0:
            raise ValueError(f"max_bytes must be an int of more than 0, not {max_bytes!r}")
        self.max_bytes = max_bytes
        self.size_bytes = 0
        # Read without the lock: one look-up, which other threads cannot tear.
        self.slots: dict[Hashable, Slot] = {}
        self._lock = threading.Lock()
        _caches.add(self)

    def __repr__(self) -> str:
        return f"NearCache(ttl={self.ttl_seconds:g}, max_bytes={self.max_bytes}, <{len(self.slots)} results>)"

    def __reduce__(self) -> tuple[type["NearCache"], tuple[float, int]]:
        return NearCache, (self.ttl_seconds, self.max_bytes)

    def put(self, place: Hashable, slot: Slot, is_current: Callable[[], bool]) -> bool:
        """Keep a result, unless it is superseded or too large.

        Args:
            place: What it is looked up by.
            slot: The result.
            is_current: Asked under the lock, since an invalidation drops the place only after superseding it.

        Returns:
            Whether it is kept.
        """
        with self._lock:
            if not is_current():
                return False
            self._drop(place)
            if slot.size_bytes > self.max_bytes:
                return False
            self.slots[place] = slot
            self.size_bytes += slot.size_bytes
            while self.size_bytes > self.max_bytes:
                oldest = next(iter(self.slots))
                old = self.slots[oldest]
                if old.visited and oldest != place:
                    # A second chance, at the end of the queue.
                    old.visited = False
                    del self.slots[oldest]
                    self.slots[oldest] = old
                else:
                    self._drop(oldest)
        return True

    def drop(self, place: Hashable) -> None:
        """Forget a result.

        Args:
            place: What it is looked up by.
        """
        with self._lock:
            self._drop(place)

    def clear(self) -> None:
        """Forget every result."""
        with self._lock:
            for slot in self.slots.values():
                slot.forget()
            self.slots.clear()
            self.size_bytes = 0

    def _drop(self, place: Hashable) -> None:
        slot = self.slots.pop(place, None)
        if slot is not None:
            self.size_bytes -= slot.size_bytes
            slot.forget()

    def _after_fork_in_child(self) -> None:
        torn = self._lock.locked()
        self._lock = threading.Lock()
        if torn:
            # Another thread was at it, and is not here to finish.
            self.clear()


class NearView:
    """What one function keeps in a near cache, and the whole way of a near hit.

    Args:
        near: The near cache, which other functions may use, too.
        values: Gives the arguments of a call that count.
        results: Decodes results.
        events: Counts hits.
        direct_count: How many positional arguments, where nothing else is given, are all that counts; None where more does.
        direct_count_bound: Likewise, of a bound form, whose first argument does not count.
    """

    def __init__(  # noqa: PLR0913, PLR0917 (what a look-up takes)
        self,
        near: NearCache,
        values: Callable[..., tuple[object, ...]],
        results: ResultCodec,
        events: Events,
        direct_count: int | None = None,
        direct_count_bound: int | None = None,
    ) -> None:
        self.near = near
        # Tells views apart for as long as the process lives, and holds none of them.
        self._number = next(_numbers)
        self._values = values
        self._results = results
        # The one store that calls use; None where it depends on the call, or is not known yet.
        self.store: AsyncKVStore | None = None
        self.by_call: dict[tuple[object, ...], Slot] = {}
        self._events = events
        self._counts, self._observer = events.counts, events.observer
        self._get_slot = self.by_call.get
        self._count = direct_count
        self.direct_count = direct_count or direct_count_bound
        direct = self.by_call.get if events.observer is None else None
        # Find the slot of a call of positional arguments alone, unbound and bound; None where that takes more.
        self.direct = direct if direct_count else None
        self.direct_bound = direct if direct_count_bound else None

    def quick_hit(self, args: tuple[Any, ...], kwargs: dict[str, Any], _mode: Callable[[], Mode] = cache_mode.get) -> Any:
        """Return the result of a call that was served from here before, or `MISSED`.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.
        """
        try:
            values = self._values(*args, **kwargs) if kwargs or len(args) != self._count else args
            slot = self._get_slot(values)
        except TypeError:
            # An argument is not hashable, or the arguments do not fit: the long way knows.
            return MISSED
        if slot is None or _mode() != "use":
            return MISSED
        kinds = slot.kinds
        if (not values or type(values[0]) is not kinds) and kinds != tuple(map(type, values)):
            return MISSED
        if self._observer is not None:
            return self._hit(slot)
        # As in `_hit`, whose call would cost as much as the rest.
        json, value = slot.json, slot.value
        if clock.monotonic() >= slot.until:
            return MISSED
        slot.visited = True
        self._counts["near_hit"] += 1
        return value if json is None else self.load(slot, json)

    def _hit(self, slot: Slot) -> Any:
        """Return a slot's result, which no other caller holds unless it is immutable; `MISSED` if its time has come."""
        # In this order: another thread may be forgetting the slot.
        json, value = slot.json, slot.value
        if clock.monotonic() >= slot.until:
            return MISSED
        slot.visited = True
        self._events.emit("near_hit", slot.key)
        return value if json is None else self.load(slot, json)

    def load(self, slot: Slot, json: bytes | str) -> Any:
        """Return a fresh result of what a slot holds, or `MISSED`."""
        try:
            return self._results.load(json)
        except Exception:  # noqa: BLE001 (a class of the program's may refuse today what it took before)
            slot.forget()
            return MISSED

    def get(self, place: Place) -> Any:
        """Return the result at a place, or `MISSED`."""
        slot = self.near.slots.get((self._number, place))
        return MISSED if slot is None else self._hit(slot)

    def put(  # noqa: PLR0913, PLR0917 (what is kept, and who may find it)
        self,
        store: AsyncKVStore,
        place: Place,
        call: tuple[object, ...] | None,
        json: bytes | str,
        value: object,
        fresh_seconds: float,
        is_current: Callable[[], bool],
    ) -> None:
        """Keep a result.

        Args:
            store: Where it came from.
            place: The store's target, and the key.
            call: The arguments that count, then their types, where these are enough to know the call; else None.
            json: The result as JSON.
            value: The result, kept only where it is immutable.
            fresh_seconds: How long it is still fresh.
            is_current: Whether it has not been superseded.
        """
        immutable = type(value) in _IMMUTABLE_TYPES
        size_bytes = _SLOT_BYTES + sys.getsizeof(value if immutable else json)
        until = clock.monotonic() + min(self.near.ttl_seconds, fresh_seconds)
        slot = Slot(place[1], None if immutable else json, value if immutable else None, until, size_bytes)
        if call is not None and store is self.store:
            texts = sum(len(item) for item in call if isinstance(item, str | bytes))
            # Longer arguments would be held beside the near cache's bound.
            if texts <= _MAX_CALL_CHARS:
                slot.by_call, slot.call, slot.kinds = self.by_call, call[: len(call) // 2], _kinds_of(call)
                slot.counts = self._events.counts
                slot.size_bytes += 8 * len(call) + texts
        if not self.near.put((self._number, place), slot, is_current) or slot.call is None:
            return
        self.by_call[slot.call] = slot
        if store is not self.store or slot.until == -math.inf:
            # Another thread has meanwhile changed the default store, or dropped the slot.
            self.by_call.pop(slot.call, None)

    def drop(self, place: Place) -> None:
        """Forget the result at a place."""
        self.near.drop((self._number, place))

    def default_store_changed(self, store: AsyncKVStore | None) -> None:
        """Serve nothing by its arguments alone that came from another default store."""
        # In this order: `put` looks at the store last.
        self.store = store
        self.by_call.clear()


def _kinds_of(call: tuple[object, ...]) -> Any:
    """Return the types of the arguments that count; the type itself where there is one."""
    kinds = call[len(call) // 2 :]
    return kinds[0] if len(kinds) == 1 else kinds


_caches: "weakref.WeakSet[NearCache]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for near in list(_caches):
        near._after_fork_in_child()  # noqa: SLF001 (this module's own)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
