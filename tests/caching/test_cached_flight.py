"""One flight per key: what concurrent callers of a cached function share, and what they cannot do to each other."""

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import caching_under_test
import pytest
from caching_under_test import WatchedBackend, Work, settle, watched_store
from helpers import FakeClock, clean_environment

from aiokv import AsyncKVStore, CachedFunction, CacheEvent, NearCache, kv_cached

watched = caching_under_test.watched
backend = caching_under_test.backend
store = caching_under_test.store
work = caching_under_test.work
hurried_threads = caching_under_test.hurried_threads
threads_store = AsyncKVStore("db", url="memory://cached-flight-threads")


@pytest.fixture(autouse=True)
async def nothing_left_pending() -> AsyncGenerator[None]:
    before = asyncio.all_tasks()
    yield
    await settle()
    assert asyncio.all_tasks() <= before | {asyncio.current_task()}  # type: ignore[arg-type]


@pytest.fixture
def numbered(store: AsyncKVStore, work: Work) -> CachedFunction[[], int]:
    @kv_cached(60, store=store, key=lambda: "one")
    async def number() -> int:
        return await work()

    return number


async def test_thousand_callers_of_a_cold_key_compute_once_and_each_gets_its_own(
    backend: WatchedBackend, store: AsyncKVStore, work: Work
) -> None:
    @kv_cached(60, store=store, key=lambda: "one")
    async def numbers() -> list[int]:
        return [await work()]

    results = await asyncio.gather(*(numbers() for _ in range(1_000)))
    assert (work.runs, backend.asked("get"), backend.asked("set")) == (1, 1, 1)
    results[0].append(99)
    assert all(result == [1] for result in results[1:])
    assert await numbers() == [1]


async def test_thousand_callers_of_a_stored_key_read_it_once_and_each_gets_its_own(
    backend: WatchedBackend, store: AsyncKVStore, work: Work
) -> None:
    @kv_cached(60, store=store, key=lambda: "one")
    async def numbers() -> list[int]:
        return [await work()]

    await numbers()
    backend.calls.clear()
    gate = backend.hold("get")
    calls = [asyncio.create_task(numbers()) for _ in range(1_000)]
    await settle()
    gate.set()
    results = await asyncio.gather(*calls)
    assert (work.runs, backend.calls) == (1, [("get", numbers.key())])
    results[0].append(99)
    assert all(result == [1] for result in results[1:])


async def test_waiters_for_a_result_that_is_not_stored_get_their_own_too(store: AsyncKVStore, work: Work) -> None:
    @kv_cached(60, store=store, key=lambda: "one", when=lambda _: False)
    async def numbers() -> list[int]:
        return [await work()]

    first, second = await asyncio.gather(numbers(), numbers())
    first.append(99)
    assert (work.runs, second) == (1, [1])


async def test_different_keys_do_not_wait_for_each_other(store: AsyncKVStore, work: Work) -> None:
    @kv_cached(60, store=store, key=lambda name: name)
    async def number(name: str) -> int:
        return await work() if name == "held" else 0

    gate = work.hold()
    held = asyncio.create_task(number("held"))
    await settle()
    assert await number("other") == 0
    gate.set()
    assert await held == 1


@pytest.mark.parametrize("phase", ["get", "computation", "set"])
async def test_cancelling_the_leader_disturbs_nobody(
    phase: str, backend: WatchedBackend, work: Work, numbered: CachedFunction[[], int]
) -> None:
    gate = work.hold() if phase == "computation" else backend.hold(phase)
    leader = asyncio.create_task(numbered())
    await settle()
    followers = [asyncio.create_task(numbered()) for _ in range(10)]
    await settle()
    leader.cancel()
    await settle()
    gate.set()
    assert await asyncio.gather(*followers) == [1] * 10
    with pytest.raises(asyncio.CancelledError):
        await leader
    assert (work.runs, work.cancelled, backend.asked("set")) == (1, 0, 1)
    assert await numbered() == 1


@pytest.mark.parametrize("phase", ["get", "computation", "set"])
async def test_cancelling_a_follower_disturbs_nobody(
    phase: str, backend: WatchedBackend, work: Work, numbered: CachedFunction[[], int]
) -> None:
    gate = work.hold() if phase == "computation" else backend.hold(phase)
    calls = [asyncio.create_task(numbered()) for _ in range(3)]
    await settle()
    calls[1].cancel()
    await settle()
    gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert (results[::2], calls[1].cancelled()) == ([1, 1], True)
    assert (work.runs, work.cancelled) == (1, 0)


async def test_last_waiter_to_leave_cancels_the_computation(work: Work, numbered: CachedFunction[[], int]) -> None:
    gate = work.hold()
    calls = [asyncio.create_task(numbered()) for _ in range(3)]
    await settle()
    for call in calls[:-1]:
        call.cancel()
    await settle()
    assert work.cancelled == 0
    calls[-1].cancel()
    await settle()
    assert work.cancelled == 1
    gate.set()
    assert await numbered() == 2
    await asyncio.gather(*calls, return_exceptions=True)


async def test_last_waiter_to_leave_ends_the_read_and_nothing_is_computed(
    backend: WatchedBackend, work: Work, numbered: CachedFunction[[], int]
) -> None:
    gate = backend.hold("get")
    calls = [asyncio.create_task(numbered()) for _ in range(3)]
    await settle()
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await settle()
    assert (work.runs, "get" in backend.cancelled) == (0, True)
    gate.set()
    assert await numbered() == 1


async def test_caller_after_the_last_waiter_left_does_not_join_the_cancelled_work(
    work: Work, numbered: CachedFunction[[], int]
) -> None:
    work.hold()
    left = asyncio.create_task(numbered())
    await settle()
    left.cancel()
    work.gate = None
    assert (await asyncio.gather(left, numbered(), return_exceptions=True))[1] == 2


async def test_write_outlives_the_last_waiter(backend: WatchedBackend, work: Work, numbered: CachedFunction[[], int]) -> None:
    gate = backend.hold("set")
    call = asyncio.create_task(numbered())
    await settle()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    gate.set()
    await settle()
    assert (await numbered(), work.runs) == (1, 1)


async def test_failure_is_everybodys_and_stored_for_nobody(
    backend: WatchedBackend, work: Work, numbered: CachedFunction[[], int]
) -> None:
    work.error = LookupError("no such city")
    results = await asyncio.gather(*(numbered() for _ in range(10)), return_exceptions=True)
    assert (work.runs, backend.asked("set")) == (1, 0)
    assert all(result is work.error for result in results)
    work.error = None
    assert await numbered() == 2


async def test_failure_after_a_waiter_left_reaches_the_others(work: Work, numbered: CachedFunction[[], int]) -> None:
    gate = work.hold()
    work.error = LookupError("no such city")
    calls = [asyncio.create_task(numbered()) for _ in range(3)]
    await settle()
    calls[0].cancel()
    gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, LookupError, LookupError]


@pytest.mark.parametrize("fails", [False, True])
async def test_call_that_was_invalidated_ends_without_touching_the_newer_entry(
    *, fails: bool, work: Work, numbered: CachedFunction[[], int]
) -> None:
    gate = work.hold()
    work.error = LookupError("old") if fails else None
    old = asyncio.create_task(numbered())
    await settle()
    await numbered.invalidate()
    work.gate, work.error = None, None
    assert await numbered() == 2
    gate.set()
    (result,) = await asyncio.gather(old, return_exceptions=True)
    assert isinstance(result, LookupError) if fails else result == 1
    await settle()
    assert (await numbered(), work.runs) == (2, 2)


@pytest.mark.parametrize("fails", [False, True])
async def test_call_that_was_invalidated_does_not_end_the_newer_flight(
    *, fails: bool, work: Work, numbered: CachedFunction[[], int]
) -> None:
    old_gate = work.hold()
    work.error = LookupError("old") if fails else None
    old = asyncio.create_task(numbered())
    await settle()
    await numbered.invalidate()
    work.error = None
    new_gate = work.hold()
    newer = asyncio.create_task(numbered())
    await settle()
    old_gate.set()
    await asyncio.gather(old, return_exceptions=True)
    joined = asyncio.create_task(numbered())
    await settle()
    new_gate.set()
    assert (await newer, await joined, work.runs) == (2, 2, 2)


async def test_invalidate_during_a_call_discards_its_write(
    backend: WatchedBackend, work: Work, numbered: CachedFunction[[], int]
) -> None:
    gate = work.hold()
    call = asyncio.create_task(numbered())
    await settle()
    await numbered.invalidate()
    gate.set()
    assert (await call, backend.asked("set"), await numbered.peek()) == (1, 0, None)


@pytest.mark.parametrize("write", ["await", "background"])
async def test_invalidate_is_not_undone_by_a_write_under_way(
    write: str, backend: WatchedBackend, store: AsyncKVStore, work: Work
) -> None:
    @kv_cached(60, store=store, key=lambda: "one", write=write)  # type: ignore[arg-type]
    async def number() -> int:
        return await work()

    gate = backend.hold("set")
    call = asyncio.create_task(number())
    await settle()
    assert backend.asked("set") == 1
    invalidation = asyncio.create_task(number.invalidate())
    await settle()
    gate.set()
    await asyncio.gather(call, invalidation)
    await number.aclose()
    assert await number.peek() is None


async def test_invalidate_is_not_undone_by_a_write_that_the_caller_did_not_wait_for(
    backend: WatchedBackend, store: AsyncKVStore, work: Work
) -> None:
    @kv_cached(60, store=store, key=lambda: "one", read_timeout=0.02)
    async def number() -> int:
        return await work()

    gate = backend.hold("set")
    assert await number() == 1
    invalidation = asyncio.create_task(number.invalidate())
    await settle()
    gate.set()
    await invalidation
    await number.aclose()
    assert await number.peek() is None


async def test_older_write_does_not_land_over_a_newer_one(backend: WatchedBackend, store: AsyncKVStore, work: Work) -> None:
    @kv_cached(60, store=store, key=lambda: "one", write="background")
    async def number() -> int:
        return await work()

    slow = backend.hold("set")
    assert await number() == 1
    await settle()
    del backend.gates["set"]
    refreshing = asyncio.create_task(number.refresh())
    await settle()
    slow.set()
    assert await refreshing == 2
    await number.aclose()
    peeked = await number.peek()
    assert peeked is not None
    assert peeked.value == 2


async def test_computation_behind_does_not_land_over_a_refresh_that_began_later(
    store: AsyncKVStore, work: Work, clock: FakeClock
) -> None:
    @kv_cached(10, store=store, key=lambda: "one", stale_while_revalidate=60)
    async def number() -> int:
        return await work()

    number._cache.clock = clock
    await number()
    clock.advance(15)
    gate = work.hold()
    assert await number() == 1
    await settle()
    assert work.runs == 2
    clock.advance(1)
    work.gate = None
    assert await number.refresh() == 3
    gate.set()
    await number.aclose()
    assert await number() == 3


async def test_writes_that_wait_for_each_other_are_given_up_on_without_a_warning(
    backend: WatchedBackend, store: AsyncKVStore, work: Work
) -> None:
    @kv_cached(60, store=store, key=lambda: "one", write="background", read_timeout=0.02)
    async def number() -> int:
        return await work()

    backend.hold("set")
    assert [await number(), await number.refresh(), await number.refresh()] == [1, 2, 3]
    await settle()
    await number.aclose()
    await number.refresh()
    await number.aclose()
    gc.collect()
    assert backend.asked("set") == 2


async def test_read_that_was_under_way_at_an_invalidation_leaves_nothing_in_the_near_cache(
    backend: WatchedBackend, store: AsyncKVStore, work: Work
) -> None:
    near = NearCache(30)

    @kv_cached(60, store=store, key=lambda: "one", near=near)
    async def number() -> int:
        return await work()

    await number()
    near.clear()
    gate = backend.hold("get")
    reader = asyncio.create_task(number())
    await settle()
    await number.invalidate()
    gate.set()
    assert await reader == 1
    assert await number() == 2


async def test_refresh_during_a_read_is_not_answered_with_what_is_stored(
    backend: WatchedBackend, work: Work, numbered: CachedFunction[[], int]
) -> None:
    await numbered()
    gate = backend.hold("get")
    reader = asyncio.create_task(numbered())
    await settle()
    refreshed = asyncio.create_task(numbered.refresh())
    await settle()
    gate.set()
    assert (await reader, await refreshed, work.runs) == (1, 2, 2)


async def test_invalidate_discards_both_a_refresh_and_the_call_that_it_overtook(
    backend: WatchedBackend, work: Work, numbered: CachedFunction[[], int]
) -> None:
    reading = backend.hold("get")
    reader = asyncio.create_task(numbered())
    await settle()
    computing = work.hold()
    refreshed = asyncio.create_task(numbered.refresh())
    await settle()
    reading.set()
    await settle()
    await numbered.invalidate()
    computing.set()
    await asyncio.gather(reader, refreshed)
    await settle()
    assert (backend.asked("set"), await numbered.peek()) == (0, None)


def _ways_back(store: AsyncKVStore) -> dict[str, Callable[[], Awaitable[int]]]:
    async def through_itself() -> int:
        return await depth("inner")

    @kv_cached(60, store=store, key=lambda: "other")
    async def through_another() -> int:
        return await depth("inner")

    async def through_gather() -> int:
        return sum(await asyncio.gather(depth("inner"), depth("inner"))) // 2

    async def through_task() -> int:
        return await asyncio.create_task(through_another())

    async def through_refresh() -> int:
        return await depth.refresh("inner")

    ways = {way.__name__: way for way in (through_itself, through_another, through_gather, through_task, through_refresh)}

    @kv_cached(60, store=store, key=lambda _: "one")
    async def depth(way: str) -> int:
        await asyncio.sleep(0)
        return 1 if way == "inner" else 1 + await ways[way]()

    return {name: (lambda name=name: depth(name)) for name in ways}  # type: ignore[misc]


@pytest.mark.parametrize("way", ["through_itself", "through_another", "through_gather", "through_task", "through_refresh"])
async def test_call_of_its_own_key_from_inside_runs_inline(way: str, store: AsyncKVStore) -> None:
    call = _ways_back(store)[way]
    async with asyncio.timeout(2):
        assert await asyncio.gather(call(), call()) == [2, 2]
        assert await call() == 2


async def test_computations_that_call_each_others_keys_do_not_wait_for_each_other(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda node, _: node)
    async def walk(node: int, depth: int) -> int:
        await asyncio.sleep(0.01)
        return depth if depth == 2 else await walk(1 - node, depth + 1)

    async with asyncio.timeout(1):
        assert await asyncio.gather(walk(0, 0), walk(1, 0)) == [2, 2]


async def test_task_that_a_computation_leaves_behind_is_cached_like_any_other(store: AsyncKVStore, work: Work) -> None:
    left: list[asyncio.Task[int]] = []
    go_on = asyncio.Event()

    @kv_cached(60, store=store, key=lambda: "one")
    async def number() -> int:
        if not left:
            left.append(asyncio.create_task(later()))
        return await work()

    async def later() -> int:
        await go_on.wait()
        return await number()

    assert await number() == 1
    go_on.set()
    assert (await left[0], work.runs) == (1, 1)


async def test_cached_function_may_be_cached_again_in_a_nearer_store(store: AsyncKVStore, work: Work) -> None:
    far_backend, far = watched_store()

    @kv_cached(60, store=store, key=lambda: "one")
    @kv_cached(3600, store=far, key=lambda: "one")
    async def number() -> int:
        return await work()

    await number()
    assert far_backend.asked("set") == 1
    await number.invalidate()
    assert (await number(), work.runs) == (1, 1)


class Tenant:
    def __init__(self, name: str, store: AsyncKVStore) -> None:
        self.name = name
        self.store = store

    @kv_cached(60, store=lambda self: self.store, ignore=("self",))
    async def greeting(self, word: str) -> str:
        await asyncio.sleep(0)
        return f"{word} {self.name}"

    @kv_cached(60, store=lambda self: self.store, ignore=("self",), near=NearCache(30))
    async def near_greeting(self, word: str) -> str:
        await asyncio.sleep(0)
        return f"{word} {self.name}"


async def test_callers_of_different_stores_share_no_flight() -> None:
    ann, bob = (Tenant(name, watched_store()[1]) for name in ("Ann", "Bob"))
    assert await asyncio.gather(ann.greeting("hello"), bob.greeting("hello")) == ["hello Ann", "hello Bob"]


async def test_callers_of_different_stores_share_no_near_result() -> None:
    ann, bob = (Tenant(name, watched_store()[1]) for name in ("Ann", "Bob"))
    assert [await ann.near_greeting("hello"), await bob.near_greeting("hello")] == ["hello Ann", "hello Bob"]


@kv_cached(60, store=threads_store)
async def square(number: int) -> int:
    await asyncio.sleep(0)
    return number * number


async def _squares(seed: int) -> None:
    for turn in range(20):
        numbers = [seed * turn + offset for offset in range(10)]
        assert await asyncio.gather(*map(square, numbers), *map(square, numbers)) == [n * n for n in numbers] * 2


def _in_threads(run: Callable[[int], None], count: int) -> list[BaseException]:
    failures: list[BaseException] = []

    def guarded(seed: int) -> None:
        try:
            run(seed)
        except BaseException as error:  # noqa: BLE001 (whatever a thread meets is reported)
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@pytest.mark.usefixtures("hurried_threads")
def test_loops_in_several_threads_share_a_function_at_once() -> None:
    def run(seed: int) -> None:
        for _ in range(3):
            asyncio.run(_squares(seed), debug=False)

    assert _in_threads(run, 8) == []


@pytest.mark.usefixtures("hurried_threads")
def test_loop_never_gets_the_flights_of_another() -> None:
    async def look() -> None:
        first = square._cache.call("key", (), {}).state
        for turn in range(3_000):
            if turn % 500 == 0:
                await asyncio.sleep(0)
            assert square._cache.call("key", (), {}).state is first

    def run(_: int) -> None:
        for _ in range(3):
            asyncio.run(look(), debug=False)

    assert _in_threads(run, 8) == []


SCRIPT = """
import asyncio, logging
from aiokv import AsyncKVStore, kv_cached
store = AsyncKVStore("db", url="memory://script")

@kv_cached(60, store=store, write="background", stale_while_revalidate=60)
async def slow(fails):
    try:
        await asyncio.sleep(0.05)
    except asyncio.CancelledError:
        if fails == "in its clean-up":
            raise ValueError("clean-up")
        raise
    if fails:
        raise LookupError("failed")
    return 1

async def leave(fails, count=3):
    calls = [asyncio.create_task(slow(fails)) for _ in range(count)]
    await asyncio.sleep(0.01)
    for call in calls:
        call.cancel()
    return await asyncio.gather(*calls, return_exceptions=True)
"""


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("asyncio.run(leave(False))", id="everybody leaves"),
        pytest.param("asyncio.run(leave('in its clean-up'))", id="everybody leaves and the clean-up fails"),
        pytest.param(
            """
            async def main():
                await asyncio.gather(*(slow(True) for _ in range(3)), return_exceptions=True)
            asyncio.run(main())
            """,
            id="everybody fails",
        ),
        pytest.param(
            """
            async def main():
                calls = [asyncio.create_task(slow(True)) for _ in range(3)]
                await asyncio.sleep(0.01)
            asyncio.run(main())
            """,
            id="the loop ends during a computation",
        ),
        pytest.param(
            """
            async def main():
                await slow(False)
            asyncio.run(main())
            asyncio.run(main())
            """,
            id="the loop ends during a write",
        ),
        pytest.param(
            """
            class Held:
                def __init__(self, backend): self.backend = backend
                def __getattr__(self, name): return getattr(self.backend, name)
                async def set(self, *_): await asyncio.sleep(60)
            import aiokv.backends.registry
            from aiokv.backends.memory import MemoryBackend
            aiokv.backends.registry._memory_backends["script"] = Held(MemoryBackend())
            async def main():
                await slow(False)
                await slow.refresh(False)
            asyncio.run(main())
            import gc; gc.collect()
            """,
            id="the loop ends while a write waits for another",
        ),
        pytest.param(
            """
            async def main():
                await slow(False)
                slow._cache.clock = lambda: __import__("time").time() + 90
                await slow(False)
            asyncio.run(main())
            """,
            id="the loop ends during a refresh behind",
        ),
        pytest.param(
            """
            from aiokv import RetryPolicy
            dead = AsyncKVStore("db", url="http://127.0.0.1:1", credentials="id:secret", retry=RetryPolicy.none())
            @kv_cached(60, store=dead)
            async def one(number):
                return number
            logging.disable()
            async def main():
                assert await asyncio.gather(*map(one, range(10))) == list(range(10))
            asyncio.run(main())
            asyncio.run(main())
            """,
            id="the loop ends while a dead store is probed",
        ),
    ],
)
def test_exit_leaves_no_warning(body: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", SCRIPT + textwrap.dedent(body) + "\nprint('done')\n"],
        capture_output=True,
        text=True,
        timeout=18,
        env=clean_environment(tmp_path),
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


class Interruption(BaseException):
    """What no `except Exception` catches."""


async def test_observer_that_interrupts_a_miss_leaves_nobody_waiting(store: AsyncKVStore, work: Work) -> None:
    interruptions = [Interruption()]

    def observer(event: CacheEvent) -> None:
        if event.kind == "miss" and interruptions:
            raise interruptions.pop()

    @kv_cached(60, store=store, key=lambda: "one", observer=observer)
    async def number() -> int:
        return await work()

    async with asyncio.timeout(5):
        with pytest.raises(Interruption):
            await number()
        assert await number() == 1


async def test_computation_that_everybody_left_and_that_goes_on_is_not_stored(
    backend: WatchedBackend, store: AsyncKVStore
) -> None:
    ended = asyncio.Event()

    @kv_cached(60, store=store, key=lambda: "one")
    async def stubborn() -> int:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await ended.wait()
        return 1

    call = asyncio.create_task(stubborn())
    await settle()
    call.cancel()
    await settle()
    await stubborn.invalidate()
    ended.set()
    await settle()
    assert (backend.asked("set"), await stubborn.peek()) == (0, None)


class Handle:
    """What JSON cannot hold."""

    def __init__(self) -> None:
        self.users: list[str] = []


class Uncopyable(Handle):
    def __deepcopy__(self, memo: object) -> "Uncopyable":
        raise LookupError


@pytest.mark.parametrize("kind", [Handle, Uncopyable])
async def test_waiters_for_what_json_cannot_hold_get_copies_where_that_can_be(
    kind: type[Handle], store: AsyncKVStore, work: Work
) -> None:
    @kv_cached(60, store=store, key=lambda: "one", when=lambda _: False, returns=Any)
    async def handle() -> Handle:
        await work()
        return kind()

    async def used(name: str) -> Handle:
        got = await handle()
        got.users.append(name)
        return got

    handles = await asyncio.gather(*map(used, "abc"))
    if kind is Handle:
        assert [got.users for got in handles] == [["a"], ["b"], ["c"]]
    else:
        assert len(set(map(id, handles))) == 1
    assert work.runs == 1
