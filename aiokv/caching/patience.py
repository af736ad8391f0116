"""A bound for many waits of one length, with one timer for all: a timer for each costs more than a look into the near cache."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class _Wait:
    """One await that may take too long."""

    __slots__ = ("cancelling", "deadline", "expired", "task")

    def __init__(self, task: "asyncio.Task[object]", deadline: float) -> None:
        self.task = task
        self.deadline = deadline
        self.cancelling = task.cancelling()
        self.expired = False


class Patience:
    """Await things in one event loop, each for the same number of seconds at most.

    Args:
        seconds: How long.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        # In the order of their deadlines, since all wait equally long.
        self._waits: dict[_Wait, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Await something; see `asyncio.timeout`, which this does the same as.

        Args:
            awaitable: What to await.

        Returns:
            Its result.

        Raises:
            TimeoutError: It took too long, and was cancelled.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("called outside a task")
        wait = _Wait(task, self._loop.time() + self._seconds)
        self._waits[wait] = None
        if self._timer is None:
            self._timer = self._loop.call_at(wait.deadline, self._tick)
        try:
            return await awaitable
        except asyncio.CancelledError as error:
            # Not where somebody else has cancelled the task meanwhile.
            if wait.expired and task.uncancel() <= wait.cancelling:
                raise TimeoutError from error
            raise
        except BaseException:
            if wait.expired:
                task.uncancel()
            raise
        finally:
            del self._waits[wait]

    def _tick(self) -> None:
        self._timer = None
        now = self._loop.time()
        for wait in self._waits:
            if wait.expired:
                continue
            if wait.deadline > now:
                self._timer = self._loop.call_at(wait.deadline, self._tick)
                break
            wait.expired = True
            wait.task.cancel()
