"""One flight per key: whoever asks while a result is being fetched waits for that fetch, and nobody can spoil it for others."""

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any, NamedTuple

# The computations that this code is a part of, the innermost last.
active_flights: "ContextVar[tuple[Flight, ...]]" = ContextVar("aiokv_active_flights", default=())


class Outcome(NamedTuple):
    """What a flight brings: JSON that each waiter decodes for itself, or an object where there is none."""

    payload: bytes | str | None
    value: Any = None


class Flight:
    """A fetch that is under way: first a read by the task that began it, then, where that finds nothing, a computation."""

    __slots__ = ("_flights", "_read", "_waiters", "_waiting_for", "discarded", "key", "overtaken", "refreshes", "task")

    def __init__(self, flights: "dict[str, Flight]", key: str) -> None:
        self._flights = flights
        self._read: asyncio.Future[Outcome | None] | None = None
        self._waiters = 0
        self.key = key
        self.task: asyncio.Task[Outcome] | None = None
        # Not to be joined any more, nor stored. Other threads set these two, and touch nothing else.
        self.discarded = False
        # By another event loop, which cannot order its own writes after those of this one: they are removed again.
        self.overtaken = False
        # Whether it was asked to compute, whatever is stored.
        self.refreshes = False
        # The flights that this one's computation waits for at the moment.
        self._waiting_for: set[Flight] | None = None
        flights[key] = self

    @property
    def has_waiters(self) -> bool:
        """Whether somebody still has to take the outcome."""
        return self._waiters > 0

    def overtake(self) -> None:
        """Keep this flight, which may be another thread's, from being joined and stored."""
        # In this order: who finds it discarded is to know why.
        self.overtaken = True
        self.discarded = True

    def end(self, payload: bytes | str | None = None) -> None:
        """End the read: give its waiters the JSON that it found, or None to let them begin anew."""
        self.leave_map()
        if self._read is not None and not self._read.done():
            self._read.set_result(None if payload is None else Outcome(payload))

    def fail(self, error: BaseException) -> None:
        """End the read with an error that is every waiter's; where its task was cancelled, they begin anew."""
        if not isinstance(error, Exception):
            self.end()
            return
        self.leave_map()
        if self._read is not None and not self._read.done():
            self._read.set_exception(error)
            # Its waiters may have left.
            self._read.exception()

    def leave_map(self) -> None:
        """Let the next call of the key begin a flight of its own; by identity, since another may have taken the place."""
        if self._flights.get(self.key) is self:
            del self._flights[self.key]

    def compute(self, work: Coroutine[Any, Any, Outcome]) -> None:
        """Begin the computation, in a task of its own that outlives any one waiter."""
        self.task = asyncio.create_task(work, name=f"aiokv {self.key}")
        self.task.add_done_callback(self._landed)
        if self._read is not None and not self._read.done():
            self._read.set_result(None)

    def waits_for_this_code(self) -> bool:
        """Say whether to wait for this flight would be to wait for oneself, at once or through other flights."""
        around = active_flights.get()
        if not around:
            return False
        seen: set[Flight] = set()
        ahead: list[Flight] = [self]
        while ahead:
            flight = ahead.pop()
            if flight in around:
                return True
            if flight not in seen:
                seen.add(flight)
                ahead.extend(flight._waiting_for or ())  # noqa: SLF001 (of this class)
        return False

    async def join(self) -> Outcome | None:
        """Wait for the outcome; None says to begin anew. The last waiter to leave cancels the computation."""
        self._waiters += 1
        around = active_flights.get()
        waiting_for: set[Flight] | None = None
        if around:
            innermost = around[-1]
            if innermost._waiting_for is None:  # noqa: SLF001 (of this class)
                innermost._waiting_for = set()  # noqa: SLF001 (likewise)
            waiting_for = innermost._waiting_for  # noqa: SLF001 (likewise)
            waiting_for.add(self)
        try:
            if self.task is None:
                if self._read is None:
                    self._read = asyncio.get_running_loop().create_future()
                outcome = await asyncio.shield(self._read)
                if outcome is not None or self.task is None:
                    return outcome
            return await asyncio.shield(self.task)
        finally:
            if waiting_for is not None:
                waiting_for.discard(self)
            self._waiters -= 1
            if self._waiters == 0 and self.task is not None and not self.task.done():
                self.leave_map()
                # Where the function goes on in spite of that, nobody can reach what it brings.
                self.discarded = True
                self.task.cancel()

    def _landed(self, task: "asyncio.Task[Outcome]") -> None:
        self.leave_map()
        if not task.cancelled():
            # Where everybody has left, nobody else looks at it.
            task.exception()
