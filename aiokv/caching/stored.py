"""The results of one function as they are stored: read and decoded, encoded and committed, deleted."""

import asyncio
import functools
import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aiokv import clock
from aiokv.caching.access import SkippedError
from aiokv.caching.breaker import without_traceback
from aiokv.caching.codecs import Codec
from aiokv.caching.entries import Entry, pack, unpack
from aiokv.caching.events import Events
from aiokv.caching.failures import overtaken_error, own_error
from aiokv.caching.flights import ABSENT, Flight, Flights, Outcome, failure
from aiokv.caching.generations import Generations, Place
from aiokv.caching.keys import KeyMaker
from aiokv.caching.near import NearView
from aiokv.caching.options import CacheOptions
from aiokv.caching.results import NotStorable, ResultCodec
from aiokv.caching.writes import Write
from aiokv.errors import StoreClosedError, ValueTooLargeError
from aiokv.limits import MAX_VALUE_BYTES, check_value_size
from aiokv.store import AsyncKVStore

logger = logging.getLogger("aiokv")

_CHANGED = "an argument changed while the function ran; have it change a copy, or leave the argument out (ignore=)"
MAX_BEHIND = 64
"""How many refreshes, and how many writes, may go on behind callers."""


class Found(NamedTuple):
    """A stored result: its entry, and one decoded copy."""

    entry: Entry
    value: Any


# Spares a call of the Python function that makes a `NamedTuple`.
_new_found: Any = tuple.__new__


class Computed(NamedTuple):
    """Results that the function has just returned.

    Args:
        values: One for each flight; `ABSENT` where an id has none.
        unchanged: Whether the arguments of each flight were the same before and after.
        started: When the computation began, in seconds since the epoch.
        ended: When it ended.
        seconds: How long it took for each.
    """

    values: Sequence[Any]
    unchanged: Sequence[bool]
    started: float
    ended: float
    seconds: float


class StoredResults:
    """What one function keeps in stores and in the near cache.

    Args:
        keys: Makes its keys.
        results: Turns its results into JSON and back.
        codecs: What is done to the JSON.
        options: The program's options.
        events: Counts.
        generations: Tell what is superseded.
        near: Its near cache, or None.
    """

    def __init__(  # noqa: PLR0913, PLR0917 (the parts of one function's cache)
        self,
        keys: KeyMaker,
        results: ResultCodec,
        codecs: tuple[Codec, ...],
        options: CacheOptions,
        events: Events,
        generations: Generations,
        near: NearView | None,
    ) -> None:
        self.generations = generations
        self._keys = keys
        self._results = results
        self._codecs = codecs
        self._options = options
        self._events = events
        self._near = near
        self._raises = options.on_store_error == "raise"
        self._is_resolved = False
        self._wait_seconds = options.read_timeout

    def read_failed(self, store: AsyncKVStore, key: str, error: BaseException) -> None:
        """Count a read that failed, and raise its error where `on_store_error` is `"raise"`.

        Args:
            store: The store.
            key: One of the keys.
            error: What `StoreAccess.read` returned.
        """
        if isinstance(error, SkippedError):
            self._raise_if_asked(store, error.error, key)
        else:
            self._events.emit("store_error", key)
            self._raise_if_asked(store, error, key)

    def decode(self, place: Place, text: str | None) -> Found | None:
        """Decode what was read.

        Args:
            place: Target and key.
            text: What was read there.

        Returns:
            What may be served; None where there is nothing, or it cannot be read.
        """
        if text is None or not isinstance(text, str):
            # Not a text: a backend of the program's that decodes nothing.
            return None
        if not self._is_resolved:
            self._results.resolve()
            self._is_resolved = True
        entry = unpack(text, namespace=place[0].db_name, key=place[1], schema=self._results.schema, codecs=self._codecs)
        if entry is None or not self.generations.trusts(place, entry[1]):
            return None
        try:
            found: Found | None = _new_found(Found, (entry, self._results.load(entry[0])))
        except Exception as error:  # noqa: BLE001 (a class of the program's may fail in its own way)
            logger.debug("a stored result of %s is unreadable (%s), and computed anew", self._keys.prefix, type(error).__name__)
            return None
        return found

    def keep_near(self, flight: Flight, entry: Entry, value: object) -> None:
        """Put a result into the near cache, if there is one and the result is not superseded."""
        near, call, store = self._near, flight.call, flight.store
        if near is not None:
            plain = self._keys.plain_call(call.args, call.kwargs) if call.is_settled and near.store is store else None
            fresh_seconds = entry.fresh_until - clock.now()
            near.put(store, flight.place, plain, entry.json, value, fresh_seconds, lambda: flight.may_land(self.generations))

    async def commit(self, batch: Sequence[Flight], computed: Computed, *, skip_write: bool, must: bool = False) -> None:
        """Store what was computed, and end its flights.

        Args:
            batch: The flights, of one store.
            computed: Their results.
            skip_write: Whether the store is known to fail.
            must: Whether a store that fails is an error of the callers, as for `prime`.
        """
        flights = batch[0].flights
        # A refresh waits in any case: until its result has landed, what is read may be older.
        waits = self._options.write == "await" or any(flight.is_decisive for flight in batch)
        outcomes: dict[Flight, Outcome] = {}
        entries: dict[str, Entry] = {}
        writes: list[Write] = []
        is_open = flights.access.breaker.writes.is_open(self._wait_seconds)
        # A prime asks for the store, whatever has failed before.
        can_write = must or not (skip_write or is_open)
        for flight, value, unchanged in zip(batch, computed.values, computed.unchanged, strict=True):
            outcomes[flight], encoded = self._encode(flight, value, computed, unchanged=unchanged)
            if encoded is not None and can_write:
                write, entries[flight.call.key] = encoded
                writes.append(write)
            elif encoded is not None and is_open and self._raises:
                error = without_traceback(flights.access.breaker.writes.error or TimeoutError())
                outcomes[flight] = Outcome(error=own_error(flight.store, error, flight.call.key, "set"))
            # From here on a call reads what is being written, and does not wait for that.
            flights.remove(flight)
        if writes and not waits and flights.writes_behind < MAX_BEHIND:
            _end(outcomes)
        if writes:
            await self._write(batch, writes, entries, outcomes, computed.started, must=must)
        decisive = [flight for flight in batch if flight.is_decisive]
        if decisive:
            await self._settle(decisive, entries, outcomes, computed.started, must=must)
        _end(outcomes)

    async def _write(  # noqa: PLR0913 (what is written, and what becomes of it)
        self,
        batch: Sequence[Flight],
        writes: Sequence[Write],
        entries: dict[str, Entry],
        outcomes: dict[Flight, Outcome],
        started: float,
        *,
        must: bool,
    ) -> None:
        """Write results; take out of `entries` what is not written, and put into `outcomes` what that means for the callers."""
        flights, store = batch[0].flights, batch[0].store
        on_late = None if must else lambda: self._late(outcomes, started)
        flights.writes_behind += 1
        try:
            errors, overtaken = await flights.access.write(store, writes, self._wait_seconds, on_late)
        except asyncio.CancelledError:
            # The results are known all the same; that they replace what is stored is not.
            for flight in batch:
                if flight.is_decisive:
                    self.generations.distrust(flight.place, started)
                if must and outcomes[flight].error is None:
                    closed = StoreClosedError(
                        "the cached function was closed before the result was stored",
                        verb="set",
                        db_name=store.db_name,
                        key=flight.call.key,
                        attempts=1,
                        maybe_applied=True,
                    )
                    outcomes[flight] = Outcome(error=closed)
            _end(outcomes)
            raise
        finally:
            flights.writes_behind -= 1
        for flight in batch:
            key = flight.call.key
            if (error := errors.get(key)) is not None:
                outcomes[flight] = self._write_failed(flight, error, outcomes[flight], must=must)
                del entries[key]
            elif key in overtaken:
                self.generations.distrust(flight.place, started)
                if must:
                    outcomes[flight] = Outcome(error=overtaken_error(store, key, "set"))

    def supersede(self, flights: Flights, key: str) -> int:
        """Keep everything that is under way for a key from being stored, kept and joined; return the new generation."""
        generation = self.generations.raise_for((flights.target, key))
        if self._near is not None:
            self._near.drop((flights.target, key))
        return generation

    async def delete(self, flights: Flights, store: AsyncKVStore, raised: Mapping[str, int]) -> dict[str, BaseException]:
        """Delete what is stored, and keep what is older from coming back.

        Args:
            flights: Those of the running loop and the store's target.
            store: The store.
            raised: The keys, and for each what `supersede` returned.

        Returns:
            What each key that may still be there failed with.
        """
        places = {key: (flights.target, key) for key in raised}

        started = clock.now()
        writes = [
            Write(
                key,
                None,
                0,
                raised[key],
                functools.partial(self.generations.begin, places[key], raised[key]),
                functools.partial(self.generations.is_latest, places[key], raised[key]),
                is_decisive=True,
                distrust=functools.partial(self.generations.distrust, places[key], started),
            )
            for key in raised
        ]
        errors, overtaken = await flights.access.write(store, writes, self._wait_seconds)
        for key in raised:
            if key in errors:
                self._events.emit("store_error", key)
            if key in errors or key in overtaken:
                self.generations.distrust(places[key], started)
            # What began meanwhile may have read what was there before.
            self.generations.land(places[key], raised[key])
            if self._near is not None:
                self._near.drop(places[key])
        failures: dict[str, BaseException] = {key: overtaken_error(store, key, "delete") for key in overtaken}
        failures.update({key: own_error(store, error, key, "delete") for key, error in errors.items()})
        return failures

    def _encode(  # noqa: PLR0911 (one for each way to end)
        self, flight: Flight, value: Any, computed: Computed, *, unchanged: bool
    ) -> tuple[Outcome, tuple[Write, Entry] | None]:
        """Return what the callers of one flight get, and what is to be written for it, if anything is."""
        key, options, store = flight.call.key, self._options, flight.store
        if value is ABSENT:
            return ABSENT, None
        json: bytes | None = None
        try:
            fresh_seconds = options.ttl_of(value) if unchanged else None
            try:
                json = self._results.dump(value)
            except TypeError:
                if fresh_seconds is not None:
                    raise
            if not unchanged:
                reason = (
                    "an argument changed while the function ran; have it change a copy, or leave the argument out (ignore=)"
                )
                self._events.not_stored(key, self._keys.prefix, reason)
                return Outcome(json, value, kind="private"), None
            if fresh_seconds is None or json is None:
                self._events.emit("not_stored", key)
                return Outcome(json, value), None
            own = self._results.load(json)
            if not flight.may_land(self.generations):
                return Outcome(json, own=own), None
            fresh_seconds *= 1.0 - options.jitter * random.random()  # noqa: S311 (spreads expiries, guards nothing)
            entry = Entry(json, computed.started, computed.ended + fresh_seconds, computed.seconds)
            text = pack(entry, namespace=store.db_name, key=key, schema=self._results.schema, codecs=self._codecs)
        except NotStorable as error:
            self._events.not_stored(key, self._keys.prefix, str(error))
            return Outcome(json, value, kind="shared" if unchanged else "private"), None
        except Exception as error:  # noqa: BLE001 (the callers' own)
            return failure(error), None
        if not flight.is_decisive:
            self.keep_near(flight, entry, own)
        return Outcome(json, own=own), (
            self._write_of(flight, text, options.kept_seconds(fresh_seconds), computed.started),
            entry,
        )

    def _write_of(self, flight: Flight, text: str | None, ttl_seconds: int, started: float) -> Write:
        begin = functools.partial(flight.begin_write, self.generations)
        may_stay = functools.partial(flight.may_land, self.generations)
        distrust = functools.partial(self.generations.distrust, flight.place, started)
        return Write(flight.call.key, text, ttl_seconds, flight.generation, begin, may_stay, flight.is_decisive, distrust)

    async def _settle(
        self,
        decisive: Sequence[Flight],
        entries: Mapping[str, Entry],
        outcomes: dict[Flight, Outcome],
        started: float,
        *,
        must: bool,
    ) -> None:
        """Leave nothing older than a refresh or a prime, in the store or in this process."""
        flights, store, timeout = decisive[0].flights, decisive[0].store, self._wait_seconds
        left = [flight for flight in decisive if flight.call.key not in entries and flight.may_land(self.generations)]
        errors: Mapping[str, BaseException] = {}
        if left and not must and flights.access.breaker.writes.is_open(timeout):
            error = flights.access.breaker.writes.error or TimeoutError()
            errors = dict.fromkeys([flight.call.key for flight in left], error)
        elif left:
            deletes = [self._write_of(flight, None, 0, started) for flight in left]
            errors, _ = await flights.access.write(store, deletes, timeout)
        for flight in decisive:
            key = flight.call.key
            if key in errors and must and outcomes[flight].error is None:
                outcomes[flight] = Outcome(error=own_error(store, without_traceback(errors[key]), key))
            landed = self.generations.land(flight.place, flight.generation)
            if key in errors or not landed:
                # What is older may still be in the store, until a later one that is under way has replaced it.
                self.generations.distrust(flight.place, started)
            if self._near is not None:
                self._near.drop(flight.place)
            if landed and key in entries:
                self.keep_near(flight, entries[key], outcomes[flight].own)

    def _late(self, outcomes: dict[Flight, Outcome], started: float) -> None:
        """Let the callers go on, since the store takes longer to write than a caller waits."""
        self._events.emit("store_error", next(iter(outcomes)).call.key)
        for flight, outcome in outcomes.items():
            if flight.is_decisive:
                self.generations.distrust(flight.place, started)
                # What began meanwhile may have read what was there before.
                self.supersede(flight.flights, flight.call.key)
            if self._raises and outcome.error is None:
                outcome = Outcome(error=own_error(flight.store, TimeoutError(), flight.call.key, "set"))  # noqa: PLW2901
            flight.end(outcome)

    def _write_failed(self, flight: Flight, error: BaseException, outcome: Outcome, *, must: bool) -> Outcome:
        """Count a failed write; return what the callers get."""
        key = flight.call.key
        if isinstance(error, ValueTooLargeError):
            # The service may accept less than is known here.
            if self._near is not None:
                self._near.drop(flight.place)
            return self._too_large(flight, error, outcome)
        self._events.emit("store_error", key)
        raises = (must or self._raises) and outcome.error is None
        return Outcome(error=own_error(flight.store, error, key, "set")) if raises else outcome

    def _too_large(self, flight: Flight, error: ValueTooLargeError, outcome: Outcome) -> Outcome:
        if self._options.on_oversize == "raise":
            self._events.emit("not_stored", flight.call.key)
            return Outcome(error=error)
        advice = "" if any(codec.name == "zstd" for codec in self._codecs) else "; compress it with codec=Zstd()"
        self._events.not_stored(flight.call.key, self._keys.prefix, f"it is too large for the store{advice}")
        return outcome

    def _raise_if_asked(self, store: AsyncKVStore, error: BaseException | None, key: str) -> None:
        if self._raises and error is not None:
            raise own_error(store, without_traceback(error), key)


def _end(outcomes: Mapping[Flight, Outcome]) -> None:
    for flight, outcome in outcomes.items():
        flight.end(outcome)


def _check_size(text: str) -> None:
    if len(text) > MAX_VALUE_BYTES // 4:
        check_value_size(len(text) if text.isascii() else len(text.encode()))
