"""What the memory backend promises beyond the contract: bounds, threads, forks and room."""

import asyncio
import gc
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from helpers import FakeClock, wait_until

from aiokv.backends import memory, memory_watch
from aiokv.backends.base import Usage
from aiokv.backends.capabilities import MAX_BATCH_BYTES, OMITTED, Entry
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.watching import HEARTBEAT_SECONDS, MAX_QUEUED_CHANGES, Alive, Changed, Lost, Watch, WatchEvent


@pytest.fixture
def backend(clock: FakeClock) -> MemoryBackend:
    return MemoryBackend(clock)


def in_thread(run: Callable[[], Coroutine[Any, Any, Any]]) -> threading.Thread:
    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    return thread


async def next_change(watch: Watch) -> WatchEvent:
    async with asyncio.timeout(10):
        while isinstance(event := await anext(watch), Alive):
            pass
        return event


def holds_nothing(backend: MemoryBackend) -> bool:
    return not (backend._entries or backend._namespaces or backend._accounts or backend._watchers.feeds)


async def test_namespace_that_empties_leaves_nothing_behind(backend: MemoryBackend, clock: FakeClock) -> None:
    for i in range(100):
        await backend.set(f"account:{i}", "k", "v", 60)
        await backend.claim(f"account:{i}", "k", "me", 60)
    await backend.delete_many("account:0", ["k"])
    await backend.clear("account:1")
    await backend.release("account:2", "k", "me")
    clock.advance(60)
    for _ in range(200):
        await backend.set("other", "k", "v", 60)
    await backend.delete("other", "k")
    assert holds_nothing(backend)


async def test_keys_that_come_and_go_leave_no_room_taken(backend: MemoryBackend) -> None:
    await backend.set("db", "stays", "v", 600)
    for i in range(5_000):
        await backend.set("db", f"k{i}", "v", 600)
        await backend.delete("db", f"k{i}")
    namespace = backend._namespaces["db"]
    assert len(namespace._chunks) <= 2
    assert [number for number, _ in namespace.walk(0)] == [0]


async def test_page_of_a_prefix_that_nothing_has_is_bounded(backend: MemoryBackend) -> None:
    for start in range(0, 20_000, 1_000):
        await backend.set_many("db", [Entry(f"k{start + i}", "v", 60) for i in range(1_000)])
    await backend.set("db", "z", "v", 60)
    found: list[str] = []
    page = await backend.scan("db", "z")
    steps = 1
    while page.cursor is not None:
        assert page.infos == []
        page = await backend.scan("db", "z", page.cursor)
        steps += 1
    found += [info.key for info in page.infos]
    assert found == ["z"]
    assert steps > 20_000 / memory._KEYS_PER_STEP


@pytest.mark.parametrize(
    ("long_call", "result"),
    [(lambda backend: backend.count("db", "z"), 0), (lambda backend: backend.clear("db", "z"), (0, None))],
)
async def test_long_calls_let_the_loop_go_on(
    backend: MemoryBackend, long_call: Callable[[MemoryBackend], Coroutine[Any, Any, Any]], result: object
) -> None:
    for start in range(0, 20_000, 1_000):
        await backend.set_many("db", [Entry(f"k{start + i}", "v", 60) for i in range(1_000)])
    turns = 0
    task = asyncio.ensure_future(long_call(backend))
    while not task.done():
        turns += 1
        await asyncio.sleep(0)
    assert (await task, turns > 4) == (result, True)


@pytest.mark.parametrize("cursor", ["", "x", "-1", "1.5", "٣", "1" * 31, "k/1", "1", "1-x"], ids=ascii)
async def test_foreign_cursor_is_refused(backend: MemoryBackend, cursor: str) -> None:
    with pytest.raises(ValueError, match="cursor is not one of this store's"):
        await backend.scan("db", cursor=cursor)


async def test_cursor_of_a_namespace_that_emptied_meanwhile_shows_nothing_of_its_successor(backend: MemoryBackend) -> None:
    for i in range(100):
        await backend.set("db", f"old {i}", "v", 60)
    page = await backend.scan("db", limit=90)
    await backend.clear("db")
    for i in range(100):
        await backend.set("db", f"new {i}", "v", 60)
    assert await backend.scan("db", cursor=page.cursor) == ([], None)
    assert {info.key for info in (await backend.scan("db")).infos} == {f"new {i}" for i in range(100)}


async def test_listing_ends_beside_a_writer_that_is_faster(backend: MemoryBackend) -> None:
    for i in range(20):
        await backend.set("db", f"old {i}", "v", 60)
    page = await backend.scan("db", limit=5)
    found = [info.key for info in page.infos]
    for step in range(10):
        if page.cursor is None:
            break
        await backend.set_many("db", [Entry(f"new {step} {i}", "v", 60) for i in range(10)])
        page = await backend.scan("db", cursor=page.cursor, limit=5)
        found += [info.key for info in page.infos]
    assert page.cursor is None
    assert sorted(found) == sorted(f"old {i}" for i in range(20))


async def test_claims_count_as_entries_until_they_are_released_or_swept(backend: MemoryBackend, clock: FakeClock) -> None:
    await backend.set("account:db", "k", "value", 600)
    await backend.claim("account:db", "k", "me", 60)
    await backend.claim("account:db", "k", "me", 60)
    await backend.claim("account:db", "j", "me", 60)
    assert backend.usage("account") == Usage(value_bytes=5, entries=3)
    await backend.release("account:db", "j", "me")
    assert backend.usage("account") == Usage(value_bytes=5, entries=2)
    clock.advance(60)
    await backend.set("account:db", "k", "longer value", 600)
    assert backend.usage("account") == Usage(value_bytes=12, entries=1)


async def test_renewed_claims_take_no_more_room(backend: MemoryBackend) -> None:
    for _ in range(5_000):
        await backend.claim("db", "k", "me", 3_600)
    assert len(backend._expiries) <= 2 + 1024 + 1


async def test_first_value_comes_however_large_and_the_rest_is_omitted(backend: MemoryBackend) -> None:
    await backend.set("db", "huge", "x" * (MAX_BATCH_BYTES + 1), 60)
    await backend.set("db", "small", "v", 60)
    outcomes = await backend.get_many("db", ["absent", "huge", "small", "absent"])
    assert [len(outcomes[1]) if isinstance(outcomes[1], str) else 0, outcomes[2]] == [MAX_BATCH_BYTES + 1, OMITTED]
    assert (outcomes[0], outcomes[3]) == (None, None)


async def test_lone_reads_of_other_threads_never_see_a_later_part_of_a_batch_before_an_earlier_one(
    backend: MemoryBackend,
) -> None:
    keys = [f"k{i}" for i in range(200)]
    await backend.set_many("db", [Entry(key, "0", 60) for key in keys])
    is_over = threading.Event()
    wrong: list[tuple[str | None, str | None]] = []

    def read() -> None:
        while not is_over.is_set():
            # Written in one step: what is read later is never older.
            first, last = backend.get_now("db", keys[-1]), backend.get_now("db", keys[0])
            if first is not None and last is not None and int(last) < int(first):
                wrong.append((first, last))
            first, last = backend.get_now("db", keys[0]), backend.get_now("db", keys[-1])
            if first is not None and last is not None and int(last) < int(first):
                wrong.append((first, last))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(1, 400):
        await backend.set_many("db", [Entry(key, str(i), 60) for key in keys])
    is_over.set()
    for thread in threads:
        thread.join()
    assert wrong == []


async def test_watch_is_told_of_what_other_threads_change_in_the_order_of_each_key(backend: MemoryBackend) -> None:
    async def write(name: str) -> None:
        for _ in range(200):
            await backend.set("db", name, "v", 60)
            await backend.delete("db", name)

    async with backend.watch("db") as watch:
        threads = [in_thread(lambda name=name: write(name)) for name in ("one", "two")]  # type: ignore[misc]
        assert await next_change(watch) == Lost()
        events = [await next_change(watch) for _ in range(800)]
        for thread in threads:
            thread.join()
    for name in ("one", "two"):
        of_key = [event for event in events if isinstance(event, Changed) and event.key == name]
        assert of_key == [Changed(name), Changed(name, is_delete=True)] * 200


async def test_watches_of_several_loops_are_all_told(backend: MemoryBackend) -> None:
    seen: list[WatchEvent] = []

    async def watch_there() -> None:
        async with backend.watch("db") as watch:
            await next_change(watch)
            seen.append(await next_change(watch))

    threads = [in_thread(watch_there) for _ in range(3)]
    await asyncio.to_thread(wait_until, lambda: len(backend._watchers.feeds.get("db", ())) == 3)
    await backend.set("db", "k", "v", 60)
    for thread in threads:
        await asyncio.to_thread(thread.join, 10)
    assert seen == [Changed("k")] * 3
    assert backend._watchers.feeds == {}


def test_watch_whose_loop_was_closed_is_forgotten(backend: MemoryBackend) -> None:
    async def begin() -> Watch:
        return backend.watch("db")

    watches = [asyncio.run(begin()) for _ in range(3)]
    assert len(backend._watchers.feeds["db"]) == 1
    asyncio.run(backend.set("db", "k", "v", 60))
    assert backend._watchers.feeds == {}
    assert not any(watch.is_closed for watch in watches)


async def test_loop_that_is_busy_for_long_gets_lost_instead_of_ever_more_changes(backend: MemoryBackend) -> None:
    async with backend.watch("db") as watch:
        assert await next_change(watch) == Lost()
        # A set of the memory backend never yields, so that the loop's callbacks wait.
        for i in range(MAX_QUEUED_CHANGES + 5):
            await backend.set("db", f"k{i}", "v", 60)
        (feed,) = backend._watchers.feeds["db"]
        assert len(feed.inbox) < 10
        assert await next_change(watch) == Lost()
        assert await next_change(watch) == Changed(f"k{MAX_QUEUED_CHANGES + 1}")


async def test_closed_watch_leaves_no_timer_and_nobody_who_holds_it(backend: MemoryBackend) -> None:
    watch = backend.watch("db")
    (feed,) = backend._watchers.feeds["db"]
    timer = feed.timer
    assert timer is not None
    await watch.aclose()
    assert (timer.cancelled(), backend._watchers.feeds) == (True, {})
    gone = weakref.ref(watch)
    del watch, feed, timer
    gc.collect()
    # A cancelled timer stays in the loop's heap until its time; what it called is no longer in it.
    assert gone() is None


async def test_watch_lives_on_when_the_backend_is_closed(backend: MemoryBackend) -> None:
    async with backend.watch("db") as watch:
        assert await next_change(watch) == Lost()
        await backend.aclose()
        await backend.set("db", "k", "v", 60)
        assert await next_change(watch) == Changed("k")


async def test_heartbeat_comes_after_what_was_changed_before_it(
    backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_watch, "HEARTBEAT_SECONDS", 0.02)
    async with backend.watch("db") as watch:
        assert [await anext(watch), await anext(watch), await anext(watch)] == [Lost(), Alive(), Alive()]
        await backend.set("db", "k", "v", 60)
        assert await next_change(watch) == Changed("k")
    assert HEARTBEAT_SECONDS == 2.0


async def test_namespace_without_a_watch_costs_its_writers_no_news(backend: MemoryBackend) -> None:
    async with backend.watch("db"):
        (feed,) = backend._watchers.feeds["db"]
        await backend.set("other", "k", "v", 60)
        assert (feed.inbox, feed.is_scheduled) == ([], False)
    assert not backend._watchers.feeds


async def test_watch_of_a_loop_that_goes_on_in_a_child_ends_instead_of_saying_that_it_is_well(
    backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_watch, "HEARTBEAT_SECONDS", 0.02)
    watch = backend.watch("db")
    backend._watchers.after_fork()
    await backend.set("db", "k", "v", 60)
    async with asyncio.timeout(10):
        assert [event async for event in watch] == [Lost()]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_child_of_a_fork_under_writes_has_whole_values_and_no_watches_of_its_parent(backend: MemoryBackend) -> None:
    is_over = threading.Event()

    async def write() -> None:
        i = 0
        while not is_over.is_set():
            await backend.set_many("db", [Entry(f"k{j}", str(i), 600) for j in range(20)])
            await backend.delete_many("db", [f"k{j}" for j in range(0, 20, 2)])
            i += 1

    async def begin() -> Watch:
        return backend.watch("db")

    def check() -> int:
        async def run() -> bool:
            is_alone = backend._watchers.feeds == {}
            values = await backend.get_many("db", [f"k{j}" for j in range(1, 20, 2)])
            page = await backend.scan("db")
            used = backend.usage("").entries
            await backend.set("db", "of the child", "v", 60)
            async with backend.watch("db") as watch:
                await anext(watch)
                await backend.delete("db", "of the child")
                told = await next_change(watch)
            return (
                is_alone
                and len(set(values)) == 1
                and len(page.infos) == used == len(backend._entries)
                and told == Changed("of the child", is_delete=True)
            )

        return 0 if asyncio.run(run()) else 1

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    writer = threading.Thread(target=lambda: asyncio.run(write()))
    writer.start()
    wait_until(lambda: len(backend._entries) > 0)
    try:
        codes = []
        for _ in range(20):
            child = os.fork()
            if child == 0:
                try:
                    code = check()
                except BaseException:  # noqa: BLE001 (a child must never go on as a second pytest)
                    code = 2
                os._exit(code)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    finally:
        is_over.set()
        writer.join()
        loop.close()
    assert codes == [0] * 20
