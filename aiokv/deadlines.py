"""One timer for many waits of one length: a timer for each would cost as much as a twelfth of a request.

A wait may begin where a coroutine suspends for the first time: what answers at once needs no deadline.
"""

import asyncio
import types
from asyncio import current_task
from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

# A loop that is this late has stood still: its program blocked it, or its machine did not run it.
_STANDSTILL_SECONDS = 0.1
_MAX_GRACE_SECONDS = 1.0


class Alarm:
    """A function that is called after the time of a shared deadline, unless the alarm is stopped before.

    Args:
        deadline: The shared deadline.
        ring: The function.
    """

    __slots__ = ("_deadline", "has_rung", "ring")

    def __init__(self, deadline: "SharedDeadline", ring: Callable[[], None]) -> None:
        self._deadline = deadline
        self.ring = ring
        self.has_rung = False
        deadline.watch_for(self, 0)

    def stop(self) -> None:
        """Do not ring any more."""
        self._deadline.waiting.pop(self, None)


class SharedDeadline:
    """Deadlines of one event loop that all lie the same number of seconds ahead.

    Where the loop stood still meanwhile, what has come is taken first: waits go on for as long again, a second at most.

    Args:
        seconds: How many.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.loop = asyncio.get_running_loop()
        # Each with its moment, in the order of these, since all wait equally long. Of a task also how many others had
        # asked it to end when its wait began.
        self.waiting: dict[asyncio.Task[Any] | Alarm, tuple[float, int]] = {}
        self._expired: dict[asyncio.Task[Any], int] = {}
        self._is_watching = False

    def begin(self) -> "asyncio.Task[Any] | None":
        """Bound what the running task waits for from now on, as `asyncio.timeout` does, until `end`.

        Returns:
            The running task, for `end`; None where it is bound already, as by a store that calls a cached function itself.
        """
        task = current_task(self.loop)
        if task is None:
            raise RuntimeError("a wait can be bounded inside a task only")
        if task in self.waiting:
            return None
        self.watch_for(task, task.cancelling())
        return task

    def end(self, task: "asyncio.Task[Any] | None") -> bool:
        """End a bound.

        Args:
            task: What `begin` returned.

        Returns:
            Whether the wait was cancelled because it took too long, and nobody else has cancelled the task.
        """
        if task is None or self.waiting.pop(task, None) is not None:
            return False
        cancelling = self._expired.pop(task, None)
        return cancelling is not None and task.uncancel() <= cancelling

    def expire(self) -> None:
        """End every wait in the loop's next turn, as if its time were over."""
        # Not now: the running task may be one of them, and a task that cancels itself is cancelled wherever it waits next.
        self.loop.call_soon(self._expire)

    def _expire(self) -> None:
        while self.waiting:
            waiting = next(iter(self.waiting))
            self._end_wait(waiting, self.waiting.pop(waiting)[1])

    def watch_for(self, waiting: "asyncio.Task[Any] | Alarm", cancelling: int) -> None:
        """Let a wait begin."""
        moment = self.loop.time() + self.seconds
        self.waiting[waiting] = (moment, cancelling)
        if not self._is_watching:
            self._is_watching = True
            self.loop.call_at(moment, self._watch, moment)

    def _watch(self, due: float | None) -> None:
        """End what takes too long, and look again when the next wait may do so; None where a standstill is over."""
        now = self.loop.time()
        if due is not None and now - due > _STANDSTILL_SECONDS:
            self.loop.call_later(min(now - due, _MAX_GRACE_SECONDS), self._watch, None)
            return
        self._is_watching = False
        while self.waiting:
            waiting, (moment, cancelling) = next(iter(self.waiting.items()))
            if moment > now:
                self._is_watching = True
                self.loop.call_at(moment, self._watch, moment)
                break
            del self.waiting[waiting]
            self._end_wait(waiting, cancelling)

    def _end_wait(self, waiting: "asyncio.Task[Any] | Alarm", cancelling: int) -> None:
        if isinstance(waiting, Alarm):
            waiting.has_rung = True
            waiting.ring()
        else:
            self._expired[waiting] = cancelling
            waiting.cancel()


class Bound:
    """A bound on what the running task waits for, as a context that raises `TimeoutError` where it is late.

    Args:
        deadline: The shared deadline.
    """

    __slots__ = ("_deadline", "_task")

    def __init__(self, deadline: SharedDeadline) -> None:
        self._deadline = deadline

    def __enter__(self) -> None:
        self._task = self._deadline.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._deadline.end(self._task) and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from error


@types.coroutine
def go_on(work: Coroutine[Any, Any, T], suspended: Any) -> Generator[Any, Any, T]:
    """Await a coroutine whose first step has been taken, by `work.send(None)`.

    Args:
        work: The coroutine.
        suspended: What that step returned.

    Returns:
        The result of the coroutine.
    """
    try:
        while True:
            try:
                sent = yield suspended
            except BaseException as error:  # noqa: BLE001 (the coroutine's)
                suspended = work.throw(error)
            else:
                suspended = work.send(sent)
    except StopIteration as done:
        result: T = done.value
        return result
