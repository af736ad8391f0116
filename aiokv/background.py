"""The process's one event loop for blocking callers, in a daemon thread that starts at the first call.

A forked child has a loop of its own, at its first call. At the end of the interpreter the loop ends as one of `asyncio.run`
does: its connections are closed.
"""

import asyncio
import atexit
import collections
import concurrent.futures
import contextlib
import logging
import os
import threading
from _thread import allocate_lock
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Make = Callable[[], Coroutine[Any, Any, T]]

logger = logging.getLogger("aiokv")

# An interpreter that ends waits no longer for what was submitted, nor for connections to be closed.
_MAX_FINISH_SECONDS = 2.0
_MAX_END_SECONDS = 10.0
_LOOK_SECONDS = 1.0


class Helper:
    """What the thread that waits for a coroutine does for it meanwhile."""

    __slots__ = ("wake",)

    wake: Callable[[], None]
    """Set by `run`, and called in the loop's thread: let the waiting thread call `work`."""

    def work(self) -> None:
        """Do what there is to be done, in the waiting thread; it may be called where there is nothing."""
        raise NotImplementedError


def run(make: Make[T], helper: Helper | None = None) -> T:
    """Run a coroutine in the background loop and wait for its end: from any thread but that of the loop.

    It runs in a copy of the caller's context variables. An exception that arrives in the waiting caller, such as
    `KeyboardInterrupt`, cancels the coroutine and is raised when that has ended; a second one is raised at once.

    Args:
        make: Make the coroutine; it is called in the loop.
        helper: What the caller's thread does for the coroutine while it waits; it gets its `wake` here.

    Returns:
        The result of the coroutine.

    Raises:
        BaseException: What the coroutine raised, or the helper. Where that is `asyncio.CancelledError` it is
            `concurrent.futures.CancelledError` here.
        RuntimeError: This is the thread of the loop, or the interpreter is ending; nothing was run.
    """
    background = _current or _start()
    if threading.get_ident() == background.ident:
        raise RuntimeError(
            "a blocking call in the thread of aiokv's event loop would wait for itself; await AsyncKVStore there"
        )
    call = _Call(make)
    if helper is not None:
        helper.wake = call.wake
    try:
        background.begin(call)
        call.ended.acquire()
        while helper is not None and not call.has_ended:
            helper.work()
            call.ended.acquire()
    except BaseException:
        # First of all, in one step that nothing interrupts: a second exception may keep the loop from being woken.
        background.left.append(call)
        background.cancel_left()
        while not call.has_ended:
            call.ended.acquire()
        raise
    error = call.error
    if error is None:
        return call.result
    # Or the call would hold the error, whose traceback holds the call.
    call.error = None
    try:
        raise error
    finally:
        del error


def submit(make: Make[T]) -> "concurrent.futures.Future[T]":
    """Run a coroutine in the background loop, and do not wait for it: from any thread, that of the loop too.

    It runs in a copy of the caller's context variables. The end of the interpreter waits for it, 2 seconds at most.

    Args:
        make: Make the coroutine; it is called in the loop.

    Returns:
        Its future; to cancel that cancels the coroutine.

    Raises:
        RuntimeError: The interpreter is ending.
    """
    background = _current or _start()
    work = background.follow(make)
    try:
        return asyncio.run_coroutine_threadsafe(work, background.loop)
    except RuntimeError:
        work.close()
        raise _ending() from None


def has_ended() -> bool:
    """Return whether the interpreter is ending, and every connection of the background loop is closed or about to be."""
    return _has_ended


class _Call(Generic[T]):
    """One coroutine that a thread waits for. All but the constructor runs in the loop's thread."""

    __slots__ = ("_make", "_task", "ended", "error", "has_begun", "has_ended", "result")

    result: T

    def __init__(self, make: Make[T]) -> None:
        self._make = make
        self._task: asyncio.Task[None] | None = None
        self.error: BaseException | None = None
        self.has_begun = self.has_ended = False
        # Released at the end, and when there is work for a helper. A lock is the cheapest thing that a thread can wait for, and
        # signals interrupt it.
        self.ended = allocate_lock()
        self.ended.acquire()

    async def work(self, calls: "set[_Call[Any]]") -> None:
        """Run the coroutine and keep its outcome."""
        self.has_begun = True
        try:
            self.result = await self._make()
        except asyncio.CancelledError:
            self.error = _ending() if _has_ended else concurrent.futures.CancelledError()
        except BaseException as error:  # noqa: BLE001 (raised in the thread that waits)
            self.error = error
        finally:
            calls.discard(self)
            self.end()

    def start(self, loop: asyncio.AbstractEventLoop, calls: "set[_Call[Any]]") -> None:
        """Begin, unless the caller has given up."""
        if not self.has_ended:
            self._task = loop.create_task(self.work(calls))

    def cancel(self) -> None:
        """Cancel, or never begin."""
        if self._task is not None:
            self._task.cancel()
        if not self.has_begun:
            self.end()

    def end(self) -> None:
        """Wake the thread that waits."""
        if not self.has_ended:
            self.has_ended = True
            self.wake()

    def wake(self) -> None:
        """Let the thread that waits look what there is."""
        if self.ended.locked():
            self.ended.release()


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that no exit of a task ends, and that looks up a host's address also after the end of the main thread."""

    def run_until_complete(self, future: Generator[Any, None, T] | Awaitable[T]) -> T:
        """Run until a future is done, also where another task ends by an exception that would end the loop; see `asyncio`."""
        awaited: asyncio.Future[T] = asyncio.ensure_future(future, loop=self)  # type: ignore[arg-type] # as asyncio itself
        while not awaited.done():
            try:
                return super().run_until_complete(awaited)
            except (SystemExit, KeyboardInterrupt) as error:
                # A function of the program raised it, and the caller for which it ran gets it.
                logger.debug("the event loop goes on after %s in one of its tasks", type(error).__name__)
        return awaited.result()

    def run_in_executor(
        self, executor: "concurrent.futures.Executor | None", func: Callable[[*Ts], T], *args: *Ts
    ) -> "asyncio.Future[T]":
        """Run a function in a thread, also when executors take no work; see `asyncio`."""
        try:
            return super().run_in_executor(executor, func, *args)
        except RuntimeError:
            if executor is not None or self.is_closed():
                raise
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        def work() -> None:
            try:
                done.set_result(func(*args))
            except BaseException as error:  # noqa: BLE001 (raised where it is awaited)
                done.set_exception(error)

        done.set_running_or_notify_cancel()
        threading.Thread(target=work, name="aiokv executor", daemon=True).start()
        return asyncio.wrap_future(done, loop=self)


class _Background:
    """A running event loop and its thread."""

    loop: asyncio.AbstractEventLoop
    ident: int | None = None

    def __init__(self) -> None:
        self._calls: set[_Call[Any]] = set()
        # Calls to be cancelled, whose threads were interrupted.
        self.left: collections.deque[_Call[Any]] = collections.deque()
        self._submitted: set[asyncio.Task[Any]] = set()
        self._leave: asyncio.Event
        self._is_leaving = self._is_looking = False
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="aiokv event loop", daemon=True)
        self._thread.start()
        self._started.result()

    def begin(self, call: _Call[Any]) -> None:
        """Hand a call over to the loop."""
        self._calls.add(call)
        try:
            self.loop.call_soon_threadsafe(self._start, call)
        except RuntimeError as error:
            self._refuse(call, error if isinstance(error, RecursionError) else None)

    def cancel_left(self) -> None:
        """Cancel the calls that were left, wherever they are; they may take some time to end."""
        try:
            self.loop.call_soon_threadsafe(self._cancel_left)
        except RecursionError:
            raise
        except RuntimeError:
            # A loop that is closed has ended its calls, or is about to.
            pass

    def _start(self, call: _Call[Any]) -> None:
        if self._is_leaving:
            # What it opened now would stay open.
            self._refuse(call)
        else:
            self._cancel_left()
            call.start(self.loop, self._calls)
            if not self._is_looking:
                self._look()

    def _look(self) -> None:
        """Cancel the calls that were left by threads that could not wake the loop; look again while there are calls."""
        self._cancel_left()
        self._is_looking = bool(self._calls)
        if self._is_looking:
            self.loop.call_later(_LOOK_SECONDS, self._look)

    def _refuse(self, call: _Call[Any], error: BaseException | None = None) -> None:
        self._calls.discard(call)
        call.error = error or _ending()
        call.end()

    def _cancel_left(self) -> None:
        while self.left:
            call = self.left.popleft()
            call.cancel()
            if call.has_ended:
                self._calls.discard(call)

    async def follow(self, make: Make[T]) -> T:
        """Run a coroutine that the end of the interpreter waits for."""
        task = asyncio.current_task()
        if self._is_leaving or task is None:
            raise _ending()
        self._submitted.add(task)
        try:
            return await make()
        finally:
            self._submitted.discard(task)

    def end(self) -> None:
        """End the loop and wait for that, not for ever."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._leave.set)
        self._thread.join(_MAX_END_SECONDS)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_Loop) as runner:
                self.loop = runner.get_loop()
                self.ident = threading.get_ident()
                runner.run(self._serve())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)
        finally:
            for call in list(self._calls):
                self._refuse(call)

    async def _serve(self) -> None:
        self._leave = asyncio.Event()
        self._started.set_result(None)
        await self._leave.wait()
        self._is_leaving = True
        if self._submitted:
            await asyncio.wait(self._submitted, timeout=_MAX_FINISH_SECONDS)


_current: _Background | None = None
_has_ended = False
# Reentrant, for handlers of signals.
_lock = threading.RLock()
# A forked child never touches what it finds, nor may the collector: the parent's loop and this one share descriptors.
_of_parents: list[_Background] = []


def _start() -> _Background:
    global _current  # noqa: PLW0603 (the one loop of the process)
    with _lock:
        if _current is None:
            if _has_ended:
                raise _ending()
            if _of_parents:
                # Children of `multiprocessing` drop what is registered before them.
                atexit.unregister(_end)
                atexit.register(_end)
            _current = _Background()
        return _current


def _ending() -> RuntimeError:
    return RuntimeError("the interpreter is ending, and aiokv has closed its connections: make this call before")


def _end() -> None:
    global _has_ended  # noqa: PLW0603 (once)
    with _lock:
        _has_ended = True
        background = _current
    if background is not None:
        background.end()


def _after_fork_in_child() -> None:
    global _current, _has_ended, _lock  # noqa: PLW0603 (a fork is the one event that changes them)
    _lock = threading.RLock()
    if _current is not None:
        _of_parents.append(_current)
    _current, _has_ended = None, False


# At the import, so that what a program registers later runs first and can still make calls.
atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
