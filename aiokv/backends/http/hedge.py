"""Hedged reads: a read that takes longer than nearly all others is sent a second time, and the first answer wins.

Source: Dean, Barroso, "The Tail at Scale", CACM 56(2), 2013.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from aiokv import telemetry
from aiokv.errors import CallError
from aiokv.record import Record

R = TypeVar("R")

logger = logging.getLogger("aiokv")

_WINDOW_ANSWERS = 500
# Fewer answers than this say nothing about the latency.
_LEAST_ANSWERS = 20
_ANSWERS_BETWEEN_UPDATES = 20
# The second requests that may be saved up for a moment in which many answers are late.
_MAX_CREDIT = 10.0


class HedgePolicy(Record, kw_only=True):
    """When a read is sent a second time, on another connection; the first answer wins, the other request is cancelled.

    Args:
        quantile: Latency quantile of recent reads after which a second request is sent, above 0 and below 1, such as 0.95.
        max_extra: Second requests for each read on average, above 0, at most 1.
        min_wait: Seconds before which no second request is sent.
    """

    quantile: float = 0.95
    max_extra: float = 0.05
    min_wait: float = 0.001

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must be above 0 and below 1, not {self.quantile!r}")
        if not 0 < self.max_extra <= 1:
            raise ValueError(f"max_extra must be above 0, at most 1, not {self.max_extra!r}")
        if not self.min_wait >= 0:
            raise ValueError(f"min_wait must be 0 seconds or more, not {self.min_wait!r}")


class Hedger:
    """The latencies of one host in one event loop, and the second requests that they lead to.

    Args:
        policy: When to send a second request, and how often at most.
    """

    def __init__(self, policy: HedgePolicy) -> None:
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        self._answers: deque[float] = deque(maxlen=_WINDOW_ANSWERS)
        self._until_update = _LEAST_ANSWERS
        self._credit = 0.0
        # Requests that lost, held until their cancellation is complete.
        self._losers: set[asyncio.Task[Any]] = set()
        self.wait_seconds: float | None = None

    async def first_of(
        self, send: Callable[[], Coroutine[Any, Any, R]], *, is_good: Callable[[R], bool], may_hedge: Callable[[], bool]
    ) -> R:
        """Send a read, and a second time where it is late.

        Args:
            send: Sends the read.
            is_good: Return whether an answer makes the other one needless.
            may_hedge: Return whether the pool has room for a second request now.

        Returns:
            The first good answer; where there is none, the answer to the first request.

        Raises:
            CallError: The first request failed, and so did the second, if there was one.
        """
        self._credit = min(self._credit + self._policy.max_extra, _MAX_CREDIT)
        started = self._loop.time()
        if self.wait_seconds is None:
            result = await send()
            self._record(self._loop.time() - started)
            return result
        first = asyncio.create_task(send(), name="aiokv read")
        tasks = [first]
        try:
            await asyncio.wait(tasks, timeout=self.wait_seconds)
            if not first.done() and self._credit >= 1.0 and may_hedge():
                self._credit -= 1.0
                after_seconds = self._loop.time() - started
                logger.debug("sending a read a second time after %.3f s", after_seconds)
                telemetry.hedged(after_seconds)
                tasks.append(asyncio.create_task(send(), name="aiokv hedged read"))
            result = await (first if len(tasks) == 1 else _first_good(tasks, is_good))
        finally:
            for task in tasks:
                if task.done():
                    self._drop(task)
                else:
                    task.cancel()
                    self._losers.add(task)
                    task.add_done_callback(self._drop)
        # Where the second request won, the first one would have taken at least that long.
        self._record(self._loop.time() - started)
        return result

    async def aclose(self) -> None:
        """Wait until every request that lost has ended."""
        if self._losers:
            await asyncio.wait(list(self._losers))

    def _drop(self, task: "asyncio.Task[Any]") -> None:
        self._losers.discard(task)
        if not task.cancelled():
            # Retrieved, or asyncio would report an exception that was never retrieved.
            task.exception()

    def _record(self, seconds: float) -> None:
        self._answers.append(seconds)
        self._until_update -= 1
        if self._until_update <= 0:
            self._until_update = _ANSWERS_BETWEEN_UPDATES
            late = sorted(self._answers)[int(len(self._answers) * self._policy.quantile)]
            self.wait_seconds = max(late, self._policy.min_wait)


async def _first_good(tasks: "list[asyncio.Task[R]]", is_good: Callable[[R], bool]) -> R:
    """Return the first good result; where there is none, the result of the first task."""
    waiting = set(tasks)
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task in done and not isinstance(task.exception(), CallError) and is_good(task.result()):
                return task.result()
    return tasks[0].result()
