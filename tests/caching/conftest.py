"""Fixtures of every test of `kv_cached`."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Generator
from typing import Any

import pytest
from caching_under_test import Cached, MovedTime, OtherLoop, WatchedBackend, Work, settle, twin_stores

import aiokv.clock
from aiokv import AsyncKVStore, CachedFunction, kv_cached


@pytest.fixture
def moved_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MovedTime:
    """Return the one clock of the package, which moves only when a test moves it.

    An engine that asks `time` instead of `aiokv.clock` does not see it move, and fails the tests that move it.
    """
    moved = MovedTime(eager=request.config.getoption("--eager-tasks"))
    monkeypatch.setattr(aiokv.clock, "now", moved.now)
    monkeypatch.setattr(aiokv.clock, "monotonic", moved.monotonic)
    return moved


@pytest.fixture
def watched() -> tuple[WatchedBackend, AsyncKVStore, AsyncKVStore]:
    """Return a backend that no other test has, its store, and the store of another process."""
    return twin_stores()


@pytest.fixture
def backend(watched: tuple[WatchedBackend, AsyncKVStore, AsyncKVStore]) -> WatchedBackend:
    """Return that backend."""
    return watched[0]


@pytest.fixture
def store(watched: tuple[WatchedBackend, AsyncKVStore, AsyncKVStore]) -> AsyncKVStore:
    """Return that store."""
    return watched[1]


@pytest.fixture
def twin(watched: tuple[WatchedBackend, AsyncKVStore, AsyncKVStore]) -> AsyncKVStore:
    """Return a store of another target with the same values, as another process has it."""
    return watched[2]


@pytest.fixture
def other_loop() -> Generator[OtherLoop]:
    """Return an event loop in a thread of its own."""
    made = OtherLoop()
    yield made
    made.end()


@pytest.fixture
def work() -> Work:
    """Return an expensive computation."""
    return Work()


@pytest.fixture
def numbered(store: AsyncKVStore, work: Work) -> CachedFunction[[], int]:
    """Return the work's cached form, with default options."""

    @kv_cached(60, store=store, key=lambda: "one")
    async def number() -> int:
        return await work()

    return number


@pytest.fixture(params=["one", "many"])
def of(request: pytest.FixtureRequest) -> str:
    """Run a test with a function of `kv_cached` and with one of `kv_cached_many`."""
    return str(request.param)


@pytest.fixture
async def nothing_left_pending() -> AsyncGenerator[None]:
    """Check that a test leaves no task behind."""
    before = asyncio.all_tasks()
    yield
    await settle()
    assert asyncio.all_tasks() <= before | {asyncio.current_task()}  # type: ignore[arg-type]


@pytest.fixture
def hurried_threads() -> Generator[None]:
    """Let threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def cached(store: AsyncKVStore, work: Work, moved_time: MovedTime) -> Cached:  # noqa: ARG001 (time stands still)
    """Return the work's cached form, by options of the test's; those of one target share keys and generations."""

    def make(ttl: Any = 60, **options: Any) -> CachedFunction[[], int]:
        @kv_cached(ttl, **{"store": store, "key": lambda: "one", "prefix": "number", "early": 0.0, **options})
        async def number() -> int:
            return await work()

        return number

    return make
