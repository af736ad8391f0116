"""What a blocking caller gets from the background loop, in every thread and process, and when it is interrupted."""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable, Generator

import pytest
from caching_under_test import in_child
from helpers import wait_until

from aiokv import background

number: contextvars.ContextVar[int] = contextvars.ContextVar("number", default=0)


class Sleeper:
    """A coroutine that waits until it is cancelled, and then as long as a test wants."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.is_cancelled = threading.Event()
        self.may_end = threading.Event()
        self.has_ended = threading.Event()

    async def sleep(self) -> None:
        self.has_begun.set()
        try:
            await asyncio.sleep(3_600)
        except asyncio.CancelledError:
            self.is_cancelled.set()
            while not self.may_end.is_set():
                await asyncio.sleep(0.001)
            self.has_ended.set()
            raise


@contextlib.contextmanager
def in_thread(act: Callable[[], object]) -> Generator[None]:
    thread = threading.Thread(target=act)
    thread.start()
    yield
    thread.join()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


async def answer() -> int:
    await asyncio.sleep(0)
    return 42


def check_answer() -> None:
    assert background.run(answer) == 42


def test_result_is_handed_over() -> None:
    assert background.run(answer) == 42


def test_error_is_the_very_object_and_nothing_keeps_it() -> None:
    class ShortLivedError(Exception):
        pass

    async def fail() -> None:
        raise ShortLivedError

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ShortLivedError) as caught:
            background.run(fail)
        kept = weakref.ref(caught.value)
        del caught
        # The loop's thread may still be in the last step of the task.
        wait_until(lambda: kept() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_exit_that_a_coroutine_raises_reaches_its_caller_and_leaves_the_loop_alone(kind: type[BaseException]) -> None:
    async def leave() -> None:
        raise kind

    with pytest.raises(kind):
        background.run(leave)
    assert background.run(answer) == 42


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_exit_that_a_task_of_a_coroutine_raises_reaches_its_caller_and_leaves_the_loop_running(
    kind: type[BaseException],
) -> None:
    async def leave() -> None:
        raise kind

    async def wait() -> None:
        await asyncio.create_task(leave())

    sleeper = Sleeper()
    other = background.submit(sleeper.sleep)
    assert sleeper.has_begun.wait(10)
    with pytest.raises(kind):
        background.run(wait)
    assert background.run(answer) == 42
    assert not sleeper.is_cancelled.is_set()
    sleeper.may_end.set()
    other.cancel()
    assert sleeper.has_ended.wait(10)


def test_coroutine_that_cancels_itself_is_an_ordinary_error_for_its_caller() -> None:
    async def give_up() -> None:
        raise asyncio.CancelledError

    with pytest.raises(concurrent.futures.CancelledError):
        background.run(give_up)


def test_coroutine_sees_the_variables_of_its_caller_and_changes_only_its_own() -> None:
    async def change() -> int:
        seen = number.get()
        number.set(3)
        return seen

    number.set(2)
    assert background.run(change) == 2
    assert background.submit(change).result() == 2
    assert number.get() == 2


def test_all_threads_share_one_loop() -> None:
    async def loop() -> int:
        await asyncio.sleep(0)
        return id(asyncio.get_running_loop())

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert len(set(pool.map(lambda _: background.run(loop), range(1_000)))) == 1


async def test_call_works_where_a_loop_runs() -> None:
    assert background.run(answer) == 42


def test_call_in_the_loop_itself_is_refused_at_once() -> None:
    async def nested() -> int:
        return background.run(answer)

    with pytest.raises(RuntimeError, match="would wait for itself; await AsyncKVStore there"):
        background.run(nested)
    assert background.run(answer) == 42


def test_submitted_coroutine_runs_beside_its_caller_and_is_cancelled_with_its_future() -> None:
    sleeper = Sleeper()
    sleeper.may_end.set()
    future = background.submit(sleeper.sleep)
    assert sleeper.has_begun.wait(10)
    assert future.cancel()
    assert sleeper.has_ended.wait(10)
    assert background.submit(answer).result(10) == 42


def test_submitting_from_the_loop_is_allowed() -> None:
    async def submit() -> "concurrent.futures.Future[int]":
        return background.submit(answer)

    assert background.run(submit).result(10) == 42


def test_interrupt_cancels_the_coroutine_and_waits_for_its_end() -> None:
    sleeper = Sleeper()

    def act() -> None:
        assert sleeper.has_begun.wait(10)
        interrupt()
        assert sleeper.is_cancelled.wait(10)
        sleeper.may_end.set()

    with in_thread(act), pytest.raises(KeyboardInterrupt):
        background.run(sleeper.sleep)
    assert sleeper.has_ended.is_set()


def test_second_interrupt_is_raised_though_the_coroutine_goes_on() -> None:
    sleeper = Sleeper()

    def act() -> None:
        assert sleeper.has_begun.wait(10)
        interrupt()
        assert sleeper.is_cancelled.wait(10)
        interrupt()

    with in_thread(act), pytest.raises(KeyboardInterrupt):
        background.run(sleeper.sleep)
    assert not sleeper.has_ended.is_set()
    sleeper.may_end.set()
    assert sleeper.has_ended.wait(10)


def test_call_is_cancelled_though_a_second_interrupt_comes_before_the_loop_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = Sleeper()

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    def act() -> None:
        assert sleeper.has_begun.wait(10)
        interrupt()

    monkeypatch.setattr(background._Background, "cancel_left", interrupted)
    with in_thread(act), pytest.raises(KeyboardInterrupt):
        background.run(sleeper.sleep)
    sleeper.may_end.set()
    assert sleeper.has_ended.wait(10)


def test_interrupt_before_the_coroutine_began_ends_the_call_without_it() -> None:
    began = []

    async def begin() -> None:
        began.append(1)

    async def hold_the_loop() -> None:
        current = background._current
        assert current is not None

        def is_ready(name: str) -> bool:
            # A copy, since the caller's thread adds to it meanwhile.
            return name in repr(list(current.loop._ready))  # type: ignore[attr-defined] # of asyncio

        is_held.set()
        wait_until(lambda: is_ready("_start"))
        interrupt()
        wait_until(lambda: is_ready("_cancel"))

    is_held = threading.Event()
    holding = background.submit(hold_the_loop)
    assert is_held.wait(10)
    with pytest.raises(KeyboardInterrupt):
        background.run(begin)
    holding.result(10)
    assert began == []
    assert background.run(answer) == 42


def test_call_that_is_cancelled_before_it_began_never_begins() -> None:
    began = []

    async def begin() -> None:
        began.append(1)

    async def cancel_first(when: str) -> bool:
        call = background._Call(begin)
        loop = asyncio.get_running_loop()
        if when == "before its start":
            call.cancel()
            call.start(loop, set())
        else:
            call.start(loop, set())
            call.cancel()
        await asyncio.sleep(0.01)
        return call.ended.acquire(timeout=5)

    for when in ("before its start", "before its first step"):
        assert background.run(lambda when=when: cancel_first(when))  # type: ignore[misc]
    assert began == []


def test_child_of_a_fork_has_a_loop_of_its_own_and_the_parent_keeps_its() -> None:
    async def name() -> tuple[int, int]:
        return os.getpid(), threading.get_ident()

    mine = background.run(name)

    def use() -> None:
        assert background.run(name)[0] == os.getpid()
        assert background.run(answer) == 42

    assert in_child(use) == 0
    assert background.run(name) == mine


def test_child_does_not_wait_for_a_lock_that_a_thread_of_its_parent_holds() -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with background._lock:
            held.set()
            release.wait(10)

    with in_thread(hold):
        assert held.wait(10)
        try:
            assert in_child(check_answer) == 0
        finally:
            release.set()


def test_child_that_is_forked_while_threads_call_works() -> None:
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            background.run(answer)

    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(in_thread(call))
        stack.callback(stop.set)
        assert [in_child(check_answer) for _ in range(5)] == [0] * 5
