"""A small cache in this process, in front of the store. There is no invalidation between processes: its time bounds its age."""

import math
import os
import sys
import threading
import weakref
from collections.abc import Hashable
from datetime import timedelta
from typing import Any

from aiokv.caching.flight import Flight

# A slot's own objects: the record, its key and place in the dictionary, two numbers.
_SLOT_BYTES = 512
_IMMUTABLE_TYPES = frozenset({str, int, float, bool, type(None)})


class Slot:
    """One result: its JSON, decoded anew at each hit, or the value itself where nobody can change that."""

    __slots__ = ("payload", "size_bytes", "until", "value", "visited")

    def __init__(self, payload: bytes | str | None, value: Any, until: float, size_bytes: int) -> None:
        self.payload = payload
        self.value: Any = value
        self.until = until
        self.size_bytes = size_bytes
        self.visited = False

    def forget(self) -> None:
        """Serve nobody any more, whoever still holds this slot."""
        # First: who reads the result before this time, as readers do, has it whole.
        self.until = float("-inf")
        self.payload = self.value = None


class NearCache:
    """Hold results in this process for a short time; pass one to several functions to bound their memory together.

    Each hit decodes the result anew unless it is a str, int, float, bool or None, so that callers cannot change what others
    get. When it is full, what has not been asked for since it came goes first (second chance).

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

    def put(self, key: Hashable, payload: bytes | str, value: Any, until: float, flight: Flight | None = None) -> None:
        """Keep a result.

        Args:
            key: Its key.
            payload: Its JSON.
            value: The decoded result, kept only where it is immutable.
            until: When it ceases to be served, by the clock that the reader uses.
            flight: What brought it; where that has been discarded, the result is not kept.
        """
        immutable = type(value) in _IMMUTABLE_TYPES
        size_bytes = _SLOT_BYTES + sys.getsizeof(value if immutable else payload)
        slot = Slot(None if immutable else payload, value if immutable else None, until, size_bytes)
        with self._lock:
            # Asked under the lock: who discards a flight drops its result after that.
            if flight is not None and flight.discarded:
                return
            self._drop(key)
            if size_bytes > self.max_bytes:
                return
            self.slots[key] = slot
            self.size_bytes += size_bytes
            while self.size_bytes > self.max_bytes:
                oldest = next(iter(self.slots))
                old = self.slots[oldest]
                if old.visited and oldest != key:
                    # A second chance, at the end of the queue.
                    old.visited = False
                    del self.slots[oldest]
                    self.slots[oldest] = old
                else:
                    self._drop(oldest)

    def drop(self, key: Hashable) -> None:
        """Forget a result.

        Args:
            key: Its key.
        """
        with self._lock:
            self._drop(key)

    def clear(self) -> None:
        """Forget every result."""
        with self._lock:
            for slot in self.slots.values():
                slot.forget()
            self.slots.clear()
            self.size_bytes = 0

    def _drop(self, key: Hashable) -> None:
        slot = self.slots.pop(key, None)
        if slot is not None:
            self.size_bytes -= slot.size_bytes
            slot.forget()

    def _after_fork_in_child(self) -> None:
        torn = self._lock.locked()
        self._lock = threading.Lock()
        if torn:
            # Another thread was at it, and is not here to finish.
            self.clear()


_caches: "weakref.WeakSet[NearCache]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for near in list(_caches):
        near._after_fork_in_child()  # noqa: SLF001 (this module's own)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
