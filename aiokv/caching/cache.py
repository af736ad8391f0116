"""The cache of one function: one call's way from its key to its result, step by step."""

import asyncio
import contextlib
import os
import random
import threading
import weakref
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from aiokv import clock
from aiokv.caching.access import access_of
from aiokv.caching.callers import surrounding_computation
from aiokv.caching.codecs import Codec
from aiokv.caching.computing import Computations, Compute, Plan
from aiokv.caching.error_copies import copy_error
from aiokv.caching.events import EventKind, Events
from aiokv.caching.flights import (
    ABSENT,
    NO_OUTCOME,
    Call,
    Computation,
    Flight,
    Flights,
    Outcome,
    active_computations,
    computed_flights_of,
    failure,
    leave_all,
    waits_for_itself,
)
from aiokv.caching.freshness import Decision, FreshnessOptions, decide
from aiokv.caching.generations import generations_of
from aiokv.caching.keys import KeyMaker
from aiokv.caching.modes import Mode
from aiokv.caching.near import MISSED, NearView
from aiokv.caching.options import CacheOptions
from aiokv.caching.results import ResultCodec
from aiokv.caching.store_choice import StoreChoice
from aiokv.caching.stored import Found, StoredResults
from aiokv.default_store import watch_default_store
from aiokv.store import AsyncKVStore
from aiokv.target import Target

_FIRST = (0,)
# An enum's member is looked up through its class, which costs.
_SERVE, _COMPUTE = Decision.SERVE, Decision.COMPUTE
_EVENTS: Final[dict[Decision, EventKind]] = {
    Decision.SERVE_AND_REFRESH_AHEAD: "hit",
    Decision.SERVE_STALE_AND_REFRESH: "stale_hit",
    Decision.COMPUTE_OR_FALL_BACK: "stale_on_error",
}
# Spares a call of the Python function that makes a `NamedTuple`.
_new_call: Any = tuple.__new__
# Past so many (loop, target) pairs, those that are idle are forgotten.
_MAX_IDLE_FLIGHTS = 256


class Cache:
    """The cache of one function, shared by all its bound forms.

    Args:
        function: The coroutine function, or a plain one.
        compute: Runs it for several calls; returns a result for each, or `ABSENT` where an id has none.
        keys: Makes the keys of its calls.
        results: Turns its results into JSON and back.
        codecs: What is done to the JSON.
        options: The program's options.
        batch_size: How many calls `compute` takes at once, or None for any number.
        is_plain: Whether the function is a plain one, and `compute` never suspends.
    """

    def __init__(  # noqa: PLR0913, PLR0917 (the parts of one function's cache)
        self,
        function: Callable[..., Any],
        compute: Compute,
        keys: KeyMaker,
        results: ResultCodec,
        codecs: tuple[Codec, ...],
        options: CacheOptions,
        batch_size: int | None = None,
        *,
        is_plain: bool = False,
    ) -> None:
        self.function = function
        self.keys = keys
        self.options = options
        self.results = results
        self.events = Events(options.observer)
        self.stores = StoreChoice(options.store, options.db_name, function)
        self.near = (
            None if options.near is None else NearView(options.near, keys.values, results, self.events, *keys.direct_counts)
        )
        self.generations = generations_of(keys.prefix)
        self.stored = StoredResults(keys, results, codecs, options, self.events, self.generations, self.near)
        self.computations = Computations(compute, batch_size, keys, results, options, self.events, self.stored, is_plain)
        self._wait_seconds = options.read_timeout
        self._freshness = FreshnessOptions(options.stale_seconds, options.error_seconds, options.early)
        self._flights: dict[tuple[AbstractEventLoop, Target], Flights] = {}
        self._computed = computed_flights_of(keys.prefix)
        self._lock = threading.Lock()
        # The last look-up. One tuple, so that another thread never sees half an update.
        self._last: tuple[AbstractEventLoop, Target, Flights] | None = None
        if self.near is not None and self.stores.fixed is not None:
            self.near.default_store_changed(self.stores.fixed)
        elif self.near is not None and self.stores.is_default:
            watch_default_store(self.near)
        _caches.add(self)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Make the key of a call.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.

        Raises:
            TypeError: The arguments do not fit the function, or one of them cannot be part of a key.
        """
        key, is_settled = self.keys.make(args, kwargs)
        call: Call = _new_call(Call, (key, is_settled, args, kwargs, 0))
        return call

    async def read_through(  # noqa: C901, PLR0912, PLR0915 (one call from top to bottom)
        self, store: AsyncKVStore, calls: Sequence[Call], mode: Mode
    ) -> list[Any]:
        """Return the results of several calls, from wherever they are nearest.

        Args:
            store: Their store.
            calls: The calls.
            mode: `"use"` or `"refresh"`.

        Returns:
            A result for each, which no other caller holds unless it is immutable, or `ABSENT`.
        """
        flights = self.flights_of(store)
        around = active_computations.get()
        results: list[Any] = [MISSED] * len(calls)
        todo: Sequence[int] = range(len(calls)) if len(calls) > 1 else _FIRST
        while True:
            # What is read, what this call leads and what it waits for, by places in `calls`.
            reading: dict[str, int] = {}
            led: dict[int, Flight] = {}
            awaited: dict[int, Flight] = {}
            alone: list[int] = []
            generation = self.generations.now
            try:
                for index in todo:
                    key = calls[index][0]
                    under_way = flights.by_key.get(key)
                    if key in reading:
                        # Two ids have one key.
                        self._begin_all(flights, store, calls, {key: reading[key]}, led, generation)
                        self._join(led[reading[key]], index, awaited, around)
                    elif under_way is not None and self._may_join(under_way, mode, around):
                        if waits_for_itself(under_way, around):
                            alone.append(index)
                        else:
                            self._join(under_way, index, awaited, around)
                    elif mode == "use":
                        reading[key] = index
                    else:
                        raised = self.stored.supersede(flights, key)
                        led[index] = awaited[index] = self._begin(flights, store, calls[index], index, raised, is_decisive=True)
                if reading:
                    # The caller's own task reads, which costs least where there is something to serve. Others can come and join
                    # only while the store is waited for.
                    parts = (flights, store, calls, reading, led, generation)
                    texts, error = await flights.access.read(store, list(reading), self._wait_seconds, self._begin_all, parts)
                    if error is not None:
                        self.stored.read_failed(store, next(iter(reading)), error)
                    plan = self._serve(flights, store, calls, reading, led, texts, generation, results)
                    if plan is not None:
                        plan.skip_write = error is not None
                        self.computations.begin_plan(flights, plan, awaited)
                elif led:
                    self.computations.begin(flights, list(led.values()), {}, False)
                for index in alone:
                    lone = Flight(flights, store, calls[index], generation)
                    results[index] = await self.computations.compute_alone(lone, around[-1])
                if not awaited:
                    return results
                await self._take_all(awaited, calls, results, around)
            except BaseException as failed:
                _end_reading(led, failed)
                raise
            finally:
                if around:
                    around[-1].waits_for.difference_update(awaited.values())
                if awaited and (cancelled := leave_all(awaited.values())):
                    # The last one to leave waits until the function has cleaned up.
                    await asyncio.wait(cancelled)
            todo = [index for index in todo if results[index] is MISSED]
            if not todo:
                return results

    def flights_of(self, store: AsyncKVStore) -> Flights:
        """Return the flights of the running loop to a store's target."""
        loop, target = get_running_loop(), store.target
        last = self._last
        if last is not None and last[0] is loop and last[1] is target:
            return last[2]
        with self._lock:
            flights = self._flights.get((loop, target))
            if flights is None:
                if len(self._flights) >= _MAX_IDLE_FLIGHTS:
                    self._forget_idle(loop)
                flights = Flights(access_of(target), self._computed.setdefault(target, {}), self.results)
                self._flights[loop, target] = flights
        self._last = (loop, target, flights)
        return flights

    def _forget_idle(self, loop: AbstractEventLoop) -> None:
        for key, flights in list(self._flights.items()):
            if key[0].is_closed() or (key[0] is loop and flights.is_idle):
                self._flights.pop(key, None)
        used = {target for _, target in self._flights}
        for target, computed in list(self._computed.items()):
            if target not in used and not computed:
                self._computed.pop(target, None)

    async def aclose(self) -> None:
        """Finish what was begun behind callers in this loop, within the time that a read may take, and cancel the rest."""
        self._last = None
        for key, flights in list(self._flights.items()):
            if key[0] is get_running_loop() and await flights.aclose(self.options.read_timeout):
                self._flights.pop(key, None)

    def _may_join(self, flight: Flight, mode: Mode, around: Sequence[Computation]) -> bool:
        if not self.generations.is_current(flight.place, flight.generation):
            return False
        # A refresh joins refreshes alone: others may serve what is stored. It must not wait for itself, either.
        return mode == "use" or flight.is_decisive or waits_for_itself(flight, around)

    def _begin(  # noqa: PLR0913, PLR0917 (one for each call that waits, so by position)
        self,
        flights: Flights,
        store: AsyncKVStore,
        call: Call,
        index: int,
        generation: int,
        is_decisive: bool = False,  # noqa: FBT001, FBT002 (likewise)
    ) -> Flight:
        """Begin a flight that others can join."""
        flight = flights.by_key[call[0]] = Flight(flights, store, call, generation, index, is_decisive)
        flight.reader = surrounding_computation()
        return flight

    def _begin_all(  # noqa: PLR0913, PLR0917 (likewise)
        self,
        flights: Flights,
        store: AsyncKVStore,
        calls: Sequence[Call],
        reading: Mapping[str, int],
        led: dict[int, Flight],
        generation: int,
    ) -> None:
        for index in reading.values():
            if index not in led:
                led[index] = self._begin(flights, store, calls[index], index, generation)

    def _join(self, flight: Flight, index: int, awaited: dict[int, Flight], around: Sequence[Computation]) -> None:
        flight.interest += 1
        if around:
            # At once: while the store is read for others, what this one waits for may come to wait for this call.
            around[-1].waits_for.add(flight)
        self.events.emit("joined", flight.call.key)
        awaited[index] = flight

    def _serve(  # noqa: PLR0913, PLR0917 (one for each hit, so by position)
        self,
        flights: Flights,
        store: AsyncKVStore,
        calls: Sequence[Call],
        reading: Mapping[str, int],
        led: dict[int, Flight],
        texts: Mapping[str, str | None],
        generation: int,
        results: list[Any],
    ) -> Plan | None:
        """Serve what is stored and may be served; return what is to be computed, if anything is."""
        plan: Plan | None = None
        for key, index in reading.items():
            found = self.stored.decode((flights.target, key), texts.get(key))
            flight = led.get(index)
            decision = _COMPUTE
            if found is not None:
                entry = found[0]
                decision = decide(entry[2], entry[3], clock.now(), self._freshness, random.random)
                if decision is _SERVE and flight is None and self.near is None:
                    # Nobody can have joined, so no flight is needed.
                    self.events.served("hit", key, entry[3])
                    results[index] = found[1]
                    continue
            if flight is None:
                flight = led[index] = self._begin(flights, store, calls[index], index, generation)
            if found is not None and decision is _SERVE:
                self._give(flight, found, results, "hit")
                continue
            if plan is None:
                plan = Plan()
            self._plan(flight, found, decision, results, plan)
        return plan

    def _plan(self, flight: Flight, found: Found | None, decision: Decision, results: list[Any], plan: Plan) -> None:
        """Note what is to be computed for a flight, and serve what may be served all the same."""
        if found is None or decision is _COMPUTE:
            plan.missing.append(flight)
            return
        # Not soon after the function has failed.
        may_compute = not self.computations.backoff.is_waiting(flight.place, clock.monotonic())
        if decision is Decision.COMPUTE_OR_FALL_BACK and may_compute:
            plan.missing.append(flight)
            plan.fallbacks[flight] = found
            return
        self._give(flight, found, results, _EVENTS[decision])
        if not may_compute:
            return
        copied = self.computations.copied(flight.call)
        if copied is None or (decision is Decision.SERVE_AND_REFRESH_AHEAD and self.keys.leaves_out):
            # What is not in the key, such as a session, is its caller's, and not to be used behind it.
            plan.in_call.append((flight, found, flight.call))
        else:
            plan.behind.append((flight, found, copied))

    def _give(self, flight: Flight, found: Found, results: list[Any], kind: EventKind) -> None:
        """Serve what is stored to the flight's caller and to those that have joined it."""
        entry, value = found
        self.events.served(kind, flight.call.key, entry.compute_seconds)
        if kind == "hit" and self.near is not None:
            self.stored.keep_near(flight, entry, value)
        results[flight.index] = value
        if flight.interest == 1:
            flight.outcome = NO_OUTCOME
            flight.flights.remove(flight)
        else:
            flight.end(Outcome(entry.json))

    async def _take_all(
        self, awaited: dict[int, Flight], calls: Sequence[Call], results: list[Any], around: Sequence[Computation]
    ) -> None:
        """Wait for flights and take their results; `MISSED` stays where a call must begin anew."""
        if around:
            around[-1].waits_for.update(awaited.values())
        failed: BaseException | None = None
        for index, flight in awaited.items():
            outcome = flight.outcome or await flight.wait()
            if outcome.error is not None:
                joined = None if flight.call is calls[index] else outcome.joined
                error = outcome.error if joined is None else copy_error(joined)
                failed = failed or error.with_traceback(outcome.value)
            elif outcome.own is not MISSED and flight.call is calls[index]:
                # A flight of this call, which no other caller has begun.
                results[index] = outcome.own
            elif outcome.kind == "shared" or (outcome.kind == "private" and flight.call is calls[index]):
                results[index] = self._own_copy(flight, outcome)
            elif outcome.kind == "absent":
                results[index] = ABSENT
        if failed is not None:
            raise failed

    def _own_copy(self, flight: Flight, outcome: Outcome) -> Any:
        if outcome.json is not None:
            return self.results.load(outcome.json)
        if flight.interest > 1:
            # A class of the program's may fail in its own way.
            with contextlib.suppress(Exception):
                return self.results.copy(outcome.value)
        return outcome.value

    def _after_fork_in_child(self) -> None:
        # The loops are the parent's, and its flights never end here. Held, since a task that is dropped complains.
        _of_parent.append((self._flights, self._last, self._computed))
        self._flights, self._last, self._computed = {}, None, computed_flights_of(self.keys.prefix)
        self._lock = threading.Lock()


def _end_reading(led: Mapping[int, Flight], error: BaseException) -> None:
    for flight in led.values():
        if flight.computation is None:
            flight.end(failure(error) if isinstance(error, Exception) else NO_OUTCOME)


_caches: "weakref.WeakSet[Cache]" = weakref.WeakSet()
_of_parent: list[object] = []


def _after_fork_in_child() -> None:
    for cache in list(_caches):
        cache._after_fork_in_child()  # noqa: SLF001 (this module's own)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
