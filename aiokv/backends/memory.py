"""Values in this process's memory."""

import heapq
import os
import threading
import weakref

from aiokv import clock as process_clock
from aiokv.backends.base import Clock, Gauges, Usage, account_of

_SWEEP_PER_SET = 2
_NOTHING = Usage(0, 0)


class MemoryBackend:
    """A dictionary of values, for any number of event loops and threads.

    Each set deletes up to two expired entries, so that memory follows the number of live entries without a background task.

    Args:
        clock: Returns the present in seconds; None takes `aiokv.clock.now`, looked up at each use.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock
        self._entries: dict[tuple[str, str], tuple[str, float, int]] = {}
        self._expiries: list[tuple[float, str, str]] = []
        self._usage: dict[str, Usage] = {}
        self._expired = 0
        self._lock = threading.Lock()
        _backends.add(self)

    def get_now(self, db_name: str, key: str) -> str | None:
        """Read a value; see `ImmediateBackend.get_now`. Never raises `WouldWaitError`."""
        entry = self._entries.get((db_name, key))
        if entry is None:
            return None
        now = process_clock.now() if self._clock is None else self._clock()
        return entry[0] if now < entry[1] else None

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value; see `Backend.get`."""
        return self.get_now(db_name, key)

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value; see `Backend.set`."""
        now = process_clock.now() if self._clock is None else self._clock()
        size_bytes = len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
        with self._lock:
            self._sweep(now)
            self._note(db_name, self._entries.get((db_name, key)), size_bytes)
            self._entries[db_name, key] = (value, now + ttl_seconds, size_bytes)
            heapq.heappush(self._expiries, (now + ttl_seconds, db_name, key))

    async def delete(self, db_name: str, key: str) -> None:
        """Delete an entry; see `Backend.delete`."""
        with self._lock:
            entry = self._entries.pop((db_name, key), None)
            if entry is not None:
                self._note(db_name, entry, None)

    async def aclose(self) -> None:
        """Do nothing: the values live as long as this object."""

    def usage(self, account: str) -> Usage:
        """Count what an account stores; see `HostedBackend.usage`."""
        return self._usage.get(account, _NOTHING)

    async def health(self) -> str | None:
        """Return None: a write to memory succeeds; see `HostedBackend.health`."""
        return None

    def gauges(self) -> Gauges:
        """Return the present figures; see `HostedBackend.gauges`."""
        with self._lock:
            value_bytes = sum(usage.value_bytes for usage in self._usage.values())
        return Gauges(entries=len(self._entries), value_bytes=value_bytes, expired=self._expired)

    def _note(self, db_name: str, replaced: tuple[str, float, int] | None, size_bytes: int | None) -> None:
        """Count an entry that is set (`size_bytes`) or deleted (None) in place of another one."""
        account = account_of(db_name)
        value_bytes, entries = self._usage.get(account, _NOTHING)
        if replaced is not None:
            value_bytes, entries = value_bytes - replaced[2], entries - 1
        if size_bytes is not None:
            value_bytes, entries = value_bytes + size_bytes, entries + 1
        if entries:
            self._usage[account] = Usage(value_bytes, entries)
        else:
            del self._usage[account]

    def _sweep(self, now: float) -> None:
        for _ in range(_SWEEP_PER_SET):
            if not self._expiries or self._expiries[0][0] > now:
                break
            expires_at, db_name, key = heapq.heappop(self._expiries)
            entry = self._entries.get((db_name, key))
            # The entry may have been set again since; then a later item of the heap stands for it.
            if entry is not None and entry[1] <= expires_at:
                del self._entries[db_name, key]
                self._note(db_name, entry, None)
                self._expired += 1
        # Keys that were set again or deleted leave items behind, which would stay until their expiry, up to 30 days.
        if len(self._expiries) > 2 * len(self._entries) + 1024:
            self._expiries = [(expires_at, *name) for name, (_, expires_at, _) in self._entries.items()]
            heapq.heapify(self._expiries)


# For forks: a thread of the parent that held a lock does not exist in the child, and would never release it.
_backends: "weakref.WeakSet[MemoryBackend]" = weakref.WeakSet()


def _renew_locks() -> None:
    for backend in list(_backends):
        backend._lock = threading.Lock()  # noqa: SLF001 (this module's own)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
