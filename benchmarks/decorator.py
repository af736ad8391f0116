"""CPU of a hit of `kv_cached`, against the hits of other caching decorators and against a bare read of the store.

Two measurements, each in alternating batches of this process's own CPU time, so that a busy machine counts little:

  near    a result in this process: `NearCache` beside async-lru, aiocache, cashews and cachebox, in one event loop
  store   a result in a real `aiokv serve` process over loopback: the decorated function beside `store.get` and
          `orjson.loads` of the same entry, with distinct keys

Peers hand out the one object they hold; aiokv decodes what could be changed by a caller anew at each hit, which is why a
small dict is measured beside an int. Peers that are not installed are left out:

  pip install async-lru aiocache cashews cachebox

  python benchmarks/decorator.py                both
  python benchmarks/decorator.py --only near    one of them

`instructions.py` counts the same and more in instructions, which are the same from run to run whatever the machine does.
The exit status is 1 where an aim is missed.
"""

import argparse
import asyncio
import gc
import importlib
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import orjson
from harness import add_json_option, paired_ratio, progress, report, served, verdict, write_json

from aiokv import AsyncKVStore, NearCache, kv_cached

Call = Callable[[str], Awaitable[object]]

KEYS = [f"key-{number}" for number in range(500)]
NEAR_INT, NEAR_DICT, FLOOR = "aiokv near, int", "aiokv near, small dict", "a dict in an async def"
SMALL: dict[str, object] = {"id": 17, "name": "somebody", "active": True, "score": 1.5}
RECORD: dict[str, object] = {
    "id": 17,
    "name": "somebody",
    "tags": ["one", "two", "three"],
    "address": {"city": "Bern", "zip": 3000},
}
BARE, THROUGH, WITHOUT_EARLY = "bare get and loads", "kv_cached", "kv_cached, early=0"


async def number(key: str) -> int:
    """Stand for work whose result nobody can change."""
    return len(key)


async def small(key: str) -> dict[str, Any]:
    """Stand for work whose result a caller could change."""
    return {**SMALL, "id": len(key)}


async def record(key: str) -> dict[str, Any]:
    """Stand for work whose result comes from the store."""
    return {**RECORD, "id": len(key)}


def floor() -> Call:
    """Give what no decorator can beat."""
    held = {key: len(key) for key in KEYS}

    async def look_up(key: str) -> int:
        return held[key]

    return look_up


def near_int() -> Call:
    """Decorate with aiokv and a near cache."""
    return kv_cached(ttl=3600, near=NearCache(60), store=AsyncKVStore("bench", url="memory://"))(number)


def near_dict() -> Call:
    """Likewise, of a result that each caller gets a copy of."""
    return kv_cached(ttl=3600, near=NearCache(60), store=AsyncKVStore("bench", url="memory://"))(small)


def async_lru() -> Call:
    """Decorate with async-lru, with a time to live as ours has."""
    return importlib.import_module("async_lru").alru_cache(maxsize=1024, ttl=3600)(number)


def aiocache() -> Call:
    """Decorate with aiocache over its memory cache."""
    return importlib.import_module("aiocache").cached(ttl=3600)(number)


def cashews() -> Call:
    """Decorate with cashews over its memory cache."""
    cache = importlib.import_module("cashews").Cache()
    cache.setup("mem://")
    return cache(ttl="1h")(number)


def cachebox() -> Call:
    """Decorate with cachebox, with a time to live as ours has."""
    module = importlib.import_module("cachebox")
    return module.cached(module.TTLCache(1024, global_ttl=3600))(number)


CONTENDERS: dict[str, Callable[[], Call]] = {
    "async-lru": async_lru,
    NEAR_INT: near_int,
    NEAR_DICT: near_dict,
    "cachebox": cachebox,
    "aiocache": aiocache,
    "cashews": cashews,
    FLOOR: floor,
}
PEERS = ("async-lru", "cachebox", "aiocache", "cashews")


def installed() -> dict[str, Callable[[], Call]]:
    """Give the contenders that can run here, and say how to get the others."""
    found = dict(CONTENDERS)
    for name in PEERS:
        try:
            importlib.import_module(name.replace("-", "_"))
        except ImportError:
            print(f"{name} is left out, it is not installed: pip install {name}")
            del found[name]
    return found


async def repeat(call: Call, calls: int) -> None:
    """Await one call after the other."""
    done = 0
    while done < calls:
        for key in KEYS[: calls - done]:
            await call(key)
        done += len(KEYS)


async def cpu_microseconds(call: Call, calls: int) -> float:
    """Give the CPU time of one hit; what has expired meanwhile is fetched before."""
    await repeat(call, len(KEYS))
    gc.collect()
    started = time.process_time()
    await repeat(call, calls)
    return (time.process_time() - started) / calls * 1e6


async def measure_near(contenders: Mapping[str, Callable[[], Call]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Alternate the contenders in one event loop."""
    calls = {name: make() for name, make in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        await cpu_microseconds(call, options.calls // 10)
    for batch in range(options.batches):
        progress(batch, options.batches, "batches")
        order = list(calls.items())
        for name, call in order if batch % 2 == 0 else reversed(order):
            # The slow ones need fewer calls for as good a figure.
            samples[name].append(await cpu_microseconds(call, options.calls // (10 if name in {"aiocache", "cashews"} else 1)))
    progress(options.batches, options.batches, "batches")
    return samples


def judge_near(ratio: Callable[[str, str], float], names: Sequence[str]) -> bool:
    """Compare the near hits with what is aimed at."""
    aims = [
        (NEAR_INT, "async-lru", 1.0),
        (NEAR_DICT, "async-lru", 3.0),
        (NEAR_INT, "aiocache", 1 / 8),
        (NEAR_DICT, "aiocache", 1 / 8),
    ]
    verdicts = [verdict(f"{name} to {base}", ratio(name, base), aim) for name, base, aim in aims if base in names]
    return all(verdicts)


def near(options: argparse.Namespace) -> bool:
    """Measure hits in this process."""
    contenders = installed()
    samples = asyncio.run(measure_near(contenders, options))
    report("CPU of a hit in this process", "us", samples, "async-lru" if "async-lru" in samples else FLOOR)
    return judge_near(lambda name, base: paired_ratio(samples[name], samples[base]), list(samples))


async def cpu_of_reads(call: Call, calls: int, concurrency: int) -> float:
    """Call from several tasks, never the same key at once, and give the CPU time of one call."""
    remaining = iter([KEYS[index % len(KEYS)] for index in range(calls)])

    async def work() -> None:
        for key in remaining:
            await call(key)

    gc.collect()
    started = time.process_time()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return (time.process_time() - started) / calls * 1e6


def bare_read(store: Any, key_of: Callable[[str], str]) -> Call:
    """Give the read that a hit is measured against."""
    entries = {key: key_of(key) for key in KEYS}

    async def read(key: str) -> object:
        text = await store.get(entries[key])
        # An entry is a line of the cache's own, then the result's JSON.
        return None if text is None else orjson.loads(text[text.index("\n") + 1 :])

    return read


async def measure_store(address: str, options: argparse.Namespace) -> bool:
    """Alternate the bare read with the decorated function, at each concurrency."""
    met = True
    async with AsyncKVStore("bench", url=address, credentials="bench:secret") as store:
        plain = kv_cached(ttl=3600, early=0, store=store)(record)
        early = kv_cached(ttl=3600, store=store)(record)
        bare = bare_read(store, plain.key)
        contenders: dict[str, Call] = {BARE: bare, WITHOUT_EARLY: plain, THROUGH: early}
        for key in KEYS:
            await plain(key)
        assert await bare("key-1") == await plain("key-1") == await early("key-1") == await record("key-1")  # noqa: S101
        for concurrency in options.concurrency:
            samples: dict[str, list[float]] = {name: [] for name in contenders}
            for call in contenders.values():
                await cpu_of_reads(call, len(KEYS), concurrency)
            computed = plain.info().computations + early.info().computations
            for batch in range(options.batches):
                progress(batch, options.batches, f"batches, concurrency {concurrency}")
                order = list(contenders.items())
                for name, call in order if batch % 2 == 0 else reversed(order):
                    samples[name].append(await cpu_of_reads(call, options.store_calls, concurrency))
            progress(options.batches, options.batches, f"batches, concurrency {concurrency}")
            assert plain.info().computations + early.info().computations == computed  # noqa: S101
            report(f"Client CPU of a hit through the store, concurrency {concurrency}, distinct keys", "us", samples, BARE)
            for name in (WITHOUT_EARLY, THROUGH):
                times = paired_ratio(samples[name], samples[BARE])
                met &= verdict(f"{name} to {BARE}, concurrency {concurrency}", times, options.store_aim)
    return met


def store(options: argparse.Namespace) -> bool:
    """Measure hits through a server."""
    with served("memory://") as address:
        return asyncio.run(measure_store(address, options))


def main() -> int:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("near", "store"), help="make one measurement")
    parser.add_argument("--calls", type=int, default=20_000, help="hits in a batch in this process (default: %(default)s)")
    parser.add_argument(
        "--store-calls", type=int, default=1_000, help="hits in a batch through the store (default: %(default)s)"
    )
    parser.add_argument("--batches", type=int, default=15, help="batches of each contender (default: %(default)s)")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 64], metavar="N", help="tasks that call the store (default: 1 64)"
    )
    parser.add_argument(
        "--store-aim", type=float, default=1.15, help="largest ratio to a bare read that is no failure (default: %(default)s)"
    )
    add_json_option(parser)
    options = parser.parse_args()
    results = [measure(options) for measure in (near, store) if options.only in {None, measure.__name__}]
    write_json(options)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
