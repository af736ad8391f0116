"""Runs of the function: for callers that wait, and ahead of time behind callers that have been served."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal, TypeVar

from aiokv import clock
from aiokv.caching.callers import current_caller, run_in_thread
from aiokv.caching.claims import RefreshClaim
from aiokv.caching.error_copies import copy_error
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
from aiokv.caching.generations import Backoff
from aiokv.caching.keys import KeyMaker
from aiokv.caching.options import CacheOptions
from aiokv.caching.results import ResultCodec
from aiokv.caching.stored import MAX_BEHIND, Computed, Found, StoredResults

logger = logging.getLogger("aiokv")

T = TypeVar("T")

# Spares a call of the Python function that makes a `NamedTuple`.
_new: Any = tuple.__new__
_MAX_PAUSE_SECONDS = 1.0
_LEVELS_ON_ONE_STACK = 8

# For callers that wait; behind callers that have been served; in the call of one that could have been served.
Role = Literal["front", "behind", "in_call"]
Compute = Callable[[Sequence[Call]], Coroutine[Any, Any, Sequence[Any]]]


class Plan:
    """What is to be computed for the flights of one call."""

    __slots__ = ("behind", "fallbacks", "in_call", "missing", "skip_write")

    def __init__(self) -> None:
        # Flights whose callers wait for it, and what may be served for these where the function fails.
        self.missing: list[Flight] = []
        self.fallbacks: dict[Flight, Found] = {}
        # Flights that have been served, with what was served, and the call to make behind their callers.
        self.behind: list[tuple[Flight, Found, Call]] = []
        # Likewise, for callers that wait all the same.
        self.in_call: list[tuple[Flight, Found, Call]] = []
        # Whether the store is known to fail.
        self.skip_write = False


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
        is_plain: Whether `compute` never suspends, and is to run in threads.
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
        is_plain: bool = False,  # noqa: FBT001, FBT002 (likewise)
    ) -> None:
        self.compute = compute
        self.is_plain = is_plain
        self.backoff = Backoff()
        self._batch_size = batch_size
        self._keys = keys
        self._results = results
        self._options = options
        self._events = events
        self._stored = stored
        self._generations = stored.generations

    def begin_plan(self, flights: Flights, plan: Plan, awaited: dict[int, Flight]) -> None:
        """Begin to compute what is planned, unless that has begun.

        Args:
            flights: Those of the running loop.
            plan: What is to be computed.
            awaited: Where to put what is to be waited for, by the places of the calls.
        """
        if plan.behind:
            self._begin_refresh(flights, plan.behind, in_call=False)
        if plan.in_call:
            refreshes = self._begin_refresh(flights, plan.in_call, in_call=True)
            awaited.update({flight.index: refresh for flight, refresh in refreshes.items()})
        if plan.missing:
            self._begin_missing(flights, plan, awaited)

    def _begin_missing(self, flights: Flights, plan: Plan, awaited: dict[int, Flight]) -> None:
        """Begin to compute what the store could not serve, but for what is computed behind callers already."""
        begun: list[Flight] = []
        for flight in plan.missing:
            key = flight.call[0]
            self._events.emit("miss", key)
            behind = flights.background.get(key) if flights.background else None
            # A plain function that has yet to find a thread may wait for that of this caller.
            may_wait = behind is not None and (behind.is_begun or not self.is_plain)
            if behind is not None and may_wait and self._may_join(behind):
                behind.interest += 1
                awaited[flight.index] = behind
                flight.end(NO_OUTCOME)
                continue
            awaited[flight.index] = flight
            other = flights.computed.setdefault(key, flight)
            joins = other is not flight and is_elsewhere(other, flights) and self._may_join(other)
            if joins and flights.agree_with(other.flights):
                computation = self._computation([flight])
                work = self._compute_elsewhere(computation, other, plan.fallbacks, skip_write=plan.skip_write)
                computation.task = flights.run(work, key, [flight])
            else:
                flights.computed[key] = flight
                begun.append(flight)
        self.begin(flights, begun, plan.fallbacks, plan.skip_write)

    def begin(
        self,
        flights: Flights,
        begun: Sequence[Flight],
        fallbacks: Mapping[Flight, Found],
        skip_write: bool,  # noqa: FBT001 (one for each miss, so by position)
    ) -> None:
        """Begin to compute, in tasks of their own.

        Args:
            flights: Those of the running loop.
            begun: What is to be computed.
            fallbacks: What may be served where the function fails.
            skip_write: Whether the store is known to fail.
        """
        for part in self.batches(begun):
            computation = self._computation(part)
            work = self._compute(computation, fallbacks, skip_write)
            computation.task = flights.run(work, part[0].call[0], part)

    def _begin_refresh(
        self, flights: Flights, due: Sequence[tuple[Flight, Found, Call]], *, in_call: bool
    ) -> dict[Flight, Flight]:
        """Begin to compute anew what has just been served, unless that has begun; return the new flights by the old ones."""
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
            flights.run(self._refresh(begun, in_call=in_call), due[0][2].key, list(begun) if in_call else ())
        return instead

    async def compute_alone(self, flight: Flight, outer: Computation) -> Any:
        """Run the function for a call inside the running computation, which nobody else waits for.

        Args:
            flight: Stands for the call.
            outer: The running computation.
        """
        if not self.is_plain:
            return (await self.compute([flight.call]))[0]
        computation = self._computation([flight])
        computation.task = asyncio.current_task()
        outer.waits_for.add(flight)
        try:
            return (await run_in_thread(self.compute([flight.call]), computation))[0]
        finally:
            outer.waits_for.discard(flight)

    async def compute_all(self, calls: Sequence[Call]) -> Sequence[Any]:
        """Run the function for calls whose results are nobody else's.

        Args:
            calls: The calls.
        """
        parts = self.batches(calls)
        computed = [await self.compute(calls)] if len(parts) == 1 else await asyncio.gather(*map(self.compute, parts))
        return [value for values in computed for value in values]

    def copied(self, call: Call) -> Call | None:
        """Return a call with copies of what its caller could change while it is computed behind it, or None.

        Args:
            call: The call.
        """
        if call.is_settled:
            return call
        copies = self._keys.copies(call.args, call.kwargs)
        return None if copies is None else call._replace(args=copies[0], kwargs=copies[1])

    async def _compute(  # noqa: C901 (one computation from top to bottom)
        self,
        computation: Computation,
        fallbacks: Mapping[Flight, Found],
        skip_write: bool,  # noqa: FBT001 (one for each miss, so by position)
        role: Role = "front",
    ) -> None:
        """Run the function, store what it returns, and end the flights whatever happens."""
        if computation.task is None:
            # Of an eager task, or in that of a refresh.
            computation.task = asyncio.current_task()
        around = active_computations.get()
        if around:
            around = tuple(one for one in around if one.task is None or not one.task.done())
        active_computations.set((*around, computation))
        batch = computation.flights
        try:
            self._results.resolve()
            if len(around) % _LEVELS_ON_ONE_STACK == _LEVELS_ON_ONE_STACK - 1:
                # Where tasks are eager, nested computations share a stack, which has an end. This begins a new one.
                await asyncio.sleep(0)
            try:
                computed = await (run_in_thread(self._run(batch), computation) if self.is_plain else self._run(batch))
            except self._options.error_types as error:
                self._fall_back(batch, fallbacks, error, role)
            else:
                for flight in batch:
                    # Where every caller has left, and the function went on in spite of its cancellation, nothing is stored.
                    if flight.outcome is None:
                        # The callers may leave now; the results are stored all the same.
                        computation.is_uncancellable = True
                        await self._stored.commit(batch, computed, skip_write=skip_write)
                        break
        except BaseException as error:
            if role != "front" and isinstance(error, Exception):
                self._fall_back(batch, fallbacks if role == "in_call" else {}, error, role)
            for flight in batch:
                flight.end(failure(error))
            if not isinstance(error, Exception):
                raise

    async def _run(self, batch: Sequence[Flight]) -> Computed:
        calls: list[Call] = []
        unchanged: list[bool] = []
        for flight in batch:
            call = flight.call
            calls.append(call)
            unchanged.append(call[1] or self._is_unchanged(call))
        started, timer = clock.now(), time.perf_counter()
        values = await self.compute(calls)
        seconds = (time.perf_counter() - timer) / len(calls)
        for index, flight in enumerate(batch):
            call = flight.call
            if unchanged[index] and not call[1]:
                unchanged[index] = self._is_unchanged(call)
            self.backoff.succeeded(flight.place)
            if flight.outcome is None and values[index] is not ABSENT:
                self._events.emit("computed", call[0], seconds)
        computed: Computed = _new(Computed, (values, unchanged, started, clock.now(), seconds))
        return computed

    async def _compute_elsewhere(
        self, computation: Computation, other: Flight, fallbacks: Mapping[Flight, Found], *, skip_write: bool
    ) -> None:
        """Wait for what another loop or function computes; compute here where that brings nothing."""
        (flight,) = computation.flights
        computation.waits_for.add(other)
        try:
            outcome = await other.wait_from_elsewhere()
            # Another function may have other options, such as what a failing store means.
            is_own_error = other.flights.results is self._results and isinstance(outcome.error, Exception)
            if outcome.kind in {"shared", "absent"} and (outcome.error is None or is_own_error):
                if outcome.error is not None:
                    outcome = failure(copy_error(outcome.joined or outcome.error))
                elif outcome.json is None and outcome.kind == "shared":
                    # Where it cannot be copied, it is computed here.
                    outcome = Outcome(value=self._results.copy(outcome.value))
                flight.end(outcome if outcome is ABSENT else outcome._replace(own=Outcome().own))
                return
        except asyncio.CancelledError:
            flight.end(NO_OUTCOME)
            raise
        except Exception as error:  # noqa: BLE001 (a class of the program's may fail in its own way)
            logger.debug("a result of another event loop cannot be copied: %s", type(error).__name__)
        finally:
            computation.waits_for.discard(other)
        await self._compute(computation, fallbacks, skip_write)

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
            if found is None or (found[0].fresh_until <= oldest and role != "in_call"):
                flight.end(failure(error))
                continue
            if role == "front":
                self._events.emit("stale_on_error", flight.call.key)
                self._events.computation_failed(self._keys.prefix, error)
            flight.end(Outcome(found[0].json))

    async def _refresh(self, begun: Mapping[Flight, Found], *, in_call: bool) -> None:
        """Compute anew, unless another process has been faster or is at it: looking costs less than computing."""
        store = next(iter(begun)).store
        if not in_call:
            # The thread of the caller is not to wait for this.
            current_caller.set(None)
        try:
            older, store_failed = await self._read_again(begun)
            lasted = {flight.call.key: found[0].compute_seconds for flight, found in older.items()}
            if not lasted:
                return
            async with RefreshClaim(store, {} if store_failed else lasted, self._options.read_timeout) as claim:
                claimed = lasted if store_failed else claim.leases
                mine = {flight: found for flight, found in older.items() if flight.call.key in claimed}
                if claim.is_exact and mine:
                    # Another may have stored its result and given its claim back since.
                    mine, store_failed = await self._read_again(mine)
                for part in self.batches([flight for flight in mine if self._is_wanted(flight)]):
                    computation = self._computation(part)
                    computation.is_uncancellable = not in_call
                    role: Role = "in_call" if in_call else "behind"
                    await self._compute(computation, mine, store_failed, role)
            pause = max((seconds for key, seconds in lasted.items() if key not in claimed), default=0.0)
            if pause and not in_call:
                # Until the others are likely to be done, there is no use in asking again.
                await asyncio.sleep(min(pause, _MAX_PAUSE_SECONDS))
        except Exception as error:  # noqa: BLE001 (the callers have their answers; the store's failure is counted)
            logger.debug("refreshing results of %s failed: %s", self._keys.prefix, type(error).__name__)
        finally:
            for flight, found in begun.items():
                flight.end(Outcome(found[0].json) if in_call else NO_OUTCOME)

    async def _read_again(self, seen: Mapping[Flight, Found]) -> tuple[dict[Flight, Found], bool]:
        """End flights whose entry is newer by now; return the others with what is stored, and whether the store failed."""
        first = next(iter(seen))
        keys = [flight.call.key for flight in seen]
        texts, error = await first.flights.access.read(first.store, keys, self._options.read_timeout)
        if error is not None:
            self._stored.read_failed(first.store, keys[0], error)
        older: dict[Flight, Found] = {}
        for flight, known in seen.items():
            found = self._stored.decode(flight.place, texts.get(flight.call.key))
            if found is not None and found[0].started > known[0].started:
                self._stored.keep_near(flight, *found)
                flight.end(Outcome(found[0].json, own=found[1]))
            else:
                older[flight] = found or known
        return older, error is not None

    def _computation(self, flights: Sequence[Flight]) -> Computation:
        caller = current_caller.get() if self.is_plain else None
        return Computation(flights, None if caller is None else caller.waits_for)

    def _may_join(self, flight: Flight) -> bool:
        is_free = flight.outcome is None and self._generations.is_current(flight.place, flight.generation)
        return is_free and not waits_for_itself(flight, active_computations.get())

    def _is_wanted(self, flight: Flight) -> bool:
        under_way = flight.flights.by_key.get(flight.call.key)
        return flight.may_land(self._generations) and (under_way is None or under_way.computation is None)

    def batches(self, items: Sequence[T]) -> Sequence[Sequence[T]]:
        """Return what `compute` takes at once, part by part."""
        size = self._batch_size
        if size is None or len(items) <= size:
            return (items,) if items else ()
        return [items[start : start + size] for start in range(0, len(items), size)]

    def _is_unchanged(self, call: Call) -> bool:
        """Return whether arguments that can change are still those that the key was made of."""
        with contextlib.suppress(Exception):
            # Else they have changed into something that has no key.
            return self._keys(call.args, call.kwargs) == call.key
        return False
