"""Cached plain functions in many threads: one computation for each key, whoever leaves, and nobody waits for ever."""

import asyncio
import contextlib
import ctypes
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from caching_under_test import MovedTime, OtherLoop, WatchedBackend
from plain_under_test import begin, in_background, results, wait_until

from aiokv import AsyncKVStore, NearCache, background, kv_cached, kv_cached_many
from aiokv.caching import callers
from aiokv.caching.flights import active_computations, blocked_loops

THREADS = 32


class Source:
    """A plain computation that a test holds up; it counts runs and remembers their threads."""

    def __init__(self) -> None:
        self.value: Any = 1
        self.threads: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    @property
    def runs(self) -> int:
        return len(self.threads)

    def read(self) -> int:
        self.threads.append(threading.get_ident())
        # Short waits, so that an exception can arrive in this thread.
        while not self.gate.wait(0.005):
            pass
        if isinstance(self.value, Exception):
            raise self.value
        return int(self.value)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def cached(store: AsyncKVStore, source: Source) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        given: dict[str, Any] = {"store": store, "key": lambda: "one", "prefix": "source", "version": 1, "early": 0.0}
        return kv_cached(60, **{**given, **options})(source.read)

    return make


@pytest.fixture(autouse=True)
def nobody_is_blocked() -> Iterator[None]:
    yield
    assert not blocked_loops


class Leave(BaseException):
    """As KeyboardInterrupt, in a thread that is not the main one."""


def interrupt(ident: int) -> None:
    """Let an exception arrive in a thread that runs Python code."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Leave)) == 1


def joined(read: Any, count: int) -> None:
    """Wait until so many calls have joined another."""
    wait_until(lambda: read.info().joined >= count)


@pytest.mark.usefixtures("hurried_threads")
@pytest.mark.parametrize("near", [None, NearCache(60)], ids=["store", "near"])
def test_many_threads_compute_once(cached: Callable[..., Any], source: Source, near: NearCache | None) -> None:
    read = cached(near=near)
    source.gate.clear()
    calls = [begin(read) for _ in range(THREADS)]
    joined(read, THREADS - 1)
    source.gate.set()
    assert results(calls) == [1] * THREADS
    assert source.runs == 1


@pytest.mark.usefixtures("hurried_threads")
def test_all_threads_get_the_error_of_the_one_computation(cached: Callable[..., Any], source: Source) -> None:
    read = cached()
    source.value = OSError("down")
    source.gate.clear()
    calls = [begin(read) for _ in range(THREADS)]
    joined(read, THREADS - 1)
    source.gate.set()
    assert [str(call.exception(15)) for call in calls] == ["down"] * THREADS
    assert source.runs == 1


def test_both_kinds_compute_once(cached: Callable[..., Any], source: Source, store: AsyncKVStore) -> None:
    read = cached()

    @kv_cached(60, store=store, key=lambda: "one", prefix="source", version=1, early=0.0)
    async def awaited() -> int:
        runs.append(1)
        await gate.wait()
        return 5

    runs: list[int] = []
    gate = asyncio.Event()
    source.gate.clear()
    first = begin(read)
    wait_until(lambda: source.runs == 1)
    second = begin(lambda: asyncio.run(awaited()))
    wait_until(lambda: awaited.info().misses == 1)
    time.sleep(0.02)
    source.gate.set()
    assert (results([first, second]), runs) == ([1, 1], [])

    read.invalidate()

    async def lead() -> int:
        computing = asyncio.create_task(awaited())
        while not runs:
            await asyncio.sleep(0)
        follower = asyncio.create_task(asyncio.to_thread(read))
        while read.info().misses < 2:
            await asyncio.sleep(0.001)
        gate.set()
        assert await follower == 5
        return await computing

    assert (asyncio.run(lead()), source.runs) == (5, 1)


def test_computation_of_another_kind_that_fails_is_not_this_ones_error(cached: Callable[..., Any], store: AsyncKVStore) -> None:
    read = cached()

    @kv_cached(60, store=store, key=lambda: "one", prefix="source", version=1, early=0.0)
    async def awaited() -> int:
        await asyncio.to_thread(wait_until, lambda: read.info().misses == 1)
        raise OSError("down")

    failing = begin(lambda: asyncio.run(awaited()))
    wait_until(lambda: awaited.info().misses == 1)
    assert begin(read).result(15) == 1
    assert str(failing.exception(15)) == "down"


@pytest.mark.usefixtures("hurried_threads")
def test_threads_whose_arguments_change_compute_their_own(store: AsyncKVStore) -> None:
    runs: list[int] = []
    barrier = threading.Barrier(4, timeout=10)

    @kv_cached(60, store=store, key=lambda items: items)
    def total(items: list[int]) -> int:
        runs.append(threading.get_ident())
        items.append(len(runs))
        return len(items)

    def call() -> int:
        barrier.wait()
        return total([1])

    assert results([begin(call) for _ in range(4)]) == [2] * 4
    assert len(set(runs)) == 4


def test_leader_that_leaves_hands_the_key_to_one_that_waits(cached: Callable[..., Any], source: Source) -> None:
    read = cached()
    source.gate.clear()
    leader = begin(read)
    wait_until(lambda: source.runs == 1)
    others = [begin(read) for _ in range(8)]
    joined(read, 8)
    interrupt(source.threads[0])
    assert isinstance(leader.exception(15), Leave)
    wait_until(lambda: source.runs == 2)
    source.gate.set()
    assert results(others) == [1] * 8
    assert (source.runs, source.threads[1] != source.threads[0]) == (2, True)


def test_last_one_to_leave_leaves_nothing_behind(cached: Callable[..., Any], source: Source, store: AsyncKVStore) -> None:
    read = cached()
    source.gate.clear()
    leader = begin(read)
    wait_until(lambda: source.runs == 1)
    interrupt(source.threads[0])
    assert isinstance(leader.exception(15), Leave)
    assert asyncio.run(store.get(read.key())) is None
    source.gate.set()
    assert (read(), source.runs) == (1, 2)


def test_exception_that_ends_a_program_is_not_shared(store: AsyncKVStore) -> None:
    order: list[str] = []
    started = threading.Event()

    @kv_cached(60, store=store, key=lambda: "one")
    def leave() -> int:
        order.append(threading.current_thread().name)
        if len(order) > 1:
            return 7
        started.set()
        joined(leave, 1)
        raise SystemExit(3)

    first = begin(leave)
    assert started.wait(10)
    second = begin(leave)
    assert isinstance(first.exception(15), SystemExit)
    assert (second.result(15), len(order)) == (7, 2)


def test_leader_that_cannot_say_that_it_has_left_hands_the_key_on(
    cached: Callable[..., Any], source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = cached()
    source.gate.clear()
    leader = begin(read)
    wait_until(lambda: source.runs == 1)
    other = begin(read)
    joined(read, 1)

    end = callers._Job.end

    def interrupted(*given: Any) -> Any:
        if threading.get_ident() == source.threads[0]:
            raise Leave
        return end.__get__(given[0])

    # As if an exception came where the thread says that its function has ended, and another one after that.
    monkeypatch.setattr(callers._Job, "end", property(interrupted))
    monkeypatch.setattr(background._Background, "cancel_left", interrupted)
    interrupt(source.threads[0])
    assert isinstance(leader.exception(15), Leave)
    monkeypatch.undo()
    source.gate.set()
    assert (other.result(15), source.runs) == (1, 2)


def test_leader_that_leaves_while_the_store_is_asked(cached: Callable[..., Any], backend: WatchedBackend) -> None:
    read = cached(read_timeout=30.0)
    gate = backend.hold("get")
    ident: list[int] = []

    def call() -> int:
        ident.append(threading.get_ident())
        return int(read())

    leader = begin(call)
    wait_until(lambda: backend.asked("get") == 1)
    follower = begin(read)
    joined(read, 1)
    # A thread in a lock gets its exception when it runs again.
    interrupt(ident[0])
    in_background(gate.set)
    assert follower.result(15) == 1
    with contextlib.suppress(Leave):
        assert leader.result(15) == 1


@pytest.mark.timeout(20)
@pytest.mark.parametrize("way", ["itself", "by another function", "by a batch"])
def test_handler_of_a_signal_may_ask_for_what_its_thread_waits_for(
    cached: Callable[..., Any], backend: WatchedBackend, store: AsyncKVStore, way: str
) -> None:
    read = cached(read_timeout=30.0)

    @kv_cached(60, store=store, key=lambda: "another")
    def another() -> int:
        return int(read())

    @kv_cached_many(60, store=store, key=lambda ids: ids)
    def batch(ids: list[str]) -> dict[str, int]:
        return {id_: read() for id_ in ids}

    ways = {"itself": read, "by another function": another, "by a batch": lambda: batch(["a"])["a"]}
    gate = backend.hold("get")
    answers: list[int] = []

    def handle(*_: object) -> None:
        # What the handler itself reads is not held up.
        in_background(backend.gates.clear)
        answers.append(ways[way]())
        in_background(gate.set)

    def ask() -> None:
        wait_until(lambda: backend.asked("get") == 1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        asking = begin(ask)
        assert read() == 1
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (asking.result(10), answers, active_computations.get()) == (None, [1], ())


@pytest.mark.usefixtures("hurried_threads")
def test_threads_that_want_each_others_keys_do_not_wait_for_ever(store: AsyncKVStore) -> None:
    barrier = threading.Barrier(2, timeout=10)
    runs: list[str] = []

    @kv_cached(60, store=store, key=lambda name, _: name, prefix="each")
    def one(name: str, other: Any) -> str:
        runs.append(name)
        if len(runs) <= 2:
            barrier.wait()
        return name if len(runs) > 4 else f"{name}{other(other.__name__, one)[:1]}"

    @kv_cached(60, store=store, key=lambda name, _: name, prefix="other")
    def two(name: str, other: Any) -> str:
        runs.append(name)
        if len(runs) <= 2:
            barrier.wait()
        return name if len(runs) > 4 else f"{name}{other(other.__name__, two)[:1]}"

    assert results([begin(one, "one", two), begin(two, "two", one)]) == ["onet", "twoo"]


def test_batches_of_a_call_may_want_each_others_ids(store: AsyncKVStore) -> None:
    asked: list[list[int]] = []

    @kv_cached_many(60, store=store, key=lambda n: n, batch_size=1)
    def following(ids: list[int]) -> dict[int, int]:
        asked.append(ids)
        return {n: 0 if n >= 5 else following([n + 1])[n + 1] + 1 for n in ids}

    assert begin(following, [1, 2, 3, 4, 5]).result(15) == {1: 4, 2: 3, 3: 2, 4: 1, 5: 0}  # type: ignore[comparison-overlap]


def test_call_that_waits_for_a_batch_behind_another_is_found_out(store: AsyncKVStore) -> None:
    """The second batch of one thread waits for its first, which waits for another thread, which wants the second."""
    started, asked = threading.Event(), threading.Event()

    @kv_cached_many(60, store=store, key=lambda n: n, batch_size=1, prefix="batches")
    def numbers(ids: list[int]) -> dict[int, int]:
        if ids == [1] and not started.is_set():
            started.set()
            assert asked.wait(10)
            return {1: other(1)}
        return dict.fromkeys(ids, 7)

    @kv_cached(60, store=store, key=lambda n: n, prefix="other")
    def other(n: int) -> int:
        assert started.wait(10)
        asked.set()
        # Long enough for the first batch to wait for this.
        time.sleep(0.05)
        return numbers([2])[2] + n

    two = begin(other, 1)
    one = begin(numbers, [1, 2])
    assert results([one, two]) == [{1: 8, 2: 7}, 8]


def test_refreshes_behind_callers_that_call_each_other_never_block_the_pool(store: AsyncKVStore, moved_time: MovedTime) -> None:
    count = 3 * callers.MAX_POOL_THREADS
    barrier = threading.Barrier(callers.MAX_POOL_THREADS, timeout=10)
    options: dict[str, Any] = {"store": store, "key": lambda n: n, "stale_while_revalidate": 600, "early": 0.0}
    refreshing = threading.Event()

    @kv_cached(60, **options, prefix="leaf")
    def leaf(n: int) -> int:
        return n + refreshing.is_set()

    @kv_cached(60, **options, prefix="branch")
    def branch(n: int) -> int:
        if refreshing.is_set():
            # Every thread of the pool is here at once, and wants what the pool has yet to refresh.
            barrier.wait()
            return sum(leaf(one) for one in range(count)) + n
        return n

    for n in range(count):
        leaf(n)
        branch(n)
    moved_time.advance(61)
    refreshing.set()
    assert [branch(n) for n in range(count)] == list(range(count))
    wait_until(lambda: branch.info().computations == 2 * count)
    branch.close()
    leaf.close()
    assert threading.active_count() < 60


def test_refresh_that_waits_for_a_thread_is_not_waited_for_by_those_that_hold_the_threads(
    store: AsyncKVStore, moved_time: MovedTime
) -> None:
    count = callers.MAX_POOL_THREADS
    began, ready = threading.Semaphore(0), threading.Event()
    options: dict[str, Any] = {"store": store, "key": lambda n: n, "stale_while_revalidate": 600, "early": 0.0}
    main = threading.get_ident()

    @kv_cached(60, **options, prefix="leaf")
    def leaf(n: int) -> int:
        return n

    @kv_cached(60, **options, prefix="branch")
    def branch(n: int) -> int:
        if threading.get_ident() != main:
            began.release()
            assert ready.wait(10)
            return leaf(n)
        return n

    for n in range(count):
        branch(n)
        leaf(n)
    moved_time.advance(61)
    for n in range(count):
        branch(n)
    for _ in range(count):
        assert began.acquire(timeout=10)
    # Every thread of the pool is busy: the refreshes of the leaves have to wait, and their entries go meanwhile.
    for n in range(count):
        leaf(n)
    wait_until(lambda: callers._pool._jobs.qsize() == count)
    for n in range(count):
        asyncio.run(store.delete(leaf.key(n)))
    ready.set()
    wait_until(lambda: branch.info().computations == 2 * count)
    branch.close()
    leaf.close()


def test_no_more_threads_refresh_than_the_pool_has(store: AsyncKVStore, moved_time: MovedTime) -> None:
    running: set[int] = set()
    most: list[int] = []
    first = threading.get_ident()

    @kv_cached(60, store=store, key=lambda n: n, stale_while_revalidate=600, early=0.0)
    def slow(n: int) -> int:
        if threading.get_ident() != first:
            running.add(threading.get_ident())
            most.append(len(running))
            time.sleep(0.005)
            running.discard(threading.get_ident())
        return n

    for n in range(20):
        slow(n)
    moved_time.advance(61)
    for n in range(20):
        slow(n)
    wait_until(lambda: slow.info().computations == 40)
    assert 1 < max(most) <= callers.MAX_POOL_THREADS
    slow.close()


def test_loop_that_a_plain_call_blocks_is_not_waited_for(store: AsyncKVStore, other_loop: OtherLoop) -> None:
    """A coroutine's loop is blocked by a plain call, whose function wants what that loop was computing."""
    options: dict[str, Any] = {"store": store, "prefix": "shared", "version": 1, "key": lambda: "one"}

    @kv_cached(60, **options)
    async def awaited() -> int:
        began.set()
        await asyncio.sleep(30)
        return 1

    @kv_cached(60, **options)
    def plain() -> int:
        return 2

    @kv_cached(60, store=store, key=lambda: "outer")
    def outer() -> int:
        return begin(plain).result(15)  # type: ignore[no-any-return]

    async def block() -> int:
        return outer()

    began = threading.Event()
    computing = other_loop.begin(awaited())
    assert began.wait(10)
    assert other_loop.begin(block()).result(15) == 2
    computing.cancel()


@pytest.mark.usefixtures("hurried_threads")
def test_results_are_never_older_than_the_last_invalidation(store: AsyncKVStore) -> None:
    versions = [0, 0]

    @kv_cached(60, store=store, key=lambda: "one", near=NearCache(30))
    def version() -> int:
        return versions[0]

    def reader() -> int:
        turns = 0
        while not stop.is_set():
            least = versions[1]
            assert version() >= least
            turns += 1
        return turns

    stop = threading.Event()
    reading = [begin(reader) for _ in range(4)]
    for number in range(1, 20):
        versions[0] = number
        version.invalidate()
        versions[1] = number
        assert version() >= number
    stop.set()
    assert all(results(reading))


@pytest.mark.slow
@pytest.mark.usefixtures("hurried_threads")
def test_random_calls_of_functions_that_call_each_other_all_end(store: AsyncKVStore) -> None:
    options: dict[str, Any] = {"store": store, "version": 1, "key": lambda n: n, "when": lambda _: draw() < 0.3}
    draw = random.Random(1).random
    end = time.monotonic() + 4.0

    def nested(depth: int) -> None:
        if draw() < 0.02:
            raise OSError("some calls fail")
        for _ in range(int(draw() * 2.4) if depth else 0):
            n = int(draw() * 8)
            if draw() < 0.5:
                assert word(n) == f"word {n}"
            else:
                assert words([n, n + 1, n + 2]) == {k: f"words {k}" for k in (n, n + 1, n + 2)}

    @kv_cached(60, **options, prefix="word")
    def word(n: int) -> str:
        nested(n % 4)
        return f"word {n}"

    @kv_cached_many(60, **options, prefix="words", batch_size=1)
    def words(ids: list[int]) -> dict[int, str]:
        nested(ids[0] % 4)
        return {n: f"words {n}" for n in ids}

    def work() -> int:
        calls = 0
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                nested(1)
                word(int(draw() * 8))
            if draw() < 0.05:
                word.invalidate(int(draw() * 8))
            calls += 1
        return calls

    threads: list[Future[Any]] = [begin(work) for _ in range(THREADS)]
    assert sum(results(threads)) > THREADS


def test_close_leaves_calls_in_the_foreground_their_results(cached: Callable[..., Any], source: Source) -> None:
    read = cached(read_timeout=0.05)
    source.gate.clear()
    calls = [begin(read) for _ in range(3)]
    wait_until(lambda: source.runs == 1)
    joined(read, 2)
    begin(read.close).result(10)
    assert not any(call.done() for call in calls)
    source.gate.set()
    assert results(calls) == [1] * 3
    assert (source.runs, read.peek().value) == (1, 1)


def test_function_that_closes_its_cache_gets_its_result_and_waits_for_nothing(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda: "one", read_timeout=3600.0)
    def read() -> int:
        read.close()
        return 4

    assert begin(read).result(10) == 4


def test_exception_that_ends_a_refresh_in_the_background_is_counted(store: AsyncKVStore, moved_time: MovedTime) -> None:
    runs: list[int] = []

    @kv_cached(10, store=store, key=lambda: "one", stale_while_revalidate=60, early=0.0)
    def read() -> int:
        runs.append(1)
        if len(runs) > 1:
            raise SystemExit(3)
        return 4

    assert read() == 4
    moved_time.advance(20.0)
    assert read() == 4
    wait_until(lambda: read.info().background_errors == 1)
