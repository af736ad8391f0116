"""What a program does with results beside calling: look at them, put them in place, have them forgotten."""

import asyncio
from collections.abc import Sequence
from typing import Any

from aiokv import clock
from aiokv.caching.breaker import is_cancelled
from aiokv.caching.cache import Cache
from aiokv.caching.flights import NO_OUTCOME, Call, Flight, failure
from aiokv.caching.peeked import Peeked
from aiokv.caching.results import NotStorable
from aiokv.caching.stored import Computed
from aiokv.errors import AioKVError, CallTimeoutError, StoreClosedError
from aiokv.store import AsyncKVStore

# As long as a call of a store may take by default; a store of the program's own may hang for longer.
_MAX_WAIT_SECONDS = 30.0


async def peek(cache: Cache, store: AsyncKVStore, calls: Sequence[Call]) -> dict[str, Peeked[Any]]:
    """Look at what is stored of several calls.

    Args:
        cache: The function's cache.
        store: Their store.
        calls: The calls.

    Returns:
        What there is, by key.
    """
    flights = cache.flights_of(store)
    keys = [call.key for call in calls]
    texts, error = await flights.access.read(store, keys, cache.options.read_timeout)
    if error is not None:
        cache.stored.read_failed(store, keys[0], error)
    now = clock.now()
    founds = {call.key: cache.stored.decode((flights.target, call.key), texts.get(call.key)) for call in calls}
    return {
        key: Peeked(found[1], now - found[0].started, now < found[0].fresh_until)
        for key, found in founds.items()
        if found is not None
    }


async def prime(cache: Cache, store: AsyncKVStore, calls: Sequence[Call], values: Sequence[Any]) -> None:
    """Store results that were computed elsewhere, as if the calls had returned them.

    Args:
        cache: The function's cache.
        store: Their store.
        calls: The calls.
        values: Their results.

    Raises:
        TypeError: A value would come back changed.
        ValueError: A value cannot be stored.
        CallError: A value is not known to be stored.
    """
    cache.results.resolve()
    for value in values:
        if cache.options.ttl_of(value) is not None:
            try:
                cache.results.dump(value)
            except NotStorable as error:
                raise ValueError(f"the value cannot be stored: {error}") from None
    if not calls:
        return
    flights = cache.flights_of(store)
    # In no map: nobody joins them.
    batch = [Flight(flights, store, call, cache.stored.supersede(flights, call.key), is_decisive=True) for call in calls]
    now = clock.now()
    work = _store_primed(cache, batch, Computed(list(values), [True] * len(batch), now, now, 0.0))
    flights.run(work, calls[0].key, batch)
    try:
        async with asyncio.timeout(_MAX_WAIT_SECONDS):
            for flight in batch:
                outcome = await flight.wait()
                if outcome is NO_OUTCOME:
                    # The task was cancelled before it began.
                    raise StoreClosedError(
                        "the cached function was closed before the result was stored",
                        verb="set",
                        db_name=store.db_name,
                        key=flight.call.key,
                        maybe_applied=False,
                    )
                if outcome.error is not None:
                    raise outcome.error
    except TimeoutError as timeout:
        if isinstance(timeout, AioKVError):
            raise
        raise CallTimeoutError(
            "the store did not answer", verb="set", db_name=store.db_name, key=calls[0].key, attempts=1, maybe_applied=True
        ) from None


async def invalidate(cache: Cache, store: AsyncKVStore, calls: Sequence[Call]) -> dict[str, BaseException]:
    """Delete results in the store and here; what is under way in this process is not stored.

    Args:
        cache: The function's cache.
        store: Their store.
        calls: The calls.

    Returns:
        The key of each result that may still be stored, with the error.
    """
    if not calls:
        return {}
    flights = cache.flights_of(store)
    # At once, and not when the task begins: what is called after this is newer.
    raised = {call.key: cache.stored.supersede(flights, call.key) for call in calls}
    task = flights.run(cache.stored.delete(flights, store, raised), calls[0].key)
    try:
        # Shielded: what was asked for is done, whether or not the caller stays.
        async with asyncio.timeout(_MAX_WAIT_SECONDS):
            errors = await asyncio.shield(task)
    except TimeoutError:
        for key in raised:
            cache.generations.distrust((flights.target, key), clock.now())
        return {
            key: CallTimeoutError(
                "the store did not answer", verb="delete", db_name=store.db_name, key=key, attempts=1, maybe_applied=True
            )
            for key in raised
        }
    except asyncio.CancelledError as error:
        if is_cancelled(error) or not task.cancelled():
            raise
        return {
            key: StoreClosedError(
                "the cached function was closed before the result was deleted", db_name=store.db_name, key=key
            )
            for key in raised
        }
    return errors


async def _store_primed(cache: Cache, batch: Sequence[Flight], computed: Computed) -> None:
    try:
        await cache.stored.commit(batch, computed, skip_write=False, must=True)
    except BaseException as error:
        for flight in batch:
            flight.end(failure(error))
        if not isinstance(error, Exception):
            raise
