"""`movable_clock` and `kv_clock`: what they move, what they leave alone, and how they end."""

import asyncio
import itertools
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aiokv import AsyncKVStore, NearCache, clock, kv_cached
from aiokv.testing import MovableClock, movable_clock

Count = Callable[[], Awaitable[int]]
_names = itertools.count()


def counted(*, name: str | None = None, ttl: float = 60, **options: Any) -> Count:
    """Return a cached function that counts its computations, over a memory store of its own."""
    calls = itertools.count(1)

    async def count() -> int:
        return next(calls)

    store = AsyncKVStore("db", url=f"memory://{name or f'clock-{next(_names)}'}")
    return kv_cached(ttl, store=store, key=lambda: "k", early=0, **options)(count)


async def test_near_caches_end_when_the_clock_has_moved(kv_clock: MovableClock) -> None:
    name = f"clock-{next(_names)}"
    shared, other = (counted(ttl=3_600, near=NearCache(10), name=name, prefix="shared", version=1) for _ in range(2))
    assert (await shared(), await shared()) == (1, 1)
    await other.refresh()  # type: ignore[attr-defined]
    assert await other.refresh() == 2  # type: ignore[attr-defined]
    kv_clock.advance(9)
    before = await shared()
    kv_clock.advance(2)
    assert (before, await shared()) == (1, 2)


async def test_results_are_computed_anew_when_their_ttl_has_passed(kv_clock: MovableClock) -> None:
    count = counted(ttl=60, near=NearCache(600))
    assert await count() == 1
    kv_clock.advance(59)
    assert await count() == 1
    kv_clock.advance(timedelta(seconds=2))
    assert await count() == 2


async def test_results_are_served_stale_and_refreshed_behind(kv_clock: MovableClock) -> None:
    count = counted(ttl=60, stale_while_revalidate=60)
    assert await count() == 1
    kv_clock.advance(61)
    assert await count() == 1
    await count.aclose()  # type: ignore[attr-defined]
    assert await count() == 2


async def test_the_wait_after_a_failure_passes(kv_clock: MovableClock) -> None:
    failing: list[str] = []
    calls = 0

    async def upstream() -> int:
        nonlocal calls
        calls += 1
        if failing:
            raise RuntimeError(failing[0])
        return calls

    store = AsyncKVStore("db", url=f"memory://clock-{next(_names)}")
    cached = kv_cached(60, store=store, key=lambda: "k", early=0, stale_if_error=3_600)(upstream)
    assert await cached() == 1
    failing.append("down")
    kv_clock.advance(61)
    assert (await cached(), await cached(), calls) == (1, 1, 2)
    kv_clock.advance(2)
    assert (await cached(), calls) == (1, 3)


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_entries_of_embedded_stores_expire(kind: str, kv_clock: MovableClock, tmp_path: Path) -> None:
    url = f"memory://clock-{next(_names)}" if kind == "memory" else f"sqlite:///{tmp_path}/kv.db"
    async with AsyncKVStore("db", url=url) as store:
        await store.set("k", "v", 60)
        kv_clock.advance(59.5)
        assert await store.get("k") == "v"
        kv_clock.advance(1)
        assert await store.get("k") is None


async def test_entries_of_a_server_in_this_process_expire(kv_store: AsyncKVStore, kv_clock: MovableClock) -> None:
    await kv_store.set("k", "v", 60)
    kv_clock.advance(61)
    assert await kv_store.get("k") is None


async def test_other_clocks_stay(kv_clock: MovableClock) -> None:
    loop = asyncio.get_running_loop()
    before = (time.time(), time.monotonic(), loop.time(), datetime.now(UTC).timestamp())
    kv_clock.advance(timedelta(days=20))
    after = (time.time(), time.monotonic(), loop.time(), datetime.now(UTC).timestamp())
    assert all(there - here < 3_600 for here, there in zip(before, after, strict=True))
    assert clock.now() - time.time() == pytest.approx(20 * 86_400, abs=60)


def test_moves_of_nested_blocks_add_up_and_each_end_takes_back_its_own() -> None:
    with movable_clock() as outer:
        outer.advance(100)
        with movable_clock() as inner:
            inner.advance(1_000)
            outer.advance(100)
            assert clock.now() - time.time() == pytest.approx(1_200, abs=30)
        assert clock.now() - time.time() == pytest.approx(200, abs=30)
        assert (outer.ahead_seconds, inner.ahead_seconds) == (200, 1_000)
    assert clock.now is time.time


def test_blocks_of_two_threads_may_end_in_either_order() -> None:
    with movable_clock() as mine:
        began, may_end = threading.Event(), threading.Event()

        def move() -> None:
            with movable_clock() as theirs:
                theirs.advance(500)
                began.set()
                may_end.wait(10)

        thread = threading.Thread(target=move)
        thread.start()
        assert began.wait(10)
        mine.advance(1_000)
        assert clock.now() - time.time() == pytest.approx(1_500, abs=30)
    assert clock.now() - time.time() == pytest.approx(500, abs=30)
    may_end.set()
    thread.join()
    assert clock.now is time.time


def test_an_error_in_the_block_takes_back_the_moves() -> None:
    def fail() -> None:
        with movable_clock() as moved:
            moved.advance(1_000)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert clock.now is time.time


def test_the_monotonic_clock_never_goes_back() -> None:
    with movable_clock() as moved:
        moved.advance(5_000)
        inside = clock.monotonic()
    assert clock.monotonic() >= inside


async def test_what_a_near_cache_holds_at_the_end_of_a_block_does_not_live_longer() -> None:
    store = AsyncKVStore("db", url=f"memory://clock-{next(_names)}")
    calls = itertools.count(1)

    async def number() -> int:
        return next(calls)

    cached = kv_cached(3_600, store=store, key=lambda: "k", near=NearCache(5), early=0)(number)
    with movable_clock() as moved:
        moved.advance(10_000)
        assert await cached() == 1
    await store.delete(cached.key())
    with movable_clock() as moved:
        moved.advance(6)
        assert await cached() == 2


@pytest.mark.parametrize("attribute", ["now", "monotonic"])
def test_a_clock_that_the_test_put_in_place_is_followed_and_put_back(attribute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed() -> float:
        return 1_000.0

    monkeypatch.setattr(clock, attribute, fixed)
    with movable_clock() as moved:
        before = getattr(clock, attribute)()
        moved.advance(5)
        assert getattr(clock, attribute)() - before == 5
    assert getattr(clock, attribute) is fixed


@pytest.mark.parametrize(
    ("by", "error", "message"),
    [
        (-1, ValueError, "by must be 0 seconds or more, not -1"),
        (timedelta(seconds=-1), ValueError, "by must be 0 seconds or more"),
        (float("nan"), ValueError, "by must be 0 seconds or more"),
        (float("inf"), ValueError, "by must be 0 seconds or more"),
        (True, TypeError, "by must be seconds or a timedelta, not bool"),
        ("60", TypeError, "by must be seconds or a timedelta, not str"),
    ],
)
def test_a_move_that_is_no_move_forward_is_refused(
    by: Any, error: type[Exception], message: str, kv_clock: MovableClock
) -> None:
    with pytest.raises(error, match=message):
        kv_clock.advance(by)
    assert kv_clock.ahead_seconds == 0


def test_a_clock_whose_block_has_ended_is_refused() -> None:
    with movable_clock() as moved:
        pass
    with pytest.raises(RuntimeError, match="after its block or its test has ended"):
        moved.advance(1)
    assert clock.now is time.time


@pytest.mark.parametrize("order", ["frozen first", "clock first", "frozen after a move", "frozen alone"])
async def test_cached_functions_follow_freezegun_and_move_beside_it(order: str) -> None:
    freezegun = pytest.importorskip("freezegun")
    count = counted(ttl=60, near=NearCache(600))
    frozen_time = freezegun.freeze_time("2030-01-01", real_asyncio=True)
    if order == "clock first":
        with movable_clock() as moved, frozen_time as frozen:
            await follow(count, frozen.tick, moved.advance)
    elif order == "frozen after a move":
        with movable_clock() as moved:
            moved.advance(timedelta(days=1))
            with frozen_time as frozen:
                frozen.tick(timedelta(days=-1))
                await follow(count, frozen.tick, moved.advance)
    elif order == "frozen first":
        with frozen_time as frozen, movable_clock() as moved:
            await follow(count, frozen.tick, moved.advance)
    else:
        with frozen_time as frozen:
            await follow(count, frozen.tick, frozen.tick)
    assert abs(clock.now() - time.time()) < 60
    assert abs(datetime.now(UTC).timestamp() - time.time()) < 60


def test_the_clock_moves_on_after_a_freeze_that_ended_in_its_block() -> None:
    freezegun = pytest.importorskip("freezegun")
    frozen_time = freezegun.freeze_time("2030-01-01", real_asyncio=True)
    frozen_time.start()
    with movable_clock() as moved:
        frozen_time.stop()
        moved.advance(1_000)
        assert clock.now() - time.time() == pytest.approx(1_000, abs=30)
    assert clock.now is time.time


async def follow(count: Count, tick: Callable[[float], object], advance: Callable[[float], object]) -> None:
    assert datetime.fromtimestamp(clock.now(), UTC).date() == datetime(2030, 1, 1, tzinfo=UTC).date()
    assert (await count(), await count()) == (1, 1)
    tick(61)
    assert await count() == 2
    advance(61)
    assert await count() == 3
    # The event loop's own clock runs on, so timeouts and sleeps end.
    await asyncio.sleep(0.01)
