"""The results of one function as they are stored: read and decoded, encoded and committed, deleted."""

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from aiokv import clock
from aiokv.caching.breaker import without_traceback
from aiokv.caching.codecs import Codec
from aiokv.caching.entries import Entry, pack, unpack
from aiokv.caching.events import Events
from aiokv.caching.failures import SkippedError, overtaken_error, own_error
from aiokv.caching.flights import ABSENT, Flight, Flights, Outcome, failure
from aiokv.caching.generations import Generations, Place
from aiokv.caching.keys import KeyMaker
from aiokv.caching.near import NearView
from aiokv.caching.options import CacheOptions
from aiokv.caching.results import NotStorable, ResultCodec, TooLarge
from aiokv.caching.writes import Write
from aiokv.errors import StoreClosedError, ValueTooLargeError
from aiokv.limits import MAX_VALUE_BYTES
from aiokv.store import AsyncKVStore

logger = logging.getLogger("aiokv")

_CHANGED = "an argument changed while the function ran; have it change a copy, or leave the argument out (ignore=)"
MAX_BEHIND = 64
"""How many refreshes, and how many writes, may go on behind callers."""


Found = tuple[Entry, Any]
"""A stored result: its entry, and one decoded copy."""

# Spares a call of the Python function that makes a `NamedTuple`.
_new: Any = tuple.__new__


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
        self._waits = options.write == "await"
        self._is_resolved = False
        self._wait_seconds = options.read_timeout
        # None where they depend on the result, or on chance.
        is_fixed = options.when is None and options.none_ttl is ... and not callable(options.ttl)
        self._ttl_seconds = options.ttl_of(True) if is_fixed else None
        self._kept_seconds = None if self._ttl_seconds is None or options.jitter else options.kept_seconds(self._ttl_seconds)

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
        results = self._results
        entry = unpack(text, place[0].db_name, place[1], results.schema, self._codecs)
        if entry is None or not self.generations.trusts(place, entry[1]):
            return None
        try:
            return entry, results.load(entry[0])
        except Exception as error:  # noqa: BLE001 (a class of the program's may fail in its own way)
            logger.debug("a stored result of %s is unreadable (%s), and computed anew", self._keys.prefix, type(error).__name__)
            return None

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
        flights, values = batch[0].flights, computed.values
        outcomes: dict[Flight, Outcome] = {}
        entries: dict[str, Entry] = {}
        writes: list[Write] = []
        decisive: list[Flight] = []
        is_open = flights.access.breaker.writes.is_open(self._wait_seconds)
        # A prime asks for the store, whatever has failed before.
        can_write = must or not (skip_write or is_open)
        for index, flight in enumerate(batch):
            outcome, encoded = self._encode(flight, values[index], computed, computed.unchanged[index])
            if encoded is not None and can_write:
                write, entries[flight.call[0]] = encoded
                writes.append(write)
            elif encoded is not None and is_open and self._raises:
                error = without_traceback(flights.access.breaker.writes.error or TimeoutError())
                outcome = Outcome(error=own_error(flight.store, error, flight.call.key, "set"))
            outcomes[flight] = outcome
            if flight.is_decisive:
                decisive.append(flight)
            # From here on a call reads what is being written, and does not wait for that.
            flights.remove(flight)
        if writes:
            # A refresh waits in any case: until its result has landed, what is read may be older.
            if not (self._waits or decisive) and flights.writes_behind < MAX_BEHIND:
                _end(outcomes)
            flights.writes_behind += 1
            on_late = None if must else self._late
            try:
                errors, overtaken = await flights.access.write(
                    batch[0].store, writes, self._wait_seconds, on_late, (outcomes, computed.started)
                )
            except asyncio.CancelledError:
                self._end_without_knowing(decisive, outcomes, computed.started, must=must)
                raise
            finally:
                flights.writes_behind -= 1
            if errors or overtaken:
                self._written(batch, entries, outcomes, errors, overtaken, computed.started, must=must)
        if decisive:
            await self._settle(decisive, entries, outcomes, computed.started, must=must)
        _end(outcomes)

    def _end_without_knowing(
        self, decisive: Sequence[Flight], outcomes: dict[Flight, Outcome], started: float, *, must: bool
    ) -> None:
        """End flights whose write was cancelled: the results are known, that they replace what is stored is not."""
        for flight in decisive:
            self.generations.distrust(flight.place, started)
            if must and outcomes[flight].error is None:
                closed = StoreClosedError(
                    "the cached function was closed before the result was stored",
                    verb="set",
                    db_name=flight.store.db_name,
                    key=flight.call.key,
                    attempts=1,
                    maybe_applied=True,
                )
                outcomes[flight] = Outcome(error=closed)
        _end(outcomes)

    def _written(  # noqa: PLR0913, PLR0917 (what was written, and what has become of it)
        self,
        batch: Sequence[Flight],
        entries: dict[str, Entry],
        outcomes: dict[Flight, Outcome],
        errors: Mapping[str, BaseException],
        overtaken: AbstractSet[str],
        started: float,
        *,
        must: bool,
    ) -> None:
        """Take out of `entries` what could not be written, and put into `outcomes` what that means for the callers."""
        for flight in batch:
            key = flight.call.key
            if (error := errors.get(key)) is not None:
                outcomes[flight] = self._write_failed(flight, error, outcomes[flight], must=must)
                del entries[key]
            elif key in overtaken:
                self.generations.distrust(flight.place, started)
                if must:
                    outcomes[flight] = Outcome(error=overtaken_error(flight.store, key, "set"))

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
        writes = [Write(self.generations, places[key], raised[key], started, None, 0, is_decisive=True) for key in raised]
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

    def _encode(  # noqa: C901, PLR0911 (one for each way to end)
        self,
        flight: Flight,
        value: Any,
        computed: Computed,
        unchanged: bool,  # noqa: FBT001 (one for each miss, so by position)
    ) -> tuple[Outcome, tuple[Write, Entry] | None]:
        """Return what the callers of one flight get, and what is to be written for it, if anything is."""
        if value is ABSENT:
            return ABSENT, None
        key, results = flight.call.key, self._results
        json: bytes | None = None
        try:
            fresh_seconds = (self._ttl_seconds or self._options.ttl_of(value)) if unchanged else None
            try:
                json = results.dump(value)
            except TypeError:
                if fresh_seconds is not None:
                    raise
            if not unchanged:
                self._events.not_stored(key, self._keys.prefix, _CHANGED)
                return Outcome(json, value, kind="private"), None
            if fresh_seconds is None or json is None:
                self._events.emit("not_stored", key)
                return Outcome(json, value), None
            own = results.load(json)
            if not flight.may_land(self.generations):
                return Outcome(json, own=own), None
            if self._options.jitter:
                fresh_seconds *= 1.0 - self._options.jitter * random.random()  # noqa: S311 (spreads expiries, guards nothing)
            entry: Entry = _new(Entry, (json, computed.started, computed.ended + fresh_seconds, computed.seconds))
            text = pack(entry, flight.place[0].db_name, key, results.schema, self._codecs)
        except NotStorable as error:
            if isinstance(error, TooLarge) and self._options.on_oversize == "raise":
                self._events.emit("not_stored", key)
                return failure(ValueTooLargeError(str(error))), None
            self._events.not_stored(key, self._keys.prefix, str(error))
            return Outcome(json, value, kind="shared" if unchanged else "private"), None
        except Exception as error:  # noqa: BLE001 (the callers' own)
            return failure(error), None
        if self._near is not None and not flight.is_decisive:
            self.keep_near(flight, entry, own)
        outcome: Outcome = _new(Outcome, (json, None, None, own, "shared", None))
        kept_seconds = self._kept_seconds or self._options.kept_seconds(fresh_seconds)
        return outcome, (self._write_of(flight, text, kept_seconds, computed.started), entry)

    def _write_of(self, flight: Flight, text: str | None, ttl_seconds: int, started: float) -> Write:
        return Write(self.generations, flight.place, flight.generation, started, text, ttl_seconds, flight.is_decisive)

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
            return self._too_large(flight, error, outcome, must=must)
        self._events.emit("store_error", key)
        raises = (must or self._raises) and outcome.error is None
        return Outcome(error=own_error(flight.store, error, key, "set")) if raises else outcome

    def _too_large(self, flight: Flight, error: ValueTooLargeError, outcome: Outcome, *, must: bool) -> Outcome:
        if must or self._options.on_oversize == "raise":
            self._events.emit("not_stored", flight.call.key)
            return Outcome(error=error)
        is_compressed = self._results.is_packed or any(codec.name == "zstd" for codec in self._codecs)
        advice = "return less of it" if is_compressed else "compress it with codec=Zstd()"
        size = "" if outcome.json is None else f" ({len(outcome.json):,} bytes as JSON, and it takes {MAX_VALUE_BYTES:,})"
        self._events.not_stored(flight.call.key, self._keys.prefix, f"it is too large for the store{size}; {advice}")
        return outcome

    def _raise_if_asked(self, store: AsyncKVStore, error: BaseException | None, key: str) -> None:
        if self._raises and error is not None:
            raise own_error(store, without_traceback(error), key)


def _end(outcomes: Mapping[Flight, Outcome]) -> None:
    for flight, outcome in outcomes.items():
        flight.end(outcome)
