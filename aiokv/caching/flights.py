"""One flight for each key: callers that ask for a result while it is being fetched wait for it, and none can spoil it."""

import asyncio
import contextlib
import os
import weakref
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, TypeVar

from aiokv.caching.access import StoreAccess
from aiokv.caching.error_copies import copy_error
from aiokv.caching.generations import Generations, Place
from aiokv.caching.near import MISSED
from aiokv.caching.results import ResultCodec
from aiokv.store import AsyncKVStore
from aiokv.target import Target

# The computations that this code is a part of, the innermost last.
active_computations: "ContextVar[tuple[Computation, ...]]" = ContextVar("aiokv_active_computations", default=())

# Loops whose thread waits in a blocking call: what they compute does not come before the end of that.
blocked_loops: set[AbstractEventLoop] = set()

T = TypeVar("T")

_LOOK_SECONDS = 0.25


class Call(NamedTuple):
    """One call of a cached function.

    Args:
        key: The key, as the arguments were when it was made.
        is_settled: Whether the arguments cannot change.
        args: The positional arguments.
        kwargs: The keyword arguments.
        id_position: Where in `args` the id stands, for a function of many ids.
    """

    key: str
    is_settled: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    id_position: int = 0


class Outcome(NamedTuple):
    """What a flight has brought.

    Args:
        json: The result, to be decoded by each caller; None where there is only an object.
        value: The object; for an error, its traceback.
        error: What the caller that began the flight gets in its place.
        own: A copy for the caller that began the flight, which spares it decoding one.
        kind: `"private"` is for the caller that began the flight alone; the others begin anew, as all do after `"none"`.
            `"absent"` says that an id has no result.
        joined: The error as it was, which the others get copies of; None where there are no others.
    """

    json: bytes | str | None = None
    value: Any = None
    error: BaseException | None = None
    own: Any = MISSED
    kind: Literal["shared", "private", "none", "absent"] = "shared"
    joined: BaseException | None = None


NO_OUTCOME = Outcome(kind="none")
ABSENT = Outcome(kind="absent")


def failure(error: BaseException) -> Outcome:
    """Return the outcome of a failed flight.

    Args:
        error: What it failed with.
    """
    # With its traceback as it is now: each caller that raises it would add its own to that of the others.
    return Outcome(value=error.__traceback__, error=error)


class Flight:
    """The fetch of one key that is under way: first a read of the store, then, if that finds nothing, a computation.

    Args:
        flights: Those that it belongs to.
        store: The store of the caller that began it.
        call: The call that began it.
        generation: The generation that it belongs to.
        index: Which of its caller's calls it is for.
        is_decisive: Whether it replaces what is stored whatever that is: a refresh or a prime.
    """

    # Most flights end without these.
    is_decisive = False
    outcome: Outcome | None = None
    computation: "Computation | None" = None
    # The computation, or the blocking call, whose code reads the store for this flight.
    reader: "Computation | None" = None
    # How many callers want the outcome.
    interest = 1
    _waiters: "dict[asyncio.Future[None], None] | None" = None
    _on_end: list[Callable[[], None]] | None = None

    def __init__(  # noqa: PLR0913, PLR0917 (one for each hit, so by position)
        self,
        flights: "Flights",
        store: AsyncKVStore,
        call: Call,
        generation: int,
        index: int = 0,
        is_decisive: bool = False,  # noqa: FBT001, FBT002 (likewise)
    ) -> None:
        self.flights = flights
        self.store = store
        self.call = call
        self.place: Place = (flights.target, call[0])
        self.generation = generation
        self.index = index
        if is_decisive:
            self.is_decisive = True

    @property
    def is_begun(self) -> bool:
        """Whether the function runs for it, or has run."""
        return self.computation is not None and not self.computation.is_queued

    def may_land(self, generations: Generations) -> bool:
        """Return whether the result may still be stored and kept."""
        if self.is_decisive:
            return generations.is_latest(self.place, self.generation)
        return generations.is_current(self.place, self.generation)

    def end(self, outcome: Outcome) -> None:
        """Let the callers go on, and the next call begin a flight of its own; a second end is ignored."""
        if self.outcome is not None:
            return
        if outcome.error is not None and self.interest > 1:
            # A copy as it is now: each caller that raises its own changes the context, and may add notes.
            outcome = outcome._replace(joined=copy_error(outcome.error))
        flights = self.flights
        flights.remove(self)
        if flights.computed.get(self.call[0]) is self:
            flights.computed.pop(self.call[0], None)
        self.outcome = outcome
        if self._waiters is not None:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
        if self._on_end is not None:
            for notify in self._on_end:
                notify()

    async def wait(self) -> Outcome:
        """Wait for the outcome."""
        if self.outcome is None:
            waiter = self.flights.access.loop.create_future()
            if self._waiters is None:
                self._waiters = {}
            self._waiters[waiter] = None
            try:
                await waiter
            finally:
                del self._waiters[waiter]
        return self.outcome or NO_OUTCOME

    def cancel(self) -> "asyncio.Task[Any] | None":
        """Cancel the computation unless somebody wants it; return its task if it has been cancelled."""
        computation = self.computation
        if computation is None or computation.is_uncancellable or computation.task is None:
            return None
        if any(flight.interest for flight in computation.flights):
            return None
        for flight in computation.flights:
            # Where the function goes on in spite of the cancellation, nobody gets what it brings.
            flight.end(NO_OUTCOME)
        computation.task.cancel()
        return computation.task

    async def wait_from_elsewhere(self) -> Outcome:
        """Wait for the outcome from outside the flight's own `Flights`; no outcome where waiting for it has no end."""
        here, its_loop = get_running_loop(), self.flights.access.loop
        ended = here.create_future()

        def set_ended() -> None:
            if not ended.done():
                ended.set_result(None)

        def notify() -> None:
            # The loop that waits may have ended.
            with contextlib.suppress(RuntimeError):
                here.call_soon_threadsafe(set_ended)

        def join() -> None:
            self.interest += 1
            if self.outcome is not None:
                notify()
            elif self._on_end is None:
                self._on_end = [notify]
            else:
                self._on_end.append(notify)

        try:
            its_loop.call_soon_threadsafe(join)
        except RuntimeError:
            return NO_OUTCOME
        try:
            while not ended.done() and is_running(its_loop) and not waits_for_itself(self, active_computations.get()):
                await asyncio.wait([ended], timeout=_LOOK_SECONDS)
        finally:
            with contextlib.suppress(RuntimeError):
                its_loop.call_soon_threadsafe(leave_all, [self])
        return NO_OUTCOME if self.outcome is None else self.outcome


class Computation:
    """One run of the function, for one flight or several.

    Args:
        flights: Whose results it computes.
        waits_for: What the code waits for that it runs in; computations that run one after the other in one thread share it.
    """

    __slots__ = ("flights", "is_queued", "is_uncancellable", "task", "waits_for")

    def __init__(self, flights: Sequence[Flight], waits_for: set[Flight] | None = None) -> None:
        self.flights = flights
        self.task: asyncio.Task[Any] | None = None
        # Once results are being written, and behind callers.
        self.is_uncancellable = False
        # Whether a thread has yet to begin with it.
        self.is_queued = False
        self.waits_for: set[Flight] = set() if waits_for is None else waits_for
        for flight in flights:
            flight.computation = self


class Flights:
    """The flights of one function to one target in one event loop, and its tasks.

    Args:
        access: The way to the store.
        computed: Flights of all loops of the process whose callers wait for a computation, at this prefix and target.
        results: Turns the results of the function into JSON and back.
    """

    def __init__(self, access: StoreAccess, computed: dict[str, Flight], results: ResultCodec) -> None:
        self.access = access
        self.results = results
        self.target = access.target
        self.computed = computed
        self.by_key: dict[str, Flight] = {}
        # Computations behind callers. A call that finds nothing to serve joins them.
        self.background: dict[str, Flight] = {}
        # Each with the flights whose callers wait for it.
        self.tasks: dict[asyncio.Task[Any], Sequence[Flight]] = {}
        self.writes_behind = 0
        access.users.add(self)

    @property
    def is_idle(self) -> bool:
        """Whether to forget these flights would lose nothing."""
        return not self.by_key and not self.tasks and self.access.is_idle

    def agree_with(self, others: "Flights") -> bool:
        """Return whether others are of the same function, or of one whose results are stored alike."""
        if others.results is self.results:
            return True
        with contextlib.suppress(Exception):
            # Else the computation tells what is wrong with the annotation.
            self.results.resolve()
            others.results.resolve()
            return self.results.schema == others.results.schema
        return False

    def remove(self, flight: Flight) -> None:
        """Let the next call of the key begin a flight of its own."""
        key = flight.call[0]
        # By identity: another flight may have taken the place.
        if self.by_key.get(key) is flight:
            del self.by_key[key]
        elif self.background and self.background.get(key) is flight:
            del self.background[key]

    def run(self, work: Coroutine[Any, Any, T], name: str, batch: Sequence[Flight] = ()) -> "asyncio.Task[T]":
        """Run a coroutine in a task of its own, which outlives any one caller, and ends these flights at the latest."""
        task = self.access.loop.create_task(work, name=name)
        # With eager tasks it may have ended already.
        if task.done():
            return task
        self.tasks[task] = batch

        def ended(task: "asyncio.Task[T]") -> None:
            self.tasks.pop(task, None)
            for flight in batch:
                # Where the task was cancelled before it began; any other has ended them.
                flight.end(NO_OUTCOME)
            if batch and not task.cancelled():
                task.exception()  # The callers have it: it is not to be logged.

        task.add_done_callback(ended)
        return task

    async def aclose(self, grace_seconds: float) -> bool:
        """Wait for the tasks some seconds, then cancel those that no caller waits for; return whether none are left."""
        deadline, around = get_running_loop().time() + grace_seconds, {one.task for one in active_computations.get()}
        # Round by round: what is computed is written after that. Those that this is called from would wait for themselves.
        while (tasks := self.tasks.keys() - around) and (left := deadline - get_running_loop().time()) > 0:
            await asyncio.wait(tasks, timeout=left)
        while late := [task for task, batch in self.tasks.items() if task not in around and not any(map(_is_awaited, batch))]:
            # Callers that have joined a refresh in the background begin anew.
            for flight in set(self.background.values()).difference(*self.tasks.values()):
                flight.end(NO_OUTCOME)
            for task in late:
                task.cancel()
            await asyncio.wait(late)
        if self.tasks:
            return False
        self.access.users.discard(self)
        if not self.access.users:
            await self.access.breaker.aclose()
        return True


def _is_awaited(flight: Flight) -> bool:
    return flight.computation is not None and flight.outcome is None and flight.interest > 0


def leave_all(flights: Iterable[Flight]) -> "list[asyncio.Task[Any]]":
    """Give up waiting.

    Args:
        flights: For what.

    Returns:
        The computations that this has cancelled.
    """
    cancelled = []
    for flight in flights:
        flight.interest -= 1
        if flight.outcome is None and not flight.interest and (task := flight.cancel()) is not None:
            cancelled.append(task)
    return cancelled


def waits_for_itself(flight: Flight, around: Sequence[Computation]) -> bool:
    """Return whether to wait for a flight would be to wait for the running code, at once or through other flights.

    Args:
        flight: The flight.
        around: The computations that the running code is a part of.
    """
    if not around:
        return False
    seen: set[Flight] = set()
    ahead = [flight]
    while ahead:
        flight = ahead.pop()
        computation = flight.computation or flight.reader
        if computation is None or flight in seen:
            continue
        if any(computation.waits_for is one.waits_for for one in around):
            return True
        seen.add(flight)
        ahead.extend(computation.waits_for)
    return False


def is_running(loop: AbstractEventLoop) -> bool:
    """Return whether a loop goes on: it runs, and its thread does not wait in a blocking call."""
    return loop.is_running() and loop not in blocked_loops


def is_elsewhere(flight: Flight, flights: Flights) -> bool:
    """Return whether a flight is one of another loop that runs, or of another function with the same results.

    Args:
        flight: The flight.
        flights: Those of the running loop.
    """
    return flight.flights is not flights and is_running(flight.flights.access.loop)


class ComputedFlights(dict[Target, dict[str, Flight]]):
    """For each target, the flights of one prefix, in all loops of the process, whose callers wait for a computation."""


_by_prefix: "weakref.WeakValueDictionary[str, ComputedFlights]" = weakref.WeakValueDictionary()


def computed_flights_of(prefix: str) -> ComputedFlights:
    """Return the flights of a prefix: a coroutine function and a plain one may share it, and then compute once."""
    return _by_prefix.setdefault(prefix, ComputedFlights())


if hasattr(os, "register_at_fork"):
    # The flights of the parent never end in its child.
    os.register_at_fork(after_in_child=_by_prefix.clear)
