"""What is under way for one cached function: flights, writes and background tasks, of each event loop and store."""

import asyncio
import contextlib
import os
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple

from aiokv.backends.registry import identity_of
from aiokv.caching.breaker import Breaker
from aiokv.caching.flight import Flight
from aiokv.caching.patience import Patience
from aiokv.errors import AioKVError
from aiokv.store import AsyncKVStore


class Writing:
    """A write or a delete that has not landed yet, the flight whose result it writes, and what it waits for itself."""

    __slots__ = ("flight", "previous", "task")

    def __init__(self, task: "asyncio.Task[None]", flight: Flight | None, previous: "Writing | None") -> None:
        self.task = task
        self.flight = flight
        self.previous = previous

    def unfinished(self) -> "Iterator[Writing]":
        """Give this one and those before it; any thread may ask."""
        writing: Writing | None = self
        while writing is not None:
            if not writing.task.done():
                yield writing
            writing = writing.previous


class StoreState:
    """What is under way in one event loop with one store."""

    def __init__(self, breaker: Breaker) -> None:
        self.breaker = breaker
        self.flights: dict[str, Flight] = {}
        # Computations behind callers, which nobody waits for as long as there is something to serve.
        self.behind: dict[str, Flight] = {}
        # Computations of several keys at once, which nobody joins.
        self.apart: dict[str, list[Flight]] = {}
        # The last write of each key: the next one, or a delete, comes after it.
        self.writing: dict[str, Writing] = {}
        # How many in a row took longer than a caller waits.
        self.slow_writes = 0

    def discard(self, key: str, but: Flight | None = None) -> None:
        """Keep what is under way for a key, but for one flight, from being joined and stored; in the loop of this."""
        for flights in (self.flights, self.behind):
            if (flight := flights.get(key)) is not None and flight is not but:
                flight.discarded = True
                flight.leave_map()
        for flight in self.apart.get(key, ()):
            flight.discarded = flight.discarded or flight is not but

    def overtake(self, key: str) -> None:
        """Do the same from any thread, and have what is being written removed again."""
        # Marks alone, each in one step; a flight that becomes a write meanwhile is found in one place or the other.
        for flights in (self.flights, self.behind):
            if (flight := flights.get(key)) is not None:
                flight.overtake()
        for flight in tuple(self.apart.get(key, ())):
            flight.overtake()
        if (last := self.writing.get(key)) is not None:
            for writing in last.unfinished():
                if writing.flight is not None:
                    writing.flight.overtake()

    def set_apart(self, flight: Flight) -> None:
        """Let those who invalidate meanwhile know of a flight that nobody joins."""
        self.apart.setdefault(flight.key, []).append(flight)

    def forget_apart(self, flight: Flight) -> None:
        """Let go of a flight that was set apart."""
        of_key = self.apart[flight.key]
        of_key.remove(flight)
        if not of_key:
            del self.apart[flight.key]


class LoopState:
    """What belongs to one event loop: background tasks, and what is under way with each store."""

    def __init__(self, read_timeout: float) -> None:
        self.patience = Patience(read_timeout)
        self.background: set[asyncio.Task[Any]] = set()
        self.stores: weakref.WeakKeyDictionary[AsyncKVStore, StoreState] = weakref.WeakKeyDictionary()

    def in_background(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run work behind the caller, held until it is done."""
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        task.add_done_callback(_retrieve)
        return task


class Call(NamedTuple):
    """One call of a cached function, with what it needs of its surroundings."""

    key: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    store: AsyncKVStore
    loop_state: LoopState
    state: StoreState

    def in_order(self, flight: Flight | None, work: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
        """Write or delete once what was written before under the same key has landed, or it might land afterwards.

        Args:
            flight: What brought the result that is written; None for a delete.
            work: Writes or deletes.

        Returns:
            The task that does so.
        """
        writing, key = self.state.writing, self.key
        previous = writing.get(key)

        async def after_the_previous() -> None:
            if previous is not None:
                await asyncio.wait([previous.task])
                # Or every write of a key would hold those before it.
                this.previous = None
            await work()

        def forget(task: "asyncio.Task[None]") -> None:
            if (last := writing.get(key)) is not None and last.task is task:
                del writing[key]

        task = self.loop_state.in_background(after_the_previous())
        this = writing[key] = Writing(task, flight, previous)
        task.add_done_callback(forget)
        return task


class LoopStates:
    """The states of every event loop that calls one function, which may run in several threads.

    Args:
        read_timeout: Seconds that a call waits for the store at most.
    """

    def __init__(self, read_timeout: float) -> None:
        self._read_timeout = read_timeout
        self._by_loop: dict[asyncio.AbstractEventLoop, LoopState] = {}
        _every.add(self)

    def here(self) -> LoopState:
        """Give the running loop's state."""
        loop = asyncio.get_running_loop()
        state = self._by_loop.get(loop)
        if state is None:
            for old in [old for old in self._by_loop.copy() if old.is_closed()]:
                self._by_loop.pop(old, None)
            state = self._by_loop.setdefault(loop, LoopState(self._read_timeout))
        return state

    def overtake_elsewhere(self, call: Call) -> None:
        """Keep what other loops, and other stores of the same place, have under way for a call from being stored.

        Args:
            call: The call that is newer.
        """
        for _, state in self._elsewhere(call):
            state.overtake(call.key)

    def writes_elsewhere(self, call: Call, *, refreshes: bool = True) -> "list[asyncio.Future[None]]":
        """Give what other loops, and other stores of the same place, are writing of a call.

        Args:
            call: The call.
            refreshes: Whether the results of refreshes count: two of these must not wait for each other.

        Returns:
            Futures of the running loop, each done once its write has landed; never, where its loop does not run any more.
        """
        here = asyncio.get_running_loop()
        found = [(loop, state.writing.get(call.key)) for loop, state in self._elsewhere(call)]
        # Not deletes, which do no harm, and might in their turn wait for writes of this loop.
        return [
            _landing(loop, writing.task, here)
            for loop, last in found
            if last is not None
            for writing in last.unfinished()
            if writing.flight is not None and (refreshes or not writing.flight.refreshes)
        ]

    def _elsewhere(self, call: Call) -> list[tuple[asyncio.AbstractEventLoop, StoreState]]:
        if len(self._by_loop) == 1 and len(call.loop_state.stores) == 1:
            return []
        found = []
        # Copies, each made in one step: other threads change what is copied.
        for loop, loop_state in self._by_loop.copy().items():
            for reference in loop_state.stores.keyrefs():
                store = reference()
                state = None if store is None else loop_state.stores.get(store)
                if store is None or state is None or state is call.state or loop.is_closed():
                    continue
                if store is call.store or is_same_place(store, call.store):
                    found.append((loop, state))
        return found

    def _after_fork_in_child(self) -> None:
        # The loops are the parent's: nothing of theirs goes on here. Held, since a task that is dropped complains.
        _inherited.append(self._by_loop)
        self._by_loop = {}


_every: "weakref.WeakSet[LoopStates]" = weakref.WeakSet()
_inherited: list[object] = []


def _after_fork_in_child() -> None:
    for states in list(_every):
        states._after_fork_in_child()  # noqa: SLF001 (this module's own)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def is_same_place(store: AsyncKVStore, other: AsyncKVStore) -> bool:
    """Say whether two stores have their values in one place, as far as that can be told; credentials do not count.

    Args:
        store: A store.
        other: Another.

    Returns:
        True also where nobody knows.
    """
    if store.db_name != other.db_name:
        return False
    try:
        return identity_of(store.url) == identity_of(other.url)
    except AioKVError:
        # Nobody knows; to compute once more is the lesser evil.
        return True


def _landing(
    loop: asyncio.AbstractEventLoop, task: "asyncio.Task[None]", here: asyncio.AbstractEventLoop
) -> "asyncio.Future[None]":
    if loop is here:
        return task
    landed: asyncio.Future[None] = here.create_future()

    def land() -> None:
        if not landed.done():
            landed.set_result(None)

    def tell(_: object) -> None:
        # The loop that waited may have ended.
        with contextlib.suppress(RuntimeError):
            here.call_soon_threadsafe(land)

    try:
        loop.call_soon_threadsafe(task.add_done_callback, tell)
    except RuntimeError:
        # Its loop has ended, and with it the write.
        land()
    return landed


def _retrieve(task: "asyncio.Task[Any]") -> None:
    # Whoever waited has its error; where nobody did, it was counted and told.
    if not task.cancelled():
        task.exception()
