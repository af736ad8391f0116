"""A watch: the bounded queue between a backend that learns of changes and the task that reads them."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Self

from aiokv import clock
from aiokv.record import Record

MAX_QUEUED_CHANGES: Final = 10_000
"""Most changes that wait for a reader; beyond them all are dropped for one `Lost`."""

HEARTBEAT_SECONDS: Final = 2.0
"""Longest silence of a watch that is well: an `Alive` comes at least this often, give or take how late the loop is."""


_WARNING_SECONDS: Final = 60.0


class Changed(NamedTuple):
    """A key was set or deleted."""

    key: str
    is_delete: bool = False


class Lost(Record):
    """Changes before this one may be missing: what was read from the store earlier may be outdated. Later ones come."""


class Alive(Record):
    """Every change that was committed more than `HEARTBEAT_SECONDS` ago has been told."""


WatchEvent = Changed | Lost | Alive


class Watch:
    """A stream of `Changed`, `Lost` and `Alive`, read by one task of the loop that it was made in.

    Its producer calls `notify` in that loop. It never waits for the reader: where too much is queued, `Lost` takes its place.

    Args:
        on_close: Called once when the watch is closed or fails, in its loop; it must not raise.
        max_queued: Most changes that wait.
    """

    def __init__(self, on_close: Callable[["Watch"], None] | None = None, max_queued: int = MAX_QUEUED_CHANGES) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_close = on_close
        self._max_queued = max_queued
        self._queued: deque[WatchEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._is_closed = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of its reader."""
        return self._loop

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will come."""
        return self._is_closed

    def notify(self, event: WatchEvent) -> None:
        """Queue an event; called in the watch's loop.

        Args:
            event: The event; nothing happens where the watch is closed.
        """
        if self._is_closed:
            return
        queued = self._queued
        if isinstance(event, Lost):
            # What is queued is older than the loss: a reader that takes Lost forgets all that anyway.
            queued.clear()
        elif isinstance(event, Alive):
            if queued and isinstance(queued[-1], Alive):
                return
        elif len(queued) >= self._max_queued:
            queued.clear()
            event = Lost()
        queued.append(event)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """End the watch: its reader gets the queued events and then the error.

        Args:
            error: Why nothing more will come.
        """
        if not self._is_closed:
            self._error = error
            self._end()

    async def aclose(self) -> None:
        """End the watch; safe to call twice."""
        self.close()

    def close(self) -> None:
        """End the watch without waiting: its reader gets `StopAsyncIteration`."""
        if not self._is_closed:
            self._queued.clear()
            self._end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchEvent:
        while not self._queued:
            if self._is_closed:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                raise StopAsyncIteration
            if self._waiter is not None:
                raise RuntimeError("two tasks read one watch; give each its own")
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._queued.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _end(self) -> None:
        self._is_closed = True
        self._wake()
        if self._on_close is not None:
            self._on_close(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Absence:
    """Warns of servers that a watch waits for and that have never told it anything; at most once a minute.

    Args:
        logger: Gets the lines.
        host: Names the servers, without a secret.
    """

    def __init__(self, logger: logging.Logger, host: str) -> None:
        self._logger = logger
        self._host = host
        self._next_at = float("-inf")

    def warn(self, reason: str) -> None:
        """Log a warning, where there was none a short time ago.

        Args:
            reason: Why nothing has come; without a value or a secret.
        """
        now = clock.monotonic()
        if now >= self._next_at:
            self._next_at = now + _WARNING_SECONDS
            self._logger.warning("a watch has had nothing from %s yet: %s; it goes on trying", self._host, reason)
