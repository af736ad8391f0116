"""What the tests of `kv_cached` need: stores whose backend a test watches, slows down or breaks."""

import asyncio
import itertools
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator

import pytest

import aiokv.backends.registry
from aiokv import AsyncKVStore, StorageError
from aiokv.backends.memory import MemoryBackend

_numbers = itertools.count()


class WatchedBackend(MemoryBackend):
    """Record calls; hold up or fail those that a test names.

    A read that is held up answers with what was there when it came, a write takes effect when it is let go.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        super().__init__(clock)
        self.calls: list[tuple[str, str]] = []
        self.failing: set[str] = set()
        self.error: Exception = StorageError("broken", verb="get", attempts=1)
        self.gates: dict[str, asyncio.Event] = {}
        self.cancelled: list[str] = []

    def asked(self, verb: str) -> int:
        """Say how often something was asked for, claims of refreshes and probes not counted."""
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


def watched_store(clock: Callable[[], float] = time.time) -> tuple[WatchedBackend, AsyncKVStore]:
    """Make a store that nobody else has, with its backend."""
    backend = WatchedBackend(clock)
    name = f"watched-{next(_numbers)}"
    aiokv.backends.registry._memory_backends[name] = backend
    return backend, AsyncKVStore("db", url=f"memory://{name}")


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
        """Give the number of the run."""
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
    """Run something in a forked child; give its exit status."""
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


# Fixtures, which become a module's own by an assignment there.


@pytest.fixture
def watched() -> tuple[WatchedBackend, AsyncKVStore]:
    """Give a store that nobody else has, with its backend."""
    return watched_store()


@pytest.fixture
def backend(watched: tuple[WatchedBackend, AsyncKVStore]) -> WatchedBackend:
    """Give that backend."""
    return watched[0]


@pytest.fixture
def store(watched: tuple[WatchedBackend, AsyncKVStore]) -> AsyncKVStore:
    """Give that store."""
    return watched[1]


@pytest.fixture
def work() -> Work:
    """Give an expensive computation."""
    return Work()


@pytest.fixture
def hurried_threads() -> Generator[None]:
    """Let threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
