"""Where plain functions run: in the thread of the call that waits for the result, else in a small pool of threads.

The engine runs in the background loop and knows coroutines alone. It hands over one that never suspends, since the function in
it is a plain one, to a thread that runs it to its end.
"""

import asyncio
import collections
import contextlib
import contextvars
import functools
import inspect
import os
import queue
import threading
from asyncio import get_running_loop
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Final, TypeVar

from aiokv import background
from aiokv.caching.flights import NO_OUTCOME, Computation, Flight, active_computations, blocked_loops

T = TypeVar("T")

# How many computations behind callers run at the same time.
MAX_POOL_THREADS: Final = 4


class CallerLeftError(Exception):
    """The thread that was to run the function has left."""


class _Job:
    """One run of a plain function, from the loop to a thread and back."""

    __slots__ = ("_active", "_loop", "_work", "done", "has_begun")

    def __init__(self, work: Coroutine[Any, Any, Any], active: tuple[Computation, ...]) -> None:
        self._work = work
        self._active = active
        self._loop = get_running_loop()
        self.done: asyncio.Future[Any] = self._loop.create_future()
        self.has_begun = False

    def run(self) -> None:
        """Run the function, in its thread."""
        if self.done.done():
            return
        result: Any = None
        failed: BaseException | None = None
        token = active_computations.set(self._active)
        try:
            self.has_begun = True
            self._work.send(None)
        except StopIteration as ended:
            result = ended.value
        except Exception as error:  # noqa: BLE001 (raised in the loop)
            failed = error
        except BaseException as error:
            # It ends the caller, such as KeyboardInterrupt: others compute their own.
            failed = CallerLeftError(type(error).__name__)
            raise
        finally:
            active_computations.reset(token)
            try:
                self._loop.call_soon_threadsafe(self.end, result, failed)
            except RuntimeError as error:
                # A loop that is closed waits for nothing. A stack that is full has more room where the caller ends.
                if isinstance(error, RecursionError):
                    raise
            finally:
                del failed

    def end(self, result: object, failed: BaseException | None) -> None:
        """Let the engine go on; in the loop."""
        if self.done.done():
            return
        if failed is None:
            self.done.set_result(result)
        else:
            self.done.set_exception(failed)

    async def wait(self) -> Any:
        """Wait until the function has run, or will not run any more; in the loop."""
        try:
            return await self.done
        finally:
            if not self.has_begun:
                self._work.close()


class Caller(background.Helper):
    """One blocking call: its thread runs the function for the engine, and waits for it otherwise."""

    __slots__ = ("_handed_over", "_has_ended", "_jobs", "own", "waits_for")

    def __init__(self) -> None:
        # Stands for the call where the thread makes another one while it waits, as handlers of signals do.
        self.own = Computation(())
        # One computation of the call runs after the other, so that what one of them waits for, all of them wait for.
        self.waits_for: set[Flight] = self.own.waits_for
        self._jobs: collections.deque[_Job] = collections.deque()
        # Jobs whose end the loop does not know yet, begun or not.
        self._handed_over: dict[_Job, None] = {}
        self._has_ended = False

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine of the engine in the background loop, and here the functions that it calls.

        Args:
            make: Make the coroutine; it is called in the loop.

        Returns:
            Its result.

        Raises:
            RuntimeError: This is the thread of the background loop.
        """
        blocked: asyncio.AbstractEventLoop | None = asyncio._get_running_loop()  # noqa: SLF001 (documented for this use; `get_running_loop` raises)
        if blocked in blocked_loops:
            # By an outer call of this thread.
            blocked = None
        active, token = active_computations.get(), None
        try:
            if blocked is not None:
                blocked_loops.add(blocked)
            token = active_computations.set((*active, self.own))
            return background.run(lambda: self._serve(make, active), self)
        finally:
            if token is not None:
                active_computations.reset(token)
            if blocked is not None:
                blocked_loops.discard(blocked)

    def work(self) -> None:
        """Run what the engine has handed over, in the caller's thread."""
        while True:
            try:
                job = self._jobs.popleft()
            except IndexError:
                return
            job.run()

    async def hand_over(self, job: _Job) -> Any:
        """Have the caller's thread run a job; in the loop."""
        if self._has_ended:
            job.end(None, CallerLeftError())
        else:
            self._handed_over[job] = None
            self._jobs.append(job)
            self.wake()
        try:
            return await job.wait()
        finally:
            self._handed_over.pop(job, None)

    async def _serve(self, make: Callable[[], Coroutine[Any, Any, T]], active: tuple[Computation, ...]) -> T:
        current_caller.set(self)
        active_computations.set(active)
        self.own.task = asyncio.current_task()
        try:
            return await make()
        finally:
            self._has_ended = True
            # The thread runs nothing more that it has not begun. Where an exception has cut off a job, it may not have said so.
            self._jobs.clear()
            for job in list(self._handed_over):
                job.end(None, CallerLeftError())


class _Pool:
    """Daemon threads that compute behind callers."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[contextvars.Context, _Job, Computation]] = queue.SimpleQueue()
        self._threads = 0
        # Jobs that have not ended, those included that nobody waits for any more.
        self._wanted = 0
        self._lock = threading.Lock()

    async def hand_over(self, job: _Job, computation: Computation) -> Any:
        """Have a thread run a job in a copy of the running context; in the loop."""
        with self._lock:
            self._wanted += 1
            is_short = self._threads < min(self._wanted, MAX_POOL_THREADS)
            self._threads += is_short
        computation.is_queued = True
        self._jobs.put((contextvars.copy_context(), job, computation))
        if is_short:
            threading.Thread(target=self._work, name="aiokv refresh", daemon=True).start()
        return await job.wait()

    def _work(self) -> None:
        while True:
            context, job, computation = self._jobs.get()
            computation.is_queued = False
            # What ends a caller ends nobody here.
            with contextlib.suppress(BaseException):
                context.run(job.run)
            with self._lock:
                self._wanted -= 1
            # Or an idle thread would hold the last result.
            del context, job, computation


# The call that the running code of the engine works for; None behind callers.
current_caller: "ContextVar[Caller | None]" = ContextVar("aiokv_caller", default=None)
_pool = _Pool()


def surrounding_computation() -> Computation | None:
    """Return what the running code of the engine works for: the computation that asks, or else the blocking call."""
    if around := active_computations.get():
        return around[-1]
    caller = current_caller.get()
    return None if caller is None else caller.own


async def run_in_thread(work: Coroutine[Any, Any, T], computation: Computation) -> T:
    """Run a coroutine that never suspends in the caller's thread, or behind callers in the pool.

    Args:
        work: The coroutine.
        computation: What it is a part of.

    Returns:
        Its result.

    Raises:
        RuntimeError: Behind callers, the function has raised an exception that would end a caller, such as `SystemExit`.
        CancelledError: The caller has left. The flights of the computation have ended, and those that wait begin anew.
    """
    active = active_computations.get()
    if not active or active[-1] is not computation:
        active = (*active, computation)
    job, caller = _Job(work, active), current_caller.get()
    try:
        result: T = await (_pool.hand_over(job, computation) if caller is None else caller.hand_over(job))
    except CallerLeftError as left:
        for flight in computation.flights:
            flight.end(NO_OUTCOME)
        if caller is None:
            # It ends nobody here, but is counted and logged as other failures are.
            raise RuntimeError(f"the function raised {left} in a refresh behind callers") from None
        raise asyncio.CancelledError from None
    return result


def run_here(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends.

    Args:
        work: The coroutine.

    Returns:
        Its result.
    """
    try:
        work.send(None)
    except StopIteration as ended:
        result: T = ended.value
        return result
    raise RuntimeError("a coroutine of a plain function was suspended")


def as_coroutine_function(function: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Make a coroutine function of a plain one, which never suspends.

    Args:
        function: The plain function.

    Returns:
        A function that raises `TypeError` where the result is awaitable: it would be awaited in another loop, or never.
    """
    name = function.__qualname__

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
        except StopIteration as error:
            raise RuntimeError(f"{name} raised StopIteration, which no coroutine can pass on") from error
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise TypeError(
                f"{name} is a plain function, and returned an awaitable ({type(result).__name__}); "
                "cache a coroutine function (async def) that awaits it"
            )
        return result

    return call


def _after_fork_in_child() -> None:
    global _pool  # noqa: PLW0603 (the parent's threads do not exist in the child)
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
