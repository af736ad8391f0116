"""One flight per key: what concurrent callers of a cached function share, and what they cannot do to each other."""

import asyncio
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from caching_under_test import WatchedBackend, Work, settle, watched_store
from helpers import clean_environment

from aiokv import AsyncKVStore, CachedFunction, CacheEvent, NearCache, kv_cached

threads_store = AsyncKVStore("db", url="memory://cached-flight-threads")


pytestmark = pytest.mark.usefixtures("nothing_left_pending")


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
    # An eager task of the other caller would come before this one has left.
    await asyncio.sleep(0)
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
    assert [(type(result), result.args) for result in results] == [(LookupError, ("no such city",))] * 10
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
        first = square._cache.flights_of(threads_store)
        assert first.access.loop is asyncio.get_running_loop()
        for turn in range(3_000):
            if turn % 500 == 0:
                await asyncio.sleep(0)
            assert square._cache.flights_of(threads_store) is first

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
                # It waits for a store that hangs, which is logged.
                logging.disable()
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
                import aiokv.clock, time
                aiokv.clock.now = lambda: time.time() + 90
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
            marks=pytest.mark.slow,
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
    # On a busy machine asyncio's debug mode logs steps that took long.
    errors = [line for line in done.stderr.splitlines() if not re.match(r"Executing <.*> took [\d.]+ seconds$", line)]
    assert (done.stdout, errors, done.returncode) == ("done\n", [], 0)


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
