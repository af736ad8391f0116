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
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

from aiokv.caching.breaker import FAILURES_TO_OPEN, Breaker
from aiokv.caching.codec import ResultCodec
from aiokv.caching.entry import Entry, Freshness, pack, unpack
from aiokv.caching.flight import Flight, Outcome, active_flights
from aiokv.caching.keys import KeyMaker
from aiokv.caching.near import Slot
from aiokv.caching.options import CacheEvent, CacheOptions, EventKind, Ttl
from aiokv.caching.patience import Patience
from aiokv.errors import AioKVError, ValueTooLargeError
from aiokv.store import AsyncKVStore, default_store

R = TypeVar("R")

logger = logging.getLogger("aiokv")

MAX_BACKGROUND_TASKS = 64
_CLAIM_SUFFIX = ":refreshing"
_CLAIM_TTL_SECONDS = 60
_PROBE_KEY = "aiokv-probe"
_MAX_REMEMBERED_SLOTS = 4_096
_MAX_REMEMBERED_CHARS = 512

MISSED = object()

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


class StoreState:
    """What is under way in one event loop with one store."""

    def __init__(self, breaker: Breaker) -> None:
        self.breaker = breaker
        self.flights: dict[str, Flight] = {}
        # Computations behind callers, which nobody waits for as long as there is something to serve.
        self.behind: dict[str, Flight] = {}
        # Computations of several keys at once, which nobody joins.
        self.apart: set[Flight] = set()
        # The last write of each key: the next one, or a delete, comes after it.
        self.writing: dict[str, asyncio.Task[None]] = {}
        # How many in a row took longer than a caller waits.
        self.slow_writes = 0


class LoopState:
    """What belongs to one event loop: background tasks, and what is under way with each store."""

    def __init__(self, read_timeout: float) -> None:
        self.patience = Patience(read_timeout)
        self.background: set[asyncio.Task[Any]] = set()
        self.stores: weakref.WeakKeyDictionary[AsyncKVStore, StoreState] = weakref.WeakKeyDictionary()


class Call(NamedTuple):
    """One call of a cached function, with what it needs of its surroundings."""

    key: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    store: AsyncKVStore
    loop_state: LoopState
    state: StoreState


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
        has_one_store = options.store is None or isinstance(options.store, AsyncKVStore)
        self._scope = next(_scopes)
        self._near_scope: Hashable = (self._scope,) if has_one_store else None
        parameters = inspect.signature(function).parameters
        self._first_parameter = next(iter(parameters), "")
        self._first_default = parameters[self._first_parameter].default if parameters else None
        self._store_takes_first = not has_one_store and bool(inspect.signature(cast("Any", options.store)).parameters)
        self._states: dict[asyncio.AbstractEventLoop, LoopState] = {}
        # Of the last call, which most likely is that of the next; one attribute, since loops of several threads change it.
        self._here: tuple[asyncio.AbstractEventLoop, LoopState, AsyncKVStore, StoreState] | None = None

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
            slot = near.slots.get((self._near_scope or self._near_scope_of(args, kwargs), key))
            if slot is not None and (result := self.near_hit(slot, key)) is not MISSED:
                self._remember_slot(slot, args, kwargs)
                return cast("R", result)
        call = self.call(key, args, kwargs)
        flights = call.state.flights
        while True:
            flight = flights.get(key)
            if flight is None:
                flight = Flight(flights, key)
                if mode == "use":
                    # This task leads: it reads the store itself, which costs least where there is something to serve.
                    try:
                        found, store_failed = await self.read(call)
                        if found is not None and self._serves(call, flight, found):
                            flight.end(Outcome(found.payload))
                            return cast("R", found.value)
                    except BaseException as error:
                        flight.fail(error)
                        raise
                    flight = self._begin(call, flight, found, store_failed=store_failed)
                else:
                    self._begin_refresh(call, flight)
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
                return self.own_copy(outcome)

    def near_hit(self, slot: Slot, key: str = "") -> Any:
        """Serve what the near cache has, if it still may.

        Args:
            slot: Where it has it.
            key: The call's key, if it was made.

        Returns:
            The result, which no other caller holds unless it is immutable; `MISSED` where its time has come.
        """
        # In this order: another thread may be letting go of the slot.
        payload, value = slot.payload, slot.value
        if self.clock() >= slot.until:
            return MISSED
        slot.visited = True
        self.counts["near_hits"] += 1
        if self._observed:
            self.tell("near_hit", key)
        return value if payload is None else self.results.loads(payload)

    def _remember_slot(self, slot: Slot, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # An observer is told the key, and a store of the call's own is part of the place in the near cache.
        if self._near_scope is None or self.options.observer is not None:
            return
        call = self.keys.plain_call(args, kwargs)
        # Long arguments would be kept here beside the near cache's own bound.
        if call is not None and sum(len(value) for value in call if isinstance(value, str | bytes)) <= _MAX_REMEMBERED_CHARS:
            if len(self.near_slots) >= _MAX_REMEMBERED_SLOTS:
                self.near_slots.clear()
            self.near_slots[call] = slot

    def own_copy(self, outcome: Outcome) -> R:
        """Make the result that one waiter gets."""
        return cast("R", outcome.value if outcome.payload is None else self.results.load(outcome.payload))

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
        flight.refreshes = True
        flight.compute(self._compute(call, flight, None))

    def _serves(self, call: Call, flight: Flight, found: Found) -> bool:
        """Decide whether what was found is served, and whether it is computed anew behind that."""
        entry, now = found.entry, self.clock()
        freshness = entry.freshness(now, self.stale_seconds)
        if freshness is Freshness.EXPIRED:
            return False
        if freshness is Freshness.STALE:
            self.count("stale_hits", "stale_hit", call.key)
            self._refresh_behind(call, entry)
        else:
            self.count("hits", "hit", call.key)
            if self.options.near is not None and not flight.discarded:
                self.keep_near(call, found.payload, found.value, entry.fresh_until)
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
        if self.passes_by(call.state):
            return None, True
        try:
            with call.loop_state.patience.bound():
                pending = call.state.writing.get(call.key)
                if pending is not None:
                    # What is being written or deleted comes before what is read.
                    await asyncio.wait([pending])
                text = await call.store.get(call.key)
        except (AioKVError, TimeoutError, OSError) as error:
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
            raise copy.copy(state.breaker.error)
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
            return Found(entry, payload, self.results.load(payload))
        except Exception as error:  # noqa: BLE001 (a codec or a class of the program's may fail in its own way)
            logger.debug(
                "a stored result of %s cannot be read (%s) and is computed anew", self.keys.prefix, type(error).__name__
            )
            return None

    async def _compute(self, call: Call, flight: Flight, stale: Found | None, *, skip_write: bool = False) -> Outcome:
        # Those that have landed hold nobody up, though a task that one of them left behind still knows of them.
        active_flights.set((*(one for one in active_flights.get() if one.task is not None and not one.task.done()), flight))
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
            try:
                # For each waiter a copy of its own, where that can be had.
                return Outcome(self.results.to_json(result))
            except TypeError:
                return Outcome(None, result)
        payload, applied = self.results.encode(result, key)
        json = self.results.undo(payload, applied, key)
        if flight.discarded:
            return Outcome(json)
        fresh_seconds *= 1.0 - self.options.jitter * random.random()  # noqa: S311 (spreads expiries, guards nothing)
        entry = Entry(payload, applied, started, started + fresh_seconds, seconds)
        self.keep_near(call, json, result, entry.fresh_until)
        loaded = len(call.loop_state.background) >= MAX_BACKGROUND_TASKS and call.state.slow_writes >= FAILURES_TO_OPEN
        if not skip_write and not loaded and not self.passes_by(call.state):
            text, ttl_seconds = pack(key, entry), self.options.kept_seconds(fresh_seconds)
            writing = self._in_order(call, lambda: self._write(call, text, ttl_seconds))
            # After a few slow writes in a row nobody waits for one, until one has landed in time.
            if self.options.write == "await" and call.state.slow_writes < FAILURES_TO_OPEN:
                # No longer than a read may take: a slow store goes on behind the caller's back.
                done, _ = await asyncio.wait([writing], timeout=self.options.read_timeout)
                if done:
                    writing.result()
                else:
                    call.state.slow_writes += 1
                    self.store_failed(call, TimeoutError())
        return Outcome(json)

    async def _write(self, call: Call, text: str, ttl_seconds: int) -> None:
        started = time.monotonic()
        try:
            await call.store.set(call.key, text, ttl_seconds)
        except ValueTooLargeError:
            self.tell("not_stored", call.key)
            if self.options.on_oversize == "raise":
                raise
            logger.warning("a result of %s is too large to be stored; compress it with codec=Zstd()", self.keys.prefix)
        except (AioKVError, TimeoutError, OSError) as error:
            self.store_failed(call, error)
        else:
            call.state.breaker.succeeded()
            if time.monotonic() - started < self.options.read_timeout:
                call.state.slow_writes = 0

    def _in_order(self, call: Call, work: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
        """Write or delete once what was written before under the same key has landed, or it might land afterwards."""
        writing, key = call.state.writing, call.key
        previous = writing.get(key)

        async def after_the_previous() -> None:
            if previous is not None:
                await asyncio.wait([previous])
            await work()

        def forget(task: "asyncio.Task[None]") -> None:
            if writing.get(key) is task:
                del writing[key]

        task = writing[key] = self.in_background(call.loop_state, after_the_previous())
        task.add_done_callback(forget)
        return task

    def _refresh_behind(self, call: Call, seen: Entry) -> None:
        if call.key not in call.state.behind and len(call.loop_state.background) < MAX_BACKGROUND_TASKS:
            flight = Flight(call.state.behind, call.key)
            task = self.in_background(call.loop_state, self._refresh(call, flight, seen))
            task.add_done_callback(lambda _: flight.leave_map())

    async def _refresh(self, call: Call, flight: Flight, seen: Entry) -> None:
        """Compute a call anew, unless another process has been faster or is at it: looking costs less than computing."""
        found, store_failed = await self.read(call)
        if found is not None and found.entry.started > seen.started:
            if not flight.discarded:
                self.keep_near(call, found.payload, found.value, found.entry.fresh_until)
            return
        if not store_failed and not await self._claimed(call, seen.compute_seconds):
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

    async def _claimed(self, call: Call, compute_seconds: float) -> bool:
        """Tell other processes that this one computes, and say whether none has said so before.

        A hint, which nobody waits for and nothing relies on: without an atomic operation two may go ahead, and a claim whose
        owner has died is void after twice the time that the last computation took. Either costs one computation too many.
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
        except (AioKVError, TimeoutError, OSError, ValueError):
            return True

    async def invalidate(self, call: Call) -> None:
        """Forget a call's result everywhere that can be reached; a computation under way is not stored.

        Args:
            call: The call.

        Raises:
            CallError: The store could not be reached.
        """
        self.forget(call)
        deleting = self._in_order(call, lambda: call.store.delete(call.key))
        # Shielded: what was asked for is done, whether or not the caller stays.
        await asyncio.shield(deleting)
        # What began meanwhile may have read what was there before.
        self.forget(call)

    def forget(self, call: Call) -> None:
        """Keep what is under way for a call from being stored, from being joined, and from the near cache.

        Args:
            call: The call.
        """
        for flights in (call.state.flights, call.state.behind):
            flight = flights.get(call.key)
            if flight is not None:
                flight.discarded = True
                flight.leave_map()
        for flight in call.state.apart:
            if flight.key == call.key:
                flight.discarded = True
        if self.options.near is not None:
            self.options.near.drop(self.near_key(call))

    def call(self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Gather what a call needs of the running loop and its store.

        Args:
            key: The call's key.
            args: The positional arguments.
            kwargs: The keyword arguments.

        Returns:
            The call.
        """
        store = self._store(args, kwargs)
        here = self._here
        if here is None or here[0] is not asyncio.get_running_loop() or here[2] is not store:
            loop_state = self._loop_state()
            state = loop_state.stores.get(store)
            if state is None:
                state = loop_state.stores[store] = StoreState(Breaker(self._probe_of(store)))
            here = self._here = (asyncio.get_running_loop(), loop_state, store, state)
        return Call(key, args, kwargs, store, here[1], here[3])

    def _loop_state(self) -> LoopState:
        loop = asyncio.get_running_loop()
        state = self._states.get(loop)
        if state is None:
            for old in [old for old in list(self._states) if old.is_closed()]:
                self._states.pop(old, None)
            state = self._states.setdefault(loop, LoopState(self.options.read_timeout))
        return state

    def _store(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AsyncKVStore:
        store = self.options.store
        if isinstance(store, AsyncKVStore):
            return store
        if store is not None:
            return self._store_of_function(store, args, kwargs)
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
        return function(args[0] if args else kwargs.get(self._first_parameter, self._first_default))

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

    def keep_near(self, call: Call, payload: bytes | str, value: object, fresh_until: float) -> None:
        """Put a result into the near cache, if there is one."""
        near = self.options.near
        if near is not None:
            near.put(self.near_key(call), payload, value, min(self.clock() + near.ttl_seconds, fresh_until))

    def near_key(self, call: Call) -> Hashable:
        """Say under what a call's result stands in the near cache."""
        return (self._near_scope or self._near_scope_of(call.args, call.kwargs), call.key)

    def _near_scope_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        # Where the store is a function's, each instance may have its own, with other results under the same key.
        store = self._store(args, kwargs)
        return (self._scope, store)

    def store_failed(self, call: Call, error: BaseException) -> None:
        """Count a failure of the store, and raise it where that was asked for."""
        self.count("store_errors", "store_error", call.key)
        call.state.breaker.failed(error, time.monotonic())
        if self.options.on_store_error == "raise":
            raise error

    def in_background(self, state: LoopState, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run work behind the caller, held until it is done."""
        task = asyncio.create_task(work)
        state.background.add(task)
        task.add_done_callback(state.background.discard)
        task.add_done_callback(_retrieve)
        return task

    def count(self, count: str, kind: EventKind, key: str, seconds: float = 0.0) -> None:
        """Count an event, and tell it."""
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
        state = self._loop_state()
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


def _retrieve(task: "asyncio.Task[Any]") -> None:
    # Whoever waited has its error; where nobody did, it was counted and told.
    if not task.cancelled():
        task.exception()


def _as_seconds(value: Ttl) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else float(value)
