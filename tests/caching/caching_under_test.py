"""What the tests of `kv_cached` need: stores whose backend a test watches, slows down or breaks."""

import asyncio
import os
import selectors
import signal
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import orjson

from aiokv import AsyncKVStore, CachedFunction, CacheEvent, StorageError
from aiokv.backends.capabilities import Capabilities, ClaimOutcome
from aiokv.backends.memory import MemoryBackend

Cached = Callable[..., CachedFunction[[], int]]

_backends: "weakref.WeakKeyDictionary[AsyncKVStore, WatchedBackend]" = weakref.WeakKeyDictionary()


class WatchedBackend(MemoryBackend):
    """Record calls; hold up or fail those that a test names.

    A read that is held up answers with what was there when it came, a write takes effect when it is let go.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        super().__init__(clock)
        self.calls: list[tuple[str, str]] = []
        self.failing: set[str] = set()
        self.error: Exception = StorageError("broken", verb="get", attempts=1)
        self.gates: dict[str, asyncio.Event] = {}
        self.cancelled: list[str] = []

    @property
    def capabilities(self) -> Capabilities:
        """Return what the methods of this class watch."""
        return Capabilities(claim=self)

    def asked(self, verb: str) -> int:
        """Return the number of calls, without claims of refreshes and probes."""
        return sum(1 for called, key in self.calls if called == verb and ":refreshing" not in key and key != "aiokv-probe")

    def hold(self, verb: str) -> asyncio.Event:
        """Hold up calls from now on until the event is set."""
        self.gates[verb] = asyncio.Event()
        return self.gates[verb]

    async def _pass(self, verb: str, key: str) -> None:
        self.calls.append((verb, key))
        if verb in self.gates:
            try:
                await self.gates[verb].wait()
            except asyncio.CancelledError:
                self.cancelled.append(verb)
                raise
        if verb in self.failing:
            raise self.error

    async def get(self, db_name: str, key: str) -> str | None:
        value = await super().get(db_name, key)
        await self._pass("get", key)
        return value

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        await self._pass("set", key)
        await super().set(db_name, key, value, ttl_seconds)

    async def delete(self, db_name: str, key: str) -> None:
        await self._pass("delete", key)
        await super().delete(db_name, key)

    async def claim(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        await self._pass("claim", key)
        return await super().claim(db_name, key, owner, seconds)

    async def release(self, db_name: str, key: str, owner: str) -> bool:
        await self._pass("release", key)
        return await super().release(db_name, key, owner)


def watched_store(clock: Callable[[], float] | None = None) -> tuple[WatchedBackend, AsyncKVStore]:
    """Return a backend that no other test has, and its store."""
    backend = WatchedBackend(clock)
    store = AsyncKVStore("db", backend=backend)
    _backends[store] = backend
    return backend, store


def same_target(store: AsyncKVStore) -> AsyncKVStore:
    """Return another store object of the same target, as another module of the program makes it."""
    return AsyncKVStore(store.db_name, backend=_backends[store])


def twin_stores(clock: Callable[[], float] | None = None) -> tuple[WatchedBackend, AsyncKVStore, AsyncKVStore]:
    """Return two stores of two targets that hold the same values, as two processes have them, and their one backend."""
    backend, one = watched_store(clock)
    return backend, one, AsyncKVStore("db", backend=_Twin(backend))


class _Twin:
    """Another backend object with the same values."""

    def __init__(self, backend: WatchedBackend) -> None:
        self.get, self.set, self.delete, self.aclose = backend.get, backend.set, backend.delete, backend.aclose
        self._backend = backend

    @property
    def capabilities(self) -> Capabilities:
        return self._backend.capabilities


class MovedTime:
    """Both clocks of the package and the timers of an event loop, moved by a test alone."""

    def __init__(self, *, eager: bool = False) -> None:
        self.elapsed = 0.0
        self.wall_shift = 0.0
        self.eager = eager

    def now(self) -> float:
        return 1_700_000_000.0 + self.elapsed + self.wall_shift

    def monotonic(self) -> float:
        return 1_000.0 + self.elapsed

    def advance(self, seconds: float) -> None:
        self.elapsed += seconds

    def run(self, work: Coroutine[Any, Any, Any], *, eager: bool = False) -> Any:
        """Run a test in a loop that never waits: where nothing is ready, time jumps to the next timer."""
        with asyncio.Runner(loop_factory=lambda: _JumpingLoop(self)) as runner:
            if eager or self.eager:
                runner.get_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined] # 3.12+
            return runner.run(work)


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, moved: MovedTime) -> None:
        super().__init__()
        self._moved = moved

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or timeout == 0:
            return events
        if timeout is None:
            # Another thread may wake this loop.
            events = super().select(10)
            assert events, "nothing is left that could wake the loop"
            return events
        self._moved.advance(timeout)
        return []


class _JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self, moved: MovedTime) -> None:
        self._moved = moved
        super().__init__(_JumpingSelector(moved))

    def time(self) -> float:
        return self._moved.monotonic()


class OtherLoop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._wait())

    async def _wait(self) -> None:
        self._end = asyncio.Event()
        await self._end.wait()
        await settle()

    def begin(self, work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wrap_future(self.begin(work))

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join()


class Events:
    """An observer that remembers what it was told."""

    def __init__(self) -> None:
        self.seen: list[CacheEvent] = []

    def __call__(self, event: CacheEvent) -> None:
        self.seen.append(event)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.seen]

    def count(self, kind: str) -> int:
        return self.kinds().count(kind)


async def settle(turns: int = 30) -> None:
    """Let every task go as far as it can without time passing."""
    for _ in range(turns):
        await asyncio.sleep(0)


class Work:
    """Stand in for an expensive computation: count runs, hold them up, fail."""

    def __init__(self) -> None:
        self.runs = 0
        self.cancelled = 0
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None

    def hold(self) -> asyncio.Event:
        """Hold up runs from now on until the event is set."""
        self.gate = asyncio.Event()
        return self.gate

    async def __call__(self) -> int:
        """Return the number of the run."""
        self.runs += 1
        run, gate, error = self.runs, self.gate, self.error
        try:
            if gate is not None:
                await gate.wait()
            else:
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if error is not None:
            raise error
        return run


def in_child(run: Callable[[], None]) -> int:
    """Run a function in a forked child; return its exit status."""
    with warnings.catch_warnings():
        # From Python 3.12 on a fork beside other threads warns, which is what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        # A child that waits for ever ends all the same.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(12)
        try:
            run()
            status = 0
        except BaseException:  # noqa: BLE001 (a child reports whatever it meets)
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def with_compute_seconds(number: CachedFunction[[], int], store: AsyncKVStore, seconds: float) -> None:
    """Let a stored entry say that its computation took so many seconds."""
    text = await store.get(number.key())
    assert text is not None
    head, _, payload = text.partition("\n")
    fields = orjson.loads(head)
    fields[5] = seconds
    await store.set(number.key(), f"{orjson.dumps(fields).decode()}\n{payload}", 3600)
