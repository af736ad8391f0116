"""What `linearity.py` checks: cached functions over a slow store, and the least versions that each may serve."""

import asyncio
import collections
import contextlib
import dataclasses
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from aiokv import AsyncKVStore, StorageError, cache_refresh, kv_cached, kv_cached_many
from aiokv.backends.memory import MemoryBackend

KEYS: Final = 3
HISTORY: Final = 60
# What happens inside stores and functions, which tasks share; each task has a generator of its own beside it.
chances: Final = random.Random()  # noqa: S311 (guards nothing)
# What a computation returns: key, tag, version, process, begin (monotonic nanoseconds).
Result = list[int]


class SlowBackend(MemoryBackend):
    """A memory backend that takes its time before and after each step, and fails now and then on either side of it."""

    def __init__(self, faults: float) -> None:
        super().__init__()
        self._faults = faults

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value, late."""
        await self._step("get")
        value = await super().get(db_name, key)
        await self._step("get")
        return value

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value, late."""
        await self._step("set")
        await super().set(db_name, key, value, ttl_seconds)
        await self._step("set")

    async def delete(self, db_name: str, key: str) -> None:
        """Remove a value, late."""
        await self._step("delete")
        await super().delete(db_name, key)
        await self._step("delete")

    async def _step(self, verb: str) -> None:
        await pause()
        if chances.random() < self._faults / 2:
            raise StorageError("out of order for a moment", verb=verb, maybe_applied=verb != "get")


async def pause() -> None:
    """Let others have their turn: not at all, a few times, or for milliseconds."""
    drawn = chances.random()
    if drawn < 0.2:  # noqa: PLR2004 (a share)
        return
    if drawn < 0.8:  # noqa: PLR2004 (likewise)
        for _ in range(int(drawn * 10)):
            await asyncio.sleep(0)
        return
    await asyncio.sleep((drawn - 0.8) * 0.03)


@dataclasses.dataclass
class Floor:
    """The least version that may be served, and when the call began that said so."""

    version: int = 0
    begun_ns: int = 0


@dataclasses.dataclass(eq=False)
class Prime:
    """A prime under way. Its version is that of its start: lower than what others know by now."""

    thread: int
    version: int | None = None


class Subject:
    """One cached function, and what this process knows of its keys."""

    def __init__(
        self, name: str, version_of: Callable[[int], int], stores: list[AsyncKVStore], *, many: bool, **options: Any
    ) -> None:
        self.name = name
        self.many = many
        self.floors = [Floor() for _ in range(KEYS)]
        self.primes: list[list[Prime]] = [[] for _ in range(KEYS)]
        self.ended: list[collections.deque[tuple[int, Prime]]] = [collections.deque(maxlen=50) for _ in range(KEYS)]
        self.history: list[collections.deque[str]] = [collections.deque(maxlen=HISTORY) for _ in range(KEYS)]
        self.lock = threading.Lock()
        options = {"store": lambda: chances.choice(stores), "prefix": name, **options}
        self.cached: Any
        if many:

            @kv_cached_many(2, key=lambda id_, tags: (id_, tags[0]), **options)
            async def computed_many(ids: list[int], tags: list[int]) -> dict[int, Result]:
                begun = {id_: (version_of(id_), time.monotonic_ns()) for id_ in ids}
                tag = tags[0]
                await pause()
                return {id_: [id_, tag, version, os.getpid(), at] for id_, (version, at) in begun.items()}

            self.cached = computed_many
        else:

            @kv_cached(2, key=lambda key, tags: (key, tags[0]), **options)
            async def computed(key: int, tags: list[int]) -> Result:
                version, at = version_of(key), time.monotonic_ns()
                tag = tags[0]
                await pause()
                return [key, tag, version, os.getpid(), at]

            self.cached = computed

    async def call(self, keys: list[int], tags: list[int]) -> dict[int, Result]:
        """Call the function with one key, or all of them at once."""
        return await self.cached(keys, tags) if self.many else {keys[0]: await self.cached(keys[0], tags)}

    async def invalidate(self, keys: list[int], tags: list[int]) -> None:
        """Forget the results of keys."""
        await self.cached.invalidate(keys if self.many else keys[0], tags)

    async def prime(self, values: dict[int, Result], tags: list[int]) -> None:
        """Store results."""
        if self.many:
            await self.cached.prime(values, tags)
        else:
            ((key, value),) = values.items()
            await self.cached.prime(value, key, tags)

    async def refresh(self, keys: list[int], tags: list[int]) -> dict[int, Result]:
        """Compute keys anew."""
        if not self.many:
            return {keys[0]: await self.cached.refresh(keys[0], tags)}
        if hasattr(self.cached, "refresh") and chances.random() < 0.5:  # noqa: PLR2004 (every other time)
            refreshed: dict[int, Result] = await self.cached.refresh(keys, tags)
            return refreshed
        with cache_refresh():
            return await self.call(keys, tags)

    def note(self, keys: list[int], what: str) -> None:
        """Keep a line of history."""
        line = f"{time.monotonic():.6f} {threading.current_thread().name} {what}"
        for key in keys:
            self.history[key].append(line)

    def raise_floor(self, key: int, version: int, begun_ns: int) -> None:
        """Note the least version from now on, unless an older prime of another thread was under way at the same time."""
        here = threading.get_ident()
        with self.lock:
            overlapping = [*self.primes[key], *(prime for ended_ns, prime in self.ended[key] if ended_ns >= begun_ns)]
            # In one loop the order of two calls is known; of two threads, who knows.
            others = [0 if prime.version is None else prime.version for prime in overlapping if prime.thread != here]
            version = min([version, *others])
            if version > self.floors[key].version:
                self.floors[key] = Floor(version, begun_ns)

    @contextlib.contextmanager
    def priming(self, keys: list[int]) -> Iterator[Prime]:
        """Let those who raise floors meanwhile know of a prime."""
        prime = Prime(threading.get_ident())
        with self.lock:
            for key in keys:
                self.primes[key].append(prime)
        try:
            yield prime
        finally:
            now = time.monotonic_ns()
            with self.lock:
                for key in keys:
                    self.primes[key].remove(prime)
                    self.ended[key].append((now, prime))
