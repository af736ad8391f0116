"""Hedged reads: where an answer takes longer than nearly all do, ask a second time, and take what comes first.

Source: Dean, Barroso, "The Tail at Scale", CACM 56(2), 2013.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from aiokv import telemetry
from aiokv.errors import CallError

R = TypeVar("R")

logger = logging.getLogger("aiokv")

_WINDOW_ANSWERS = 500
# Before that many answers, nothing is known of the rest.
_LEAST_ANSWERS = 20
_ANSWERS_BETWEEN_LOOKS = 20
# What may be saved up for a moment in which many answers are late.
_MAX_CREDIT = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HedgePolicy:
    """Say when a read is sent a second time, on another connection; the first answer wins, the loser is cancelled.

    Args:
        quantile: The share of recent answers that came sooner than a read has to wait for that, above 0 and below 1.
        max_extra: How many second requests there may be for each read, above 0 to 1.
        min_wait: Seconds below which no read is late.
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
    """Know how long answers take, and hedge what takes longer; belongs to one event loop and one host.

    Args:
        policy: When to hedge, and how often at most.
    """

    def __init__(self, policy: HedgePolicy) -> None:
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        self._answers: deque[float] = deque(maxlen=_WINDOW_ANSWERS)
        self._until_look = _LEAST_ANSWERS
        self._credit = 0.0
        # Those that were too late: held until their cancellation is through.
        self._losers: set[asyncio.Task[Any]] = set()
        self.wait_seconds: float | None = None

    async def first_of(
        self, send: Callable[[], Coroutine[Any, Any, R]], *, is_good: Callable[[R], bool], may_hedge: Callable[[], bool]
    ) -> R:
        """Send a read, and once more where it is late.

        Args:
            send: Sends it.
            is_good: Whether an answer is worth not waiting for the other one.
            may_hedge: Whether there is room for a second request now.

        Returns:
            The good answer that came first; where there is none, that to the first request.

        Raises:
            CallError: The first request failed, and so did the second, if there was one.
        """
        self._credit = min(self._credit + self._policy.max_extra, _MAX_CREDIT)
        started = self._loop.time()
        if self.wait_seconds is None:
            result = await send()
            self._note(self._loop.time() - started)
            return result
        first = asyncio.create_task(send(), name="aiokv read")
        tasks = [first]
        try:
            await asyncio.wait(tasks, timeout=self.wait_seconds)
            if not first.done() and self._credit >= 1.0 and may_hedge():
                self._credit -= 1.0
                after_seconds = self._loop.time() - started
                logger.debug("asking a second time after %.3f s", after_seconds)
                telemetry.hedged(after_seconds)
                tasks.append(asyncio.create_task(send(), name="aiokv hedged read"))
            result = await (first if len(tasks) == 1 else _first_good(tasks, is_good))
        finally:
            for task in tasks:
                if task.done():
                    self._lost(task)
                else:
                    task.cancel()
                    self._losers.add(task)
                    task.add_done_callback(self._lost)
        # Where the second one won, the first would have taken at least that long.
        self._note(self._loop.time() - started)
        return result

    async def aclose(self) -> None:
        """Wait until every loser is gone."""
        if self._losers:
            await asyncio.wait(list(self._losers))

    def _lost(self, task: "asyncio.Task[Any]") -> None:
        self._losers.discard(task)
        if not task.cancelled():
            # Looked at, or it would be reported as one that nobody has seen.
            task.exception()

    def _note(self, seconds: float) -> None:
        self._answers.append(seconds)
        self._until_look -= 1
        if self._until_look <= 0:
            self._until_look = _ANSWERS_BETWEEN_LOOKS
            late = sorted(self._answers)[int(len(self._answers) * self._policy.quantile)]
            self.wait_seconds = max(late, self._policy.min_wait)


async def _first_good(tasks: "list[asyncio.Task[R]]", is_good: Callable[[R], bool]) -> R:
    """Give the first good result; where there is none, what the first one came to."""
    waiting = set(tasks)
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task in done and not isinstance(task.exception(), CallError) and is_good(task.result()):
                return task.result()
    return tasks[0].result()
