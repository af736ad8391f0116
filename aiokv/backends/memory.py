"""Values in this process's memory."""

import asyncio
import heapq
import math
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Final

from aiokv import clock as process_clock
from aiokv.backends.base import Clock, Gauges, Usage, account_of
from aiokv.backends.capabilities import (
    MAX_BATCH_BYTES,
    MAX_BATCH_KEYS,
    OMITTED,
    ClaimOutcome,
    Cleared,
    Entry,
    KeyInfo,
    Omitted,
    Page,
)
from aiokv.backends.memory_index import Account, Namespace
from aiokv.backends.memory_watch import Watchers
from aiokv.backends.watching import Changed, Watch

_SWEEP_PER_SET: Final = 2
# About a millisecond of walking.
_KEYS_PER_STEP: Final = 4_000
_MAX_CURSOR_DIGITS: Final = 30
_FORK_WAIT_SECONDS: Final = 1.0
# Claims are entries of a namespace beside that of the values; no namespace of values has NUL in its name.
_CLAIMS: Final = "\0"
_NOTHING: Final = Usage(0, 0)

_Name = tuple[str, str]
# Value, expiry, size in bytes of UTF-8, number in the namespace.
_Stored = tuple[str, float, int, int]


class MemoryBackend:
    """A dictionary of values, for any number of event loops and threads.

    Each set deletes up to two expired entries, so that memory follows the number of live entries without a background task.

    Args:
        clock: Returns the present in seconds; None takes `aiokv.clock.now`, looked up at each use.
    """

    batches_are_atomic = True
    scans_in_order = False

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock
        self._entries: dict[_Name, _Stored] = {}
        self._expiries: list[tuple[float, _Name]] = []
        self._namespaces: dict[str, Namespace] = {}
        self._accounts: dict[str, Account] = {}
        # Above all numbers of namespaces that are gone: a cursor of an earlier one must not skip keys of its successor.
        self._first_number = 0
        self._expired = 0
        self._watchers = Watchers()
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
        name = (db_name, key)
        with self._lock:
            self._sweep(now, _SWEEP_PER_SET)
            self._entries[name] = self._count_entry(name, value, now + ttl_seconds, size_bytes)
            if self._watchers.feeds:
                self._watchers.notify(db_name, [Changed(key)])

    async def delete(self, db_name: str, key: str) -> None:
        """Delete an entry; see `Backend.delete`."""
        with self._lock:
            if self._discard((db_name, key)) and self._watchers.feeds:
                self._watchers.notify(db_name, [Changed(key, is_delete=True)])

    async def aclose(self) -> None:
        """Do nothing: the values live as long as this object, and watches until their readers close them."""

    async def get_many(self, db_name: str, keys: Sequence[str]) -> list[str | Omitted | None]:
        """Read values; see `BatchBackend.get_many`."""
        now = self._now()
        values: list[str | Omitted | None] = []
        value_bytes = 0
        is_full = False
        with self._lock:
            entries = [self._entries.get((db_name, key)) for key in keys]
        for entry in entries:
            if entry is None or entry[1] <= now:
                values.append(None)
                continue
            is_full = is_full or (value_bytes > 0 and value_bytes + entry[2] > MAX_BATCH_BYTES)
            if is_full:
                values.append(OMITTED)
            else:
                values.append(entry[0])
                value_bytes += entry[2]
        return values

    async def set_many(self, db_name: str, entries: Sequence[Entry]) -> list[None]:
        """Store values; see `BatchBackend.set_many`."""
        now = self._now()
        sizes = [len(value) if value.isascii() else len(value.encode(errors="surrogatepass")) for _, value, _ in entries]
        last = {key: index for index, (key, _, _) in enumerate(entries)}
        with self._lock:
            self._sweep(now, _SWEEP_PER_SET * len(entries))
            stored: dict[_Name, _Stored] = {}
            for key, index in last.items():
                _, value, ttl_seconds = entries[index]
                stored[db_name, key] = self._count_entry((db_name, key), value, now + ttl_seconds, sizes[index])
            # One step of the interpreter: reads take no lock.
            self._entries.update(stored)
            if self._watchers.feeds:
                self._watchers.notify(db_name, [Changed(key) for key in last])
        return [None] * len(entries)

    async def delete_many(self, db_name: str, keys: Sequence[str]) -> list[None]:
        """Delete entries; see `BatchBackend.delete_many`."""
        with self._lock:
            self._discard_all(db_name, dict.fromkeys(keys))
        return [None] * len(keys)

    async def scan(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = MAX_BATCH_KEYS) -> Page:
        """List keys; see `ScanBackend.scan`."""
        now = self._now()
        first, end = self._range_of(db_name, cursor)
        with self._lock:
            infos, following = self._walk(db_name, prefix, first, limit, now, end)
        return Page(infos, None if following is None else f"{following}-{end}")

    async def count(self, db_name: str, prefix: str = "") -> int:
        """Count entries; see `ScanBackend.count`. The loop gets its turn between steps."""
        now = self._now()
        with self._lock:
            self._sweep(now, _KEYS_PER_STEP)
            if not prefix and (not self._expiries or now < self._expiries[0][0]):
                namespace = self._namespaces.get(db_name)
                return 0 if namespace is None else namespace.entries
        found = 0
        following: int | None = 0
        while following is not None:
            with self._lock:
                infos, following = self._walk(db_name, prefix, following, _KEYS_PER_STEP, now)
            found += len(infos)
            await asyncio.sleep(0)
        return found

    async def clear(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = MAX_BATCH_KEYS) -> Cleared:
        """Delete some entries; see `ScanBackend.clear`. The loop gets its turn between steps."""
        deleted = 0
        first, end = self._range_of(db_name, cursor)
        following: int | None = first
        while following is not None and deleted < limit:
            with self._lock:
                infos, following = self._walk(db_name, prefix, following, limit - deleted, -math.inf, end)
                self._discard_all(db_name, [info.key for info in infos])
            deleted += len(infos)
            if following is not None:
                await asyncio.sleep(0)
        return Cleared(deleted, None if following is None else f"{following}-{end}")

    async def claim(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        """Take or renew a claim; see `ClaimBackend.claim`."""
        return self._claim(db_name, key, owner, seconds, is_renewal=False)

    async def renew(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        """Renew a claim; see `ClaimBackend.renew`."""
        return self._claim(db_name, key, owner, seconds, is_renewal=True)

    def _claim(self, db_name: str, key: str, owner: str, seconds: float, *, is_renewal: bool) -> ClaimOutcome:
        now = self._now()
        name = (db_name + _CLAIMS, key)
        with self._lock:
            self._sweep(now, _SWEEP_PER_SET)
            held = self._entries.get(name)
            is_new = held is None or now >= held[1]
            if held is not None and not is_new and held[0] != owner:
                return ClaimOutcome(is_held=False, seconds_left=held[1] - now)
            if is_new and is_renewal:
                return ClaimOutcome(is_held=False, seconds_left=0.0)
            self._entries[name] = self._count_entry(name, owner, now + seconds, 0)
        return ClaimOutcome(is_held=True, seconds_left=seconds, is_new=is_new)

    async def release(self, db_name: str, key: str, owner: str) -> bool:
        """Give a claim back; see `ClaimBackend.release`."""
        now = self._now()
        name = (db_name + _CLAIMS, key)
        with self._lock:
            held = self._entries.get(name)
            if held is None or held[0] != owner:
                return False
            self._discard(name)
            return now < held[1]

    def watch(self, db_name: str) -> Watch:
        """Watch a namespace; see `WatchBackend.watch`. Only its reader ends it, or the end of its loop."""
        return self._watchers.watch(db_name)

    def usage(self, account: str) -> Usage:
        """Count what an account stores; see `HostedBackend.usage`."""
        held = self._accounts.get(account)
        return _NOTHING if held is None else Usage(held.value_bytes, held.entries)

    async def health(self) -> str | None:
        """Return None: a write to memory succeeds; see `HostedBackend.health`."""
        return None

    def gauges(self) -> Gauges:
        """Return the present figures; see `HostedBackend.gauges`."""
        with self._lock:
            value_bytes = sum(account.value_bytes for account in self._accounts.values())
            return Gauges(entries=len(self._entries), value_bytes=value_bytes, expired=self._expired)

    def _now(self) -> float:
        return process_clock.now() if self._clock is None else self._clock()

    def _count_entry(self, name: _Name, value: str, expires_at: float, size_bytes: int) -> _Stored:
        """Count an entry that is about to be stored, in place of the present one; the caller has the lock."""
        replaced = self._entries.get(name)
        namespace = self._namespaces.get(name[0]) or self._open_namespace(name[0])
        account = namespace.account
        if replaced is None:
            number = namespace.add(name[1])
            account.entries += 1
            account.value_bytes += size_bytes
        else:
            number = replaced[3]
            account.value_bytes += size_bytes - replaced[2]
        heapq.heappush(self._expiries, (expires_at, name))
        return value, expires_at, size_bytes, number

    def _open_namespace(self, db_name: str) -> Namespace:
        account_name = account_of(db_name)
        account = self._accounts.get(account_name)
        if account is None:
            account = self._accounts[account_name] = Account(account_name)
        namespace = self._namespaces[db_name] = Namespace(account, self._first_number)
        return namespace

    def _discard(self, name: _Name) -> bool:
        """Delete an entry, and its namespace and account with the last one; the caller has the lock."""
        entry = self._entries.pop(name, None)
        if entry is None:
            return False
        namespace = self._namespaces[name[0]]
        namespace.remove(entry[3])
        account = namespace.account
        account.entries -= 1
        account.value_bytes -= entry[2]
        if not namespace.entries:
            del self._namespaces[name[0]]
            self._first_number = max(self._first_number, namespace.next_number)
        if not account.entries:
            del self._accounts[account.name]
        return True

    def _discard_all(self, db_name: str, keys: Iterable[str]) -> None:
        """Delete entries in one step; the caller has the lock."""
        found = {name: entry for name in ((db_name, key) for key in keys) if (entry := self._entries.get(name)) is not None}
        # They expire in one step of the interpreter, since reads take no lock.
        self._entries.update({name: (value, -math.inf, size, number) for name, (value, _, size, number) in found.items()})
        for name in found:
            self._discard(name)
        if found and self._watchers.feeds:
            self._watchers.notify(db_name, [Changed(key, is_delete=True) for _, key in found])

    def _range_of(self, db_name: str, cursor: str | None) -> tuple[int, int]:
        """Return where a walk goes on, and its end: keys that are added after its beginning have later numbers."""
        if cursor is None:
            namespace = self._namespaces.get(db_name)
            return 0, 0 if namespace is None else namespace.next_number
        first, end = map(_number_of, cursor.split("-", 1) if "-" in cursor else ("", ""))
        return first, end

    def _walk(  # noqa: PLR0913, PLR0917 (what a walk is)
        self, db_name: str, prefix: str, first: int, limit: int, now: float, end: float = math.inf
    ) -> tuple[list[KeyInfo], int | None]:
        """Find up to `limit` unexpired keys in one bounded step, and the number to go on with; the caller has the lock."""
        infos: list[KeyInfo] = []
        namespace = self._namespaces.get(db_name)
        if namespace is not None:
            for steps, (number, key) in enumerate(namespace.walk(first)):
                if number >= end:
                    break
                if len(infos) == limit or steps == _KEYS_PER_STEP:
                    return infos, number
                if key.startswith(prefix):
                    _, expires_at, size_bytes, _ = self._entries[db_name, key]
                    if now < expires_at:
                        infos.append(KeyInfo(key, expires_at, size_bytes))
        return infos, None

    def _sweep(self, now: float, most: int) -> None:
        """Delete up to `most` expired entries; the caller has the lock."""
        for _ in range(most):
            if not self._expiries or self._expiries[0][0] > now:
                break
            expires_at, name = heapq.heappop(self._expiries)
            entry = self._entries.get(name)
            # The entry may have been set again since; then a later item of the heap stands for it.
            if entry is not None and entry[1] <= expires_at:
                self._discard(name)
                self._expired += 1
        # Keys that were set again or deleted leave items behind, which would stay until their expiry, up to 30 days.
        if len(self._expiries) > 2 * len(self._entries) + 1024:
            self._expiries = [(entry[1], name) for name, entry in self._entries.items()]
            heapq.heapify(self._expiries)


def _number_of(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= _MAX_CURSOR_DIGITS):
        raise ValueError("cursor is not one of this store's; pass the one of the page before, or None to begin")
    return int(cursor)


_backends: "weakref.WeakSet[MemoryBackend]" = weakref.WeakSet()
# Locked by the thread that forks, so that no other thread's half-done write is copied to the child.
_locked: list[threading.Lock] = []


def _all_backends() -> "list[MemoryBackend]":
    while True:
        try:
            return list(_backends)
        except RuntimeError:  # Another thread has made one just now.
            continue


def _lock_all() -> None:
    # A thread that forks while it has a lock itself, such as in a signal handler, must not wait for ever.
    _locked.extend(
        backend._lock  # noqa: SLF001 (this module's own)
        for backend in _all_backends()
        if backend._lock.acquire(timeout=_FORK_WAIT_SECONDS)  # noqa: SLF001
    )


def _unlock_all() -> None:
    while _locked:
        _locked.pop().release()


def _renew_locks() -> None:
    # A thread of the parent that has a lock does not exist in the child, and would never release it.
    _locked.clear()
    for backend in _all_backends():
        backend._lock = threading.Lock()  # noqa: SLF001
        backend._watchers.after_fork()  # noqa: SLF001


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock_all, after_in_parent=_unlock_all, after_in_child=_renew_locks)
