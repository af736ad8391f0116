"""Runs of the function: for callers that wait, and ahead of time behind callers that have been served."""

import asyncio
import contextlib
import copy
import logging
import time
import weakref
from asyncio import get_running_loop
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from aiokv import clock
from aiokv.caching.events import Events
from aiokv.caching.flights import (
    ABSENT,
    NO_OUTCOME,
    Call,
    Computation,
    Flight,
    Flights,
    Outcome,
    active_computations,
    failure,
    is_elsewhere,
    waits_for_itself,
)
from aiokv.caching.generations import Backoff, Place
from aiokv.caching.keys import KeyMaker
from aiokv.caching.options import CacheOptions
from aiokv.caching.results import ResultCodec
from aiokv.caching.stored import MAX_BEHIND, Computed, Found, StoredResults

logger = logging.getLogger("aiokv")

_MAX_PAUSE_SECONDS = 1.0
_LEVELS_ON_ONE_STACK = 8

# For callers that wait; behind callers that have been served; in the call of one that could have been served.
Role = Literal["front", "behind", "in_call"]
Compute = Callable[[Sequence[Call]], Awaitable[Sequence[Any]]]


class Computations:
    """Run one function, and end the flights that its results are for.

    Args:
        compute: Runs the function for several calls; returns a result for each, or `ABSENT` where an id has none.
        batch_size: How many calls `compute` takes at once, or None for any number.
        keys: Makes the keys of its calls.
        results: Turns its results into JSON and back.
        options: The program's options.
        events: Counts.
        stored: Where its results go.
    """

    def __init__(  # noqa: PLR0913, PLR0917 (the parts of one function's cache)
        self,
        compute: Compute,
        batch_size: int | None,
        keys: KeyMaker,
        results: ResultCodec,
        options: CacheOptions,
        events: Events,
        stored: StoredResults,
    ) -> None:
        self.compute = compute
        self.backoff = Backoff()
        self._batch_size = batch_size
        self._keys = keys
        self._results = results
        self._options = options
        self._events = events
        self._stored = stored
        self._generations = stored.generations
        # Computations that callers wait for, of all loops of the process.
        self._under_way: weakref.WeakValueDictionary[Place, Flight] = weakref.WeakValueDictionary()

    def begin_missing(
        self, flights: Flights, missing: Sequence[Flight], fallbacks: Mapping[Flight, Found], *, skip_write: bool
    ) -> dict[Flight, Flight]:
        """Begin to compute what the store could not serve, but for what is computed behind callers already.

        Args:
            flights: Those of the running loop.
            missing: The flights.
            fallbacks: What may be served where the function fails.
            skip_write: Whether the store is known to fail.

        Returns:
            Those that are computed behind callers, to be waited for instead.
        """
        begun: list[Flight] = []
        instead: dict[Flight, Flight] = {}
        for flight in missing:
            self._events.emit("miss", flight.call.key)
            behind = flights.background.get(flight.call.key) if flights.background else None
            if behind is not None and self._may_join(behind):
                behind.interest += 1
                instead[flight] = behind
                flight.end(NO_OUTCOME)
                continue
            other = self._under_way.setdefault(flight.place, flight)
            if other is not flight and is_elsewhere(other, get_running_loop()) and self._may_join(other):
                computation = Computation([flight])
                work = self._compute_elsewhere(computation, other, fallbacks, skip_write=skip_write)
                computation.task = flights.run(work, flight.call.key, [flight])
            else:
                self._under_way[flight.place] = flight
                begun.append(flight)
        self.begin(flights, begun, fallbacks, skip_write=skip_write)
        return instead

    def begin(self, flights: Flights, begun: Sequence[Flight], fallbacks: Mapping[Flight, Found], *, skip_write: bool) -> None:
        """Begin to compute, in tasks of their own.

        Args:
            flights: Those of the running loop.
            begun: What is to be computed.
            fallbacks: What may be served where the function fails.
            skip_write: Whether the store is known to fail.
        """
        for part in self._batches(begun):
            computation = Computation(part)
            work = self._compute(computation, fallbacks, skip_write=skip_write)
            computation.task = flights.run(work, part[0].call.key, part)

    def begin_refresh(
        self, flights: Flights, due: Sequence[tuple[Flight, Found, Call]], *, in_call: bool
    ) -> dict[Flight, Flight]:
        """Begin to compute anew what has just been served, unless that has begun.

        Args:
            flights: Those of the running loop.
            due: What was served, and the call to make for it.
            in_call: Whether the callers wait for it.

        Returns:
            The new flights by the old ones.
        """
        begun: dict[Flight, Found] = {}
        instead: dict[Flight, Flight] = {}
        for flight, found, call in due:
            under_way = flights.background.get(call.key)
            if (under_way is None or not under_way.may_land(self._generations)) and len(flights.background) < MAX_BEHIND:
                refresh = Flight(flights, flight.store, call, flight.generation)
                flights.background[call.key] = refresh
                begun[refresh] = found
                instead[flight] = refresh
        if begun:
            flights.run(self._refresh(begun, in_call=in_call), due[0][2].key)
        return instead

    async def compute_all(self, calls: Sequence[Call]) -> Sequence[Any]:
        """Run the function for calls whose results are nobody else's.

        Args:
            calls: The calls.
        """
        size = self._batch_size or len(calls)
        parts = [calls[start : start + size] for start in range(0, len(calls), size)]
        computed = [await self.compute(calls)] if len(parts) == 1 else await asyncio.gather(*map(self.compute, parts))
        return [value for values in computed for value in values]

    def forget_under_way(self) -> None:
        """Forget what callers of the parent process wait for."""
        self._under_way = weakref.WeakValueDictionary()

    def copied(self, call: Call) -> Call | None:
        """Return a call with copies of what its caller could change while it is computed behind it, or None.

        Args:
            call: The call.
        """
        if call.is_settled:
            return call
        copies = self._keys.copies(call.args, call.kwargs)
        return None if copies is None else call._replace(args=copies[0], kwargs=copies[1])

    async def _compute(
        self, computation: Computation, fallbacks: Mapping[Flight, Found], *, skip_write: bool, role: Role = "front"
    ) -> None:
        """Run the function, store what it returns, and end the flights whatever happens."""
        computation.task = asyncio.current_task()
        around = [one for one in active_computations.get() if one.task is not None and not one.task.done()]
        active_computations.set((*around, computation))
        batch = computation.flights
        try:
            self._results.resolve()
            try:
                computed = await self._run(batch)
            except self._options.error_types as error:
                self._fall_back(batch, fallbacks, error, role)
            else:
                # Where every caller has left, and the function went on in spite of its cancellation, nothing is stored.
                if any(flight.outcome is None for flight in batch):
                    # The callers may leave now; the results are stored all the same.
                    computation.is_uncancellable = True
                    await self._stored.commit(batch, computed, skip_write=skip_write)
        except BaseException as error:
            if role != "front" and isinstance(error, Exception):
                self._fall_back(batch, fallbacks if role == "in_call" else {}, error, role)
            for flight in batch:
                flight.end(failure(error))
            if not isinstance(error, Exception):
                raise

    async def _run(self, batch: Sequence[Flight]) -> Computed:
        if len(active_computations.get()) % _LEVELS_ON_ONE_STACK == 0:
            # Where tasks are eager, nested computations share a stack, which has an end. This begins a new one.
            await asyncio.sleep(0)
        calls = [flight.call for flight in batch]
        unchanged = [self._is_unchanged(call) for call in calls]
        started, timer = clock.now(), time.perf_counter()
        values = await self.compute(calls)
        seconds = (time.perf_counter() - timer) / len(batch)
        unchanged = [before and self._is_unchanged(call) for before, call in zip(unchanged, calls, strict=True)]
        for flight, value in zip(batch, values, strict=True):
            self.backoff.succeeded(flight.place)
            if value is not ABSENT and flight.outcome is None:
                self._events.emit("computed", flight.call.key, seconds)
        return Computed(values, unchanged, started, clock.now(), seconds)

    async def _compute_elsewhere(
        self, computation: Computation, other: Flight, fallbacks: Mapping[Flight, Found], *, skip_write: bool
    ) -> None:
        """Wait for what another loop computes; compute here where that brings nothing."""
        (flight,) = computation.flights
        try:
            outcome = await other.wait_from_elsewhere()
            failed = outcome.error is not None and not isinstance(outcome.error, Exception)
            if outcome.kind in {"shared", "absent"} and not failed:
                if outcome.json is None and outcome.kind == "shared" and outcome.error is None:
                    # Where it cannot be copied, it is computed here.
                    outcome = Outcome(value=copy.deepcopy(outcome.value))
                flight.end(outcome if outcome is ABSENT else outcome._replace(own=Outcome().own))
                return
        except asyncio.CancelledError:
            flight.end(NO_OUTCOME)
            raise
        except Exception as error:  # noqa: BLE001 (a class of the program's may fail in its own way)
            logger.debug("a result of another event loop cannot be copied: %s", type(error).__name__)
        await self._compute(computation, fallbacks, skip_write=skip_write)

    def _fall_back(self, batch: Sequence[Flight], fallbacks: Mapping[Flight, Found], error: Exception, role: Role) -> None:
        """End flights whose computation has failed with what is stored, where that may still be served."""
        oldest = clock.now() - self._options.error_seconds
        for flight in batch:
            found = fallbacks.get(flight)
            if role != "front":
                self._events.emit("background_error", flight.call.key)
                self._events.computation_failed(self._keys.prefix, error)
                logger.debug("computing %s anew behind a caller failed: %s", flight.call.key, type(error).__name__)
            if role != "front" or found is not None:
                self.backoff.failed(flight.place, clock.monotonic())
            # A caller that was to be served when it began to compute is served now.
            if found is None or (found.entry.fresh_until <= oldest and role != "in_call"):
                flight.end(failure(error))
                continue
            if role == "front":
                self._events.emit("stale_on_error", flight.call.key)
                self._events.computation_failed(self._keys.prefix, error)
            flight.end(Outcome(found.entry.json))

    async def _refresh(self, begun: Mapping[Flight, Found], *, in_call: bool) -> None:
        """Compute anew, unless another process has been faster or is at it: looking costs less than computing."""
        first = next(iter(begun))
        flights, store = first.flights, first.store
        try:
            keys = [flight.call.key for flight in begun]
            texts, error = await flights.access.read(store, keys, self._options.read_timeout)
            store_failed = error is not None
            if error is not None:
                self._stored.read_failed(store, keys[0], error)
            older: dict[Flight, Found] = {}
            for flight, seen in begun.items():
                found = self._stored.decode(flight.place, texts.get(flight.call.key))
                if found is not None and found.entry.started > seen.entry.started:
                    self._stored.keep_near(flight, found.entry, found.value)
                    flight.end(Outcome(found.entry.json, own=found.value))
                else:
                    older[flight] = found or seen
            lasted = {flight.call.key: found.entry.compute_seconds for flight, found in older.items()}
            if not lasted:
                return
            claim = await flights.access.claim(store, {} if store_failed else lasted, self._options.read_timeout)
            claimed = lasted if store_failed else claim.leases
            mine = [flight for flight in older if flight.call.key in claimed and self._is_wanted(flight)]
            async with claim:
                for part in self._batches(mine):
                    computation = Computation(part)
                    computation.is_uncancellable = not in_call
                    role: Role = "in_call" if in_call else "behind"
                    await self._compute(computation, older, skip_write=store_failed, role=role)
            pause = max((seconds for key, seconds in lasted.items() if key not in claimed), default=0.0)
            if pause and not in_call:
                # Until the others are likely to be done, there is no use in asking again.
                await asyncio.sleep(min(pause, _MAX_PAUSE_SECONDS))
        except Exception as error:  # noqa: BLE001 (the callers have their answers; the store's failure is counted)
            logger.debug("refreshing results of %s failed: %s", self._keys.prefix, type(error).__name__)
        finally:
            for flight, found in begun.items():
                flight.end(Outcome(found.entry.json) if in_call else NO_OUTCOME)

    def _may_join(self, flight: Flight) -> bool:
        is_free = flight.outcome is None and self._generations.is_current(flight.place, flight.generation)
        return is_free and not waits_for_itself(flight, active_computations.get())

    def _is_wanted(self, flight: Flight) -> bool:
        under_way = flight.flights.by_key.get(flight.call.key)
        return flight.may_land(self._generations) and (under_way is None or under_way.computation is None)

    def _batches(self, flights: Sequence[Flight]) -> Iterator[Sequence[Flight]]:
        size = self._batch_size or len(flights)
        for start in range(0, len(flights), size or 1):
            yield flights[start : start + size]

    def _is_unchanged(self, call: Call) -> bool:
        """Return whether the arguments are still those that the key was made of."""
        if call.is_settled:
            return True
        with contextlib.suppress(Exception):
            # Else they have changed into something that has no key.
            return self._keys(call.args, call.kwargs) == call.key
        return False
