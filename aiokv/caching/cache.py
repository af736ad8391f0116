"""The cache of one function: what is read, served, computed, stored and refreshed, and in which order."""

import asyncio
import contextlib
import copy
import inspect
import itertools
import logging
import random
import time
import weakref
from asyncio import get_running_loop
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

from aiokv.caching.breaker import FAILURES_TO_OPEN, Breaker, is_cancelled, without_traceback
from aiokv.caching.codec import ResultCodec
from aiokv.caching.entry import Entry, Freshness, pack, unpack
from aiokv.caching.flight import Flight, Outcome, active_flights
from aiokv.caching.keys import KeyMaker
from aiokv.caching.near import Slot
from aiokv.caching.options import CacheEvent, CacheOptions, EventKind, Ttl
from aiokv.caching.state import Call, LoopState, LoopStates, StoreState, is_same_place
from aiokv.errors import CallTimeoutError, StoreClosedError, ValueTooLargeError
from aiokv.store import AsyncKVStore, default_store, watch_default_store

R = TypeVar("R")

logger = logging.getLogger("aiokv")

MAX_BACKGROUND_TASKS = 64
_CLAIM_SUFFIX = ":refreshing"
_CLAIM_TTL_SECONDS = 60
_PROBE_KEY = "aiokv-probe"
_MAX_REMEMBERED_SLOTS = 4_096
_MAX_REMEMBERED_CHARS = 512

MISSED: Any = object()

# Tells caches apart for as long as the process lives, which an address does not.
_scopes = itertools.count()

Mode = Literal["use", "bypass", "refresh"]

cache_mode: ContextVar[Mode] = ContextVar("aiokv_cache_mode", default="use")


@contextlib.contextmanager
def cache_bypass() -> Generator[None]:
    """Call cached functions as if they were not: nothing is read, nothing is stored, in this context and its tasks."""
    token = cache_mode.set("bypass")
    try:
        yield
    finally:
        cache_mode.reset(token)


@contextlib.contextmanager
def cache_refresh() -> Generator[None]:
    """Compute anew whatever cached functions are called in this context, and store it for everybody."""
    token = cache_mode.set("refresh")
    try:
        yield
    finally:
        cache_mode.reset(token)


class CacheInfo(NamedTuple):
    """What a cached function has done in this process.

    Args:
        hits: Results from the store that were fresh.
        near_hits: Results from the near cache.
        stale_hits: Results served though they were not fresh any more.
        misses: Calls that found nothing to serve.
        computations: How often the function was run.
        store_errors: How often the store failed or was given up on.
        seconds_saved: The computation time of all that was served without computing.
    """

    hits: int = 0
    near_hits: int = 0
    stale_hits: int = 0
    misses: int = 0
    computations: int = 0
    store_errors: int = 0
    seconds_saved: float = 0.0


class Found(NamedTuple):
    """A stored result: its entry, its JSON, and one decoded copy."""

    entry: Entry
    payload: bytes | str
    value: Any


class Cache(Generic[R]):
    """The cache of one function, shared by all its bound forms.

    Args:
        function: The coroutine function.
        keys: Makes the keys of its calls.
        results: Turns its results into text and back.
        options: What the program has said.
        clock: Gives the present as seconds since the epoch.
    """

    def __init__(
        self,
        function: Callable[..., Awaitable[R]],
        keys: KeyMaker,
        results: ResultCodec,
        options: CacheOptions,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.function = function
        self.keys = keys
        self.results = results
        self.options = options
        self.clock = clock
        self.counts: dict[str, float] = dict.fromkeys(CacheInfo._fields, 0)
        self.stale_seconds = _as_seconds(options.stale_while_revalidate)
        self.error_seconds = _as_seconds(options.stale_if_error)
        self._observed = options.observer is not None
        self._own_store: AsyncKVStore | None = None
        # Near slots by the plain arguments of the calls that were served from them.
        self.near_slots: dict[tuple[object, ...], Slot] = {}
        # A near cache may serve several functions, whose stores may differ though their keys are the same.
        self._fixed_store = options.store if isinstance(options.store, AsyncKVStore) else None
        self._has_one_store = options.db_name is not None or isinstance(options.store, AsyncKVStore)
        self._scope = next(_scopes)
        # Where results of the next call stand in the near cache, if that is known before it is made.
        self._near_scope: Hashable = (self._scope,) if self._has_one_store else None
        parameters = inspect.signature(function).parameters
        self.first_parameter = next(iter(parameters), "")
        self._first_default = parameters[self.first_parameter].default if parameters else None
        self._store_takes_first = _takes_instance(options.store)
        self._states = LoopStates(options.read_timeout)
        # Those that the near cache has results of, where they may be several.
        self._near_stores: weakref.WeakKeyDictionary[AsyncKVStore, None] = weakref.WeakKeyDictionary()
        # Of the last call, which most likely is that of the next; one attribute, since loops of several threads change it.
        self._here: tuple[asyncio.AbstractEventLoop, LoopState, AsyncKVStore, StoreState] | None = None
        if options.store is None and options.db_name is None:
            watch_default_store(self)

    def default_store_changed(self, store: AsyncKVStore | None) -> None:
        """Serve nothing from the near cache that came from another default store.

        Args:
            store: The default store from now on, or None where that is yet to be made.
        """
        # In this order: who remembers a slot looks at the scope after that.
        self._near_scope = None if store is None else (self._scope, store)
        self.near_slots.clear()

    async def get(  # noqa: C901 (each step once, in order)
        self, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Mode | None = None
    ) -> R:
        """Give a call's result, from wherever it is nearest.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.
            mode: Whether what is stored counts; None takes the context's.

        Returns:
            The result, which no other caller holds unless it is immutable.
        """
        mode = mode or cache_mode.get()
        if mode == "bypass":
            return await self.function(*args, **kwargs)
        key = self.keys(args, kwargs)
        near = self.options.near
        if near is not None and mode == "use":
            scope = self._near_scope or self._near_scope_of(args, kwargs)
            slot = near.slots.get((scope, key))
            if slot is not None and (result := self.near_hit(slot, key)) is not MISSED:
                self._remember_slot(slot, scope, args, kwargs)
                return result
        call = self.call(key, args, kwargs)
        flights = call.state.flights
        while True:
            flight = flights.get(key)
            # Another loop has discarded it, which cannot take it off the map.
            if flight is None or flight.discarded:
                flight = Flight(flights, key)
                try:
                    if mode == "use":
                        # This task leads: it reads the store itself, which costs least where there is something to serve.
                        found, store_failed = await self.read(call)
                        if found is not None and self._serves(call, flight, found):
                            flight.end(found.payload)
                            value: R = found.value
                            return value
                        flight = self._begin(call, flight, found, store_failed=store_failed)
                    else:
                        self._begin_refresh(call, flight)
                except BaseException as error:
                    flight.fail(error)
                    raise
            elif mode == "refresh" and not flight.refreshes and not flight.waits_for_this_code():
                # It may serve what is stored, or store what is older than this moment.
                flight.discarded = True
                flight.leave_map()
                continue
            if flight.waits_for_this_code():
                # From inside its own computation, or from one that it waits for.
                return await self.function(*args, **kwargs)
            outcome = await flight.join()
            if outcome is not None:
                return self.own_copy(outcome, is_shared=flight.has_waiters)

    def near_hit(self, slot: Slot, key: str = "") -> R:
        """Serve what the near cache has, if it still may.

        Args:
            slot: Where it has it.
            key: The call's key, if it was made.

        Returns:
            The result, which no other caller holds unless it is immutable; `MISSED` where its time has come.
        """
        # In this order: another thread may be letting go of the slot.
        payload, value = slot.payload, slot.value
        result: R = MISSED
        if self.clock() < slot.until:
            slot.visited = True
            self.counts["near_hits"] += 1
            if self._observed:
                self.tell("near_hit", key)
            try:
                result = value if payload is None else self.results.loads(payload)
            except Exception:  # noqa: BLE001 (a class of the program's, which took this before, may not today)
                slot.forget()
        return result

    def _remember_slot(self, slot: Slot, scope: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # An observer is told the key, and a store of the call's own is part of the place in the near cache.
        if self._near_scope is None or self._observed:
            return
        call = self.keys.plain_call(args, kwargs)
        # Long arguments would be kept here beside the near cache's own bound.
        if call is not None and sum(len(value) for value in call if isinstance(value, str | bytes)) <= _MAX_REMEMBERED_CHARS:
            if len(self.near_slots) >= _MAX_REMEMBERED_SLOTS:
                self.near_slots.clear()
            self.near_slots[call] = slot
            if self._near_scope != scope:
                # Another thread has changed the default store meanwhile.
                self.near_slots.clear()

    def own_copy(self, outcome: Outcome, *, is_shared: bool = False) -> R:
        """Make the result that one waiter gets.

        Args:
            outcome: What the flight brought.
            is_shared: Whether others are yet to get it; the last one may have the original.

        Returns:
            The result, which no other caller holds, unless it can neither be written as JSON nor copied.
        """
        if outcome.payload is not None:
            return cast("R", self.results.load(outcome.payload))
        if is_shared:
            # A class of the program's may fail in its own way.
            with contextlib.suppress(Exception):
                return cast("R", copy.deepcopy(outcome.value))
        return cast("R", outcome.value)

    def _begin(self, call: Call, flight: Flight, found: Found | None, *, store_failed: bool) -> Flight:
        """Begin to compute what the store could not serve, unless that has begun; give the flight to wait for."""
        self.count("misses", "miss", call.key)
        behind = call.state.behind.get(call.key)
        if behind is not None and behind.task is not None and not behind.discarded and not behind.waits_for_this_code():
            # Behind those who were served before.
            flight.end()
            return behind
        stale = found if found is not None and self.clock() < found.entry.fresh_until + self.error_seconds else None
        flight.compute(self._compute(call, flight, stale, skip_write=store_failed))
        return flight

    def _begin_refresh(self, call: Call, flight: Flight) -> None:
        if (behind := call.state.behind.get(call.key)) is not None:
            # What began before is older than what is asked for now.
            behind.discarded = True
        self._states.overtake_elsewhere(call)
        flight.refreshes = True
        flight.compute(self._compute(call, flight, None))

    def _serves(self, call: Call, flight: Flight, found: Found) -> bool:
        """Decide whether what was found is served, and whether it is computed anew behind that."""
        entry, now = found.entry, self.clock()
        if now >= entry.fresh_until:
            if entry.freshness(now, self.stale_seconds) is Freshness.EXPIRED:
                return False
            self.count("stale_hits", "stale_hit", call.key)
            self._refresh_behind(call, entry)
        else:
            self.count("hits", "hit", call.key)
            if self.options.near is not None:
                self.keep_near(call, flight, found.payload, found.value, entry.fresh_until)
            early = self.options.early
            if early and entry.may_be_due_early(now, early):
                chance = 1.0 - random.random()  # noqa: S311 (spreads work, guards nothing)
                if entry.due_early(now, early, chance):
                    self._refresh_behind(call, entry)
        self.counts["seconds_saved"] += entry.compute_seconds
        return True

    async def read(self, call: Call) -> tuple[Found | None, bool]:
        """Read what is stored of a call.

        Args:
            call: The call.

        Returns:
            What can be read, and whether the store failed; what cannot be read is a miss, which gets overwritten.
        """
        if call.state.breaker.open and self.passes_by(call.state):
            return None, True
        try:
            with call.loop_state.patience.bound():
                pending = call.state.writing.get(call.key)
                if pending is not None:
                    # What is being written or deleted comes before what is read.
                    await asyncio.wait([pending.task])
                text = await call.store.get(call.key)
        except (Exception, asyncio.CancelledError) as error:
            if is_cancelled(error):
                raise
            self.store_failed(call, error)
            return None, True
        call.state.breaker.succeeded()
        return self.found(call.key, text), False

    def passes_by(self, state: StoreState) -> bool:
        """Say whether the store is not to be asked for now, since it has failed; raise that where it was asked for.

        Args:
            state: The store's.

        Returns:
            True while the breaker is open.

        Raises:
            Exception: What the store failed with last, where `on_store_error` is `"raise"`.
        """
        if not state.breaker.open:
            return False
        if self.options.on_store_error == "raise" and state.breaker.error is not None:
            raise without_traceback(state.breaker.error)
        return True

    def found(self, key: str, text: str | None) -> Found | None:
        """Read what the store gave.

        Args:
            key: The key that was asked for.
            text: What it gave.

        Returns:
            The result, or None where there is none that can be read.
        """
        entry = None if text is None else unpack(key, text)
        if entry is None:
            return None
        try:
            payload = self.results.undo(entry.payload, entry.codec, key)
            return Found(entry, payload, self.results.loads(payload))
        except Exception as error:  # noqa: BLE001 (a codec or a class of the program's may fail in its own way)
            logger.debug(
                "a stored result of %s cannot be read (%s) and is computed anew", self.keys.prefix, type(error).__name__
            )
            return None

    async def _compute(self, call: Call, flight: Flight, stale: Found | None, *, skip_write: bool = False) -> Outcome:
        # Those that have landed hold nobody up, though a task that one of them left behind still knows of them.
        active_flights.set((*(one for one in active_flights.get() if one.task is not None and not one.task.done()), flight))
        self.results.resolve()
        started, timer = self.clock(), time.perf_counter()
        try:
            result = await self.function(*call.args, **call.kwargs)
        except self.options.error_types:
            if stale is not None and self.clock() < stale.entry.fresh_until + self.error_seconds:
                self.count("stale_hits", "stale_on_error", call.key)
                return Outcome(stale.payload)
            raise
        seconds = time.perf_counter() - timer
        self.count("computations", "computed", call.key, seconds)
        return await self.keep(call, flight, result, started, seconds, skip_write=skip_write)

    async def keep(  # noqa: PLR0913 (a result and how it was had)
        self, call: Call, flight: Flight, result: R, started: float, seconds: float, *, skip_write: bool = False
    ) -> Outcome:
        """Store a result, unless it is not to be, or has been invalidated meanwhile.

        Args:
            call: The call it is of.
            flight: What computed it.
            result: The result.
            started: When its computation began, by the clock.
            seconds: How long that took.
            skip_write: Whether the store is known to fail.

        Returns:
            Its round trip, for each waiter to decode.

        Raises:
            TypeError: The result would come back changed.
        """
        key = call.key
        fresh_seconds = self.options.ttl_of(result)
        if fresh_seconds is None:
            self.tell("not_stored", key)
            if flight.refreshes:
                await self.remove(call)
            try:
                # For each waiter a copy of its own, where that can be had.
                return Outcome(self.results.to_json(result))
            except TypeError:
                return Outcome(None, result)
        payload, applied = self.results.encode(result, key)
        json = self.results.undo(payload, applied, key)
        if flight.discarded:
            if flight.overtaken and flight.refreshes:
                await self.remove(call)
            return Outcome(json)
        fresh_seconds *= 1.0 - self.options.jitter * random.random()  # noqa: S311 (spreads expiries, guards nothing)
        entry = Entry(payload, applied, started, started + fresh_seconds, seconds)
        self.keep_near(call, flight, json, result, entry.fresh_until)
        if not skip_write and not self.passes_by(call.state):
            await self._store_result(call, flight, entry, fresh_seconds)
        if flight.refreshes:
            # What read meanwhile may have found what was there before.
            call.state.discard(key, but=flight)
            self._states.overtake_elsewhere(call)
            self.keep_near(call, flight, json, result, entry.fresh_until)
        return Outcome(json)

    async def _store_result(self, call: Call, flight: Flight, entry: Entry, fresh_seconds: float) -> None:
        """Write a result, and wait for that where the caller is to."""
        state = call.state
        if len(call.loop_state.background) >= MAX_BACKGROUND_TASKS and state.slow_writes >= FAILURES_TO_OPEN:
            return
        older = self._states.writes_elsewhere(call, refreshes=False) if flight.refreshes else []
        text, ttl_seconds = pack(call.key, entry), self.options.kept_seconds(fresh_seconds)

        async def write() -> None:
            if older:
                # They are not to land after this.
                await asyncio.wait(older, timeout=self.options.read_timeout)
            await self._write(call, flight, text, ttl_seconds)

        writing = call.in_order(flight, write)
        # Behind the caller only as far as there is room.
        waits = self.options.write == "await" or len(call.loop_state.background) > MAX_BACKGROUND_TASKS
        # After a few slow writes in a row nobody waits for one, until one has landed in time.
        if waits and state.slow_writes < FAILURES_TO_OPEN:
            # No longer than a read may take: a slow store goes on behind the caller's back.
            done, _ = await asyncio.wait([writing], timeout=self.options.read_timeout)
            if not done:
                state.slow_writes += 1
                self.store_failed(call, TimeoutError())
            elif not writing.cancelled():
                writing.result()

    async def remove(self, call: Call) -> None:
        """Leave nothing older in the store of a result that was asked for anew and is not stored.

        Args:
            call: The call.
        """
        if self.options.near is not None:
            self.options.near.drop(self.near_key(call))
        if self.passes_by(call.state):
            return
        removing = call.in_order(None, lambda: self._delete(call))
        done, _ = await asyncio.wait([removing], timeout=self.options.read_timeout)
        error = TimeoutError() if not done else None if removing.cancelled() else removing.exception()
        if error is not None:
            self.store_failed(call, error)

    async def _write(self, call: Call, flight: Flight, text: str, ttl_seconds: int) -> None:
        started = time.monotonic()
        oversize: ValueTooLargeError | None = None
        try:
            oversize = await self._set(call, flight, text, ttl_seconds)
        except (Exception, asyncio.CancelledError) as error:
            if is_cancelled(error):
                raise
            self.store_failed(call, error)
        else:
            call.state.breaker.succeeded()
            if time.monotonic() - started < self.options.read_timeout:
                call.state.slow_writes = 0
        if oversize is None:
            return
        if self.options.on_oversize == "raise":
            raise oversize
        logger.warning("a result of %s is too large to be stored; compress it with codec=Zstd()", self.keys.prefix)

    async def _set(self, call: Call, flight: Flight, text: str, ttl_seconds: int) -> ValueTooLargeError | None:
        """Set an entry, and remove it again where it is not to be there; give the error of one that is too large."""
        oversize: ValueTooLargeError | None = None
        try:
            if not flight.overtaken:
                await call.store.set(call.key, text, ttl_seconds)
        except ValueTooLargeError as error:
            oversize = error
            self.tell("not_stored", call.key)
        except Exception:
            if flight.overtaken:
                # It may have been stored all the same.
                await call.store.delete(call.key)
            raise
        if flight.overtaken or (oversize is not None and flight.refreshes):
            # It may have landed after what overtook it, or what is there is older than what its caller gets.
            await call.store.delete(call.key)
        return oversize

    async def _delete(self, call: Call) -> None:
        await call.store.delete(call.key)

    def _refresh_behind(self, call: Call, seen: Entry) -> None:
        if call.key not in call.state.behind and len(call.loop_state.background) < MAX_BACKGROUND_TASKS:
            flight = Flight(call.state.behind, call.key)
            task = call.loop_state.in_background(self._refresh(call, flight, seen))
            task.add_done_callback(lambda _: flight.leave_map())

    async def _refresh(self, call: Call, flight: Flight, seen: Entry) -> None:
        """Compute a call anew, unless another process has been faster or is at it: looking costs less than computing."""
        found, store_failed = await self.read(call)
        if found is not None and found.entry.started > seen.started:
            self.keep_near(call, flight, found.payload, found.value, found.entry.fresh_until)
            return
        if not store_failed and not await self.claimed(call, seen.compute_seconds):
            # Until that one is likely to be done, there is no use in asking again.
            await asyncio.sleep(min(seen.compute_seconds, 1.0))
            return
        under_way = call.state.flights.get(call.key)
        if flight.discarded or (under_way is not None and under_way.task is not None):
            return
        # One that only reads brings nothing newer, and the claim is this one's by now.
        flight.compute(self._compute(call, flight, found, skip_write=store_failed))
        try:
            await flight.join()
        except Exception as error:  # noqa: BLE001 (the caller has its answer; the function's own errors may say anything)
            logger.debug("computing %s anew behind a caller failed: %s", call.key, type(error).__name__)

    async def claimed(self, call: Call, compute_seconds: float) -> bool:
        """Tell other processes that this one computes, and say whether none has said so before.

        A hint, which nobody waits for and nothing relies on: without an atomic operation two may go ahead, and a claim whose
        owner has died is void after twice the time that the last computation took. Either costs one computation too many.

        Args:
            call: The call.
            compute_seconds: How long its last computation took.

        Returns:
            Whether to go ahead.
        """
        name = call.key + _CLAIM_SUFFIX
        own = f"{random.getrandbits(64):x}"
        try:
            async with asyncio.timeout(self.options.read_timeout):
                _, _, claimed_at = (await call.store.get(name) or "").partition(" ")
                if claimed_at and self.clock() - float(claimed_at) < max(1.0, 2 * compute_seconds):
                    return False
                await call.store.set(name, f"{own} {self.clock()}", _CLAIM_TTL_SECONDS)
                # Of several that came at once, the last to write goes ahead.
                return (await call.store.get(name) or own).startswith(own)
        except Exception:  # noqa: BLE001 (whatever it is, the store is no help)
            return True

    async def prime(self, call: Call, value: R) -> None:
        """Store a result that was had elsewhere; what is under way is older, and is not to come after it.

        Args:
            call: The call that it is the result of.
            value: The result.

        Raises:
            TypeError: The value would come back changed.
        """
        if self.options.ttl_of(value) is not None:
            # What cannot be stored is to leave everything as it is.
            self.results.to_json(value)
        self.forget(call)
        # Off the map: nobody waits for it.
        flight = Flight({}, call.key)
        flight.refreshes = True
        await self.keep(call, flight, value, self.clock(), 0.0)

    async def invalidate(self, call: Call) -> None:
        """Forget a call's result everywhere that can be reached; a computation under way is not stored.

        Args:
            call: The call.

        Raises:
            CallError: The store could not be reached.
        """
        self.forget(call)
        writes = self._states.writes_elsewhere(call)

        async def delete() -> None:
            try:
                late = (await asyncio.wait(writes, timeout=self.options.read_timeout))[1] if writes else ()
                await self._delete(call)
            finally:
                # What began meanwhile may have read what was there before.
                self.forget(call)
            if late:
                raise CallTimeoutError(
                    "another event loop or store is still writing this result, and may store it after its removal",
                    verb="delete",
                    db_name=call.store.db_name,
                    key=call.key,
                    maybe_applied=True,
                )

        deleting = call.in_order(None, delete)
        try:
            # Shielded: what was asked for is done, whether or not the caller stays.
            await asyncio.shield(deleting)
        except asyncio.CancelledError as error:
            if is_cancelled(error) or not deleting.cancelled():
                raise
            raise StoreClosedError("the cached function was closed before the result was removed") from None

    def forget(self, call: Call) -> None:
        """Keep what is under way for a call in this process from being stored, from being joined, and from the near cache.

        Args:
            call: The call.
        """
        self.overtake(call)
        near = self.options.near
        if near is not None:
            near.drop(self.near_key(call))
            for reference in self._near_stores.keyrefs():
                store = reference()
                if store is not None and store is not call.store and is_same_place(store, call.store):
                    near.drop(((self._scope, store), call.key))

    def overtake(self, call: Call) -> None:
        """Keep what is under way for a call in this process from being stored, and from being joined.

        Args:
            call: The call.
        """
        call.state.discard(call.key)
        self._states.overtake_elsewhere(call)

    def call(self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Gather what a call needs of the running loop and its store.

        Args:
            key: The call's key.
            args: The positional arguments.
            kwargs: The keyword arguments.

        Returns:
            The call.
        """
        store = self._fixed_store or self._store(args, kwargs)
        here = self._here
        if here is None or here[0] is not get_running_loop() or here[2] is not store:
            loop_state = self._states.here()
            state = loop_state.stores.get(store)
            if state is None:
                state = loop_state.stores[store] = StoreState(Breaker(self._probe_of(store)))
            here = self._here = (get_running_loop(), loop_state, store, state)
        return Call(key, args, kwargs, store, here[1], here[3])

    def _store(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AsyncKVStore:
        store = self.options.store
        if store is not None and not isinstance(store, AsyncKVStore):
            return self._store_of_function(store, args, kwargs)
        if store is not None:
            return store
        if self.options.db_name is None:
            return default_store()
        if self._own_store is None:
            self._own_store = AsyncKVStore(self.options.db_name)
        return self._own_store

    def _store_of_function(
        self, function: Callable[..., AsyncKVStore], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AsyncKVStore:
        if not self._store_takes_first:
            return function()
        # A method's instance may be passed by name, too.
        return function(args[0] if args else kwargs.get(self.first_parameter, self._first_default))

    def _probe_of(self, store: AsyncKVStore) -> Callable[[], Coroutine[Any, Any, object]]:
        # Not the store itself, which the breakers' dictionary holds weakly.
        reference = weakref.ref(store)

        async def probe() -> object:
            probed = reference()
            if probed is None:
                return None
            async with asyncio.timeout(self.options.read_timeout):
                return await probed.get(_PROBE_KEY)

        return probe

    def keep_near(self, call: Call, flight: Flight, payload: bytes | str, value: object, fresh_until: float) -> None:
        """Put a result into the near cache, if there is one, unless what brought it has been discarded."""
        near = self.options.near
        if near is not None:
            if not self._has_one_store:
                self._near_stores[call.store] = None
            near.put(self.near_key(call), payload, value, min(self.clock() + near.ttl_seconds, fresh_until), flight)

    def near_key(self, call: Call) -> Hashable:
        """Say under what a call's result stands in the near cache."""
        return (self._near_scope if self._has_one_store else (self._scope, call.store), call.key)

    def _near_scope_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        # Where the store is a function's, each instance may have its own, with other results under the same key.
        return (self._scope, self._store(args, kwargs))

    def store_failed(self, call: Call, error: BaseException) -> None:
        """Count a failure of the store, and raise it where that was asked for."""
        self.count("store_errors", "store_error", call.key)
        call.state.breaker.failed(error, time.monotonic())
        if self.options.on_store_error == "raise":
            if isinstance(error, asyncio.CancelledError):
                # Or whoever asked would look as if somebody had cancelled it.
                raise StoreClosedError("the store gave the call up", db_name=call.store.db_name, key=call.key) from error
            raise error

    def count(self, count: str, kind: EventKind, key: str, seconds: float = 0.0) -> None:
        """Count an event, and tell it."""
        # Exact in several threads, too: an item of a dictionary that is added to in place gives no other thread a turn.
        self.counts[count] += 1
        if self.options.observer is not None:
            self.tell(kind, key, seconds)

    def tell(self, kind: EventKind, key: str, seconds: float = 0.0) -> None:
        """Tell the program's observer, whose failures are its own."""
        if self.options.observer is None:
            return
        try:
            self.options.observer(CacheEvent(kind, key, seconds))
        except Exception:
            logger.exception("the observer of cached calls failed")

    def info(self) -> CacheInfo:
        """Say what has been served, computed and saved.

        Returns:
            The counts of all calls so far.
        """
        counts: dict[str, Any] = {name: int(count) for name, count in self.counts.items() if name != "seconds_saved"}
        return CacheInfo(**counts, seconds_saved=self.counts["seconds_saved"])

    async def aclose(self) -> None:
        """Finish what was begun behind callers in this loop, within the time that a read may take, and cancel the rest."""
        state = self._states.here()
        deadline = time.monotonic() + self.options.read_timeout
        # Round by round: what is computed is written after that.
        while state.background and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait(list(state.background), timeout=left)
        while late := list(state.background):
            for task in late:
                task.cancel()
            await asyncio.wait(late)
        for store_state in list(state.stores.values()):
            await store_state.breaker.aclose()


def _takes_instance(function: object) -> bool:
    """Say whether a function that gives a store is to be called with the method's instance: where it cannot do without."""
    if function is None or isinstance(function, AsyncKVStore):
        return False
    try:
        parameters = inspect.signature(cast("Callable[..., object]", function)).parameters.values()
    except ValueError:
        # Such as operator.attrgetter("kv"), which says nothing of what it takes.
        return True
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return any(one.kind in positional and one.default is one.empty for one in parameters)


def _as_seconds(value: Ttl) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else float(value)
