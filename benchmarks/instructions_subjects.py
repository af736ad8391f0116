"""What `instructions.py` runs under valgrind, one subject in a process: set up, `yield`, then the calls that are counted.

python benchmarks/instructions_subjects.py "near, int" 500 http://127.0.0.1:8787
"""

import asyncio
import gc
import importlib
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any

import orjson

from aiokv import AsyncKVStore, HttpOptions, NearCache, kv_cached, kv_cached_many

Run = AsyncGenerator[None, None]
Subject = Callable[[int, str], Run]

KEYS = [f"key-{number}" for number in range(500)]
SMALL: dict[str, object] = {"id": 17, "name": "somebody", "active": True, "score": 1.5}
RECORD: dict[str, object] = {**SMALL, "tags": ["one", "two", "three"], "address": {"city": "Bern", "zip": 3000}}
BATCH = 100
MANY_KEYS = 1_000_000
MANY_WAITERS = 20_000
SLOT_BYTES = 1_000
CONCURRENCY = 64


async def number(key: str) -> int:
    """Stand for work whose result nobody can change."""
    return len(key)


async def small(key: str) -> dict[str, Any]:
    """Stand for work whose result a caller could change."""
    return {**SMALL, "id": len(key)}


async def record(key: str) -> dict[str, Any]:
    """Stand for work whose result comes from a server."""
    return {**RECORD, "id": len(key)}


async def numbers(ids: list[int]) -> dict[int, int]:
    """Stand for work that does many ids at once."""
    return {id_: id_ for id_ in ids}


class Service:
    """An object with a cached method."""

    async def number(self, key: str) -> int:
        """Stand for work of a method."""
        return len(key)


def memory() -> AsyncKVStore:
    """Return a store in this process."""
    return AsyncKVStore("bench", url="memory://")


def near(max_bytes: int = 16 * 1024 * 1024) -> NearCache:
    """Return a near cache that outlives the run."""
    return NearCache(3_600, max_bytes)


async def repeat(call: Callable[[Any], Awaitable[object]], keys: Iterable[Any], calls: int) -> None:
    """Await one call after the other."""
    keys, done = list(keys), 0
    while done < calls:
        for key in keys[: calls - done]:
            await call(key)
        done += len(keys)


async def hits(call: Callable[[Any], Awaitable[object]], calls: int) -> Run:
    """Fill, then hit."""
    await repeat(call, KEYS, 2 * len(KEYS))
    yield
    await repeat(call, KEYS, calls)


async def misses(call: Callable[[Any], Awaitable[object]], calls: int) -> Run:
    """Warm up, then ask for what nobody has asked for before."""
    await repeat(call, KEYS, len(KEYS))
    keys = [f"new-{index}" for index in range(calls)]
    yield
    await repeat(call, keys, calls)


def floor(calls: int, _: str) -> Run:
    """Count what no decorator can beat."""
    held = {key: len(key) for key in KEYS}

    async def look_up(key: str) -> int:
        return held[key]

    return hits(look_up, calls)


def peer(name: str, run: Callable[[Any, int], Run]) -> Subject:
    """Return the subject of a peer, with a time to live as ours has."""

    def subject(calls: int, _: str) -> Run:
        module = importlib.import_module(name)
        if name == "cachebox":
            return run(module.cached(module.TTLCache(100_000, global_ttl=3600))(number), calls)
        if name == "async_lru":
            return run(module.alru_cache(maxsize=100_000, ttl=3600)(number), calls)
        if name == "aiocache":
            return run(module.cached(ttl=3600)(number), calls)
        cache = module.Cache()
        cache.setup("mem://")
        return run(cache(ttl="1h")(number), calls)

    return subject


def near_method(calls: int, _: str) -> Run:
    """Count the near hits of a method."""
    Service.number = kv_cached(ttl=3600, near=near(), store=memory(), ignore=["self"])(Service.number)  # type: ignore[assignment,method-assign]
    service = Service()

    async def run() -> Run:
        for _ in range(2):
            for key in KEYS:
                await service.number(key)
        yield
        for index in range(calls):
            await service.number(KEYS[index % len(KEYS)])

    return run()


async def store_get(calls: int, _: str) -> Run:
    """Count what a hit over memory is made of."""
    store = memory()
    for key in KEYS:
        await store.set(key, "x" * 80)
    yield
    await repeat(store.get, KEYS, calls)


def by_hand(calls: int, _: str) -> Run:
    """Count a miss without a decorator: look, compute, store."""
    store = memory()

    async def call(key: str) -> object:
        text = await store.get(key)
        if text is not None:
            return orjson.loads(text)
        result = await number(key)
        await store.set(key, orjson.dumps(result).decode(), 3600)
        return result

    return misses(call, calls)


async def model_key(calls: int, _: str) -> Run:
    """Count the key of a call whose argument is a pydantic model of 8 fields."""
    cached = kv_cached(ttl=3600, store=memory())(of_order)
    orders = [order_class()(number=index, customer="q", total=1.5, items=[1, 2]) for index in range(100)]
    for order in orders:
        cached.key(order)
    yield
    for index in range(calls):
        cached.key(orders[index % len(orders)])


async def of_order(order: object) -> int:
    """Stand for work on a model."""
    return id(order)


def order_class() -> Any:
    """Return the model, whose library the other subjects do not load."""
    if "Order" not in globals():
        pydantic: Any = importlib.import_module("pydantic")
        fields = {"number": int, "customer": str, "total": float, "items": list[int]}
        defaults = {"paid": (bool, True), "currency": (str, "CHF"), "weight": (int, 3), "note": (str, "")}
        globals()["Order"] = pydantic.create_model(
            "Order", __module__=__name__, **{name: (kind, ...) for name, kind in fields.items()}, **defaults
        )
    return globals()["Order"]


async def get_many(calls: int, _: str) -> Run:
    """Count what a hit of many ids over memory is made of."""
    store = memory()
    for key in KEYS[:BATCH]:
        await store.set(key, "x" * 80)
    yield
    for _ in range(calls // BATCH):
        await store.get_many(KEYS[:BATCH])


def many(*, in_near: bool, new: bool) -> Subject:
    """Return the subject of `kv_cached_many` whose calls hit or miss."""

    async def subject(calls: int, _: str) -> Run:
        cached = kv_cached_many(ttl=3600, near=near() if in_near else None, store=memory())(numbers)
        ids = list(range(BATCH))
        await cached(ids)
        await cached(ids)
        yield
        for start in range(BATCH, BATCH + calls, BATCH):
            await cached(list(range(start, start + BATCH)) if new else ids)

    return subject


async def at_once(call: Callable[[str], Awaitable[object]], calls: int) -> None:
    """Call from several tasks, never the same key at once."""
    remaining = iter([KEYS[index % len(KEYS)] for index in range(calls)])

    async def work() -> None:
        for key in remaining:
            await call(key)

    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))


async def in_turns(call: Callable[[str], Awaitable[object]], calls: int) -> None:
    """Call for so many keys in each turn of the loop, so that all reads of a turn travel in the same batches."""
    keys = [KEYS[index % len(KEYS)] for index in range(calls)]
    for start in range(0, calls, CONCURRENCY):
        await asyncio.gather(*map(call, keys[start : start + CONCURRENCY]))


def through(*, decorated: bool, batching: bool) -> Subject:
    """Return the subject of reads through a server, with distinct keys: each alone, or those of a turn in batches."""
    # Where batches are on, tasks that run freely join them by chance, which no two runs have alike.
    read = in_turns if batching else at_once

    async def subject(calls: int, address: str) -> Run:
        http = HttpOptions(batching=batching)
        async with AsyncKVStore("bench", url=address, credentials="bench:secret", http=http) as store:
            # Valgrind takes fifty times as long: no read may be given up for that.
            cached = kv_cached(ttl=3600, store=store, read_timeout=60)(record)
            entries = {key: cached.key(key) for key in KEYS}

            async def bare(key: str) -> object:
                text = await store.get(entries[key])
                # An entry is a line of the cache's own, then the result's JSON.
                return None if text is None else orjson.loads(text[text.index("\n") + 1 :])

            call: Callable[[str], Awaitable[object]] = cached if decorated else bare
            for key in KEYS:
                await cached(key)
            await read(call, len(KEYS))
            if None in [await bare(key) for key in KEYS]:
                raise RuntimeError("a result was not stored")
            computations = cached.info().computations
            yield
            await read(call, calls)
            if cached.info().computations != computations:
                raise RuntimeError(f"{cached.info().computations - computations} calls were computed anew")

    return subject


def grown(held: int) -> Subject:
    """Return the subject of near hits in a near cache that holds so many keys."""

    async def subject(calls: int, _: str) -> Run:
        store = memory()
        cached: Any = kv_cached(ttl=3600, near=near(held * SLOT_BYTES), store=store)(number)
        await repeat(cached, KEYS, len(KEYS))
        # As a call that computes does in the end; a million whole calls would take half an hour under valgrind.
        cache = cached._cache  # noqa: SLF001 (see above)
        for index in range(held):
            key = f"held-{index}"
            place = (store.target, key)
            cache.near.put(store, place, cache.keys.plain_call((key,), {}), b"1", index, 3600.0, lambda: True)
        step = max(1, held // calls)
        keys = [f"held-{index * step % held}" for index in range(calls)]
        yield
        await repeat(cached, keys, calls)
        if cached.info().near_hits < calls:
            raise RuntimeError(f"of {calls} calls {cached.info().near_hits} were served by the near cache")

    return subject


def cancelled(together: int) -> Subject:
    """Return the subject of waiters that give up one after the other, where so many wait for one computation."""

    async def subject(calls: int, _: str) -> Run:
        async def hang(key: str) -> int:
            await asyncio.Event().wait()
            return len(key)

        cached = kv_cached(ttl=3600, store=memory(), key=lambda key: key)(hang)
        waiters = [asyncio.create_task(cached(f"k-{index // together}")) for index in range(MANY_WAITERS)]
        for _ in range(20):
            await asyncio.sleep(0)
        yield
        for waiter in waiters[:calls]:
            waiter.cancel()
        await asyncio.gather(*waiters[:calls], return_exceptions=True)

    return subject


def decorated(function: Any, run: Callable[[Any, int], Run], **options: Any) -> Subject:
    """Return the subject of a cached function over memory."""
    return lambda calls, _: run(kv_cached(ttl=3600, store=memory(), **options)(function), calls)


SUBJECTS: dict[str, Subject] = {
    "a dict in an async def": floor,
    "cachebox": peer("cachebox", hits),
    "async-lru": peer("async_lru", hits),
    "aiocache": peer("aiocache", hits),
    "cashews": peer("cashews", hits),
    "near, int": decorated(number, hits, near=near()),
    "near, method": near_method,
    "near, small dict": decorated(small, hits, near=near()),
    "store.get": store_get,
    "hit": decorated(number, hits),
    "by hand, miss": by_hand,
    "async-lru, miss": peer("async_lru", misses),
    "aiocache, miss": peer("aiocache", misses),
    "miss": decorated(number, misses),
    "miss, write in background": decorated(number, misses, write="background"),
    "key of a model of 8 fields": model_key,
    "store.get_many": get_many,
    "many, near hit": many(in_near=True, new=False),
    "many, hit": many(in_near=False, new=False),
    "many, miss": many(in_near=False, new=True),
    "get and loads": through(decorated=False, batching=False),
    "hit through a server": through(decorated=True, batching=False),
    "get and loads, in batches": through(decorated=False, batching=True),
    "hit through a server, in batches": through(decorated=True, batching=True),
    "near, 1,000 keys": grown(1_000),
    "near, 1,000,000 keys": grown(MANY_KEYS),
    "cancel, 100 waiters": cancelled(100),
    "cancel, 20,000 waiters": cancelled(MANY_WAITERS),
}


async def main(name: str, calls: int, address: str) -> None:
    """Run one subject; nothing is collected while its calls are counted."""
    # One pass more or less over the whole heap is more than all else that is counted, and a million keys need many.
    gc.disable()
    run = SUBJECTS[name](calls, address)
    await anext(run)
    async for _ in run:
        raise RuntimeError(f"{name} yields twice")
    # The end of the loop would cost more where fewer calls have been made.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
