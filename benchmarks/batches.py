"""Many keys over HTTP: batches and transparent batching, beside calls of single keys, bare aiohttp and SQLite itself.

  one         instructions of a get that is alone: through a store that batches, beside one with `HttpOptions(batching=False)`
  many        instructions of the client for each key of `get_many` of 100 keys, beside bare aiohttp's for a GET of each
  at once     CPU of the client for each of 64 gets at once, beside bare aiohttp's: alternating batches in this process
  bulk        seconds for 100,000 keys written and read in batches of 1,000: over HTTP by a server over SQLite, beside the same
              calls to SQLite in this process, in alternating rounds

Instructions are counted under valgrind, the kernel's left out: two runs of each, with fewer and with more calls, and the
difference divided by the calls between. They are the same from run to run, whatever else the machine does. The server is
another process, and its work does not count but in "bulk".

  python benchmarks/batches.py                   about five minutes on 2 idle cores
  python benchmarks/batches.py --only bulk       one of the four
  python benchmarks/batches.py --json batches.json

The exit status is 1 where an aim is missed.
"""

import argparse
import asyncio
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from harness import (
    add_json_option,
    count_instructions,
    has_valgrind,
    note_aim,
    note_table,
    paired_ratio,
    progress,
    served,
    verdict,
    where,
    write_json,
)
from yarl import URL

from aiokv import AsyncKVStore, HttpOptions
from aiokv.backends.capabilities import BatchBackend, Entry
from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.sqlite import SqliteBackend

KINDS = ("one", "many", "at once", "bulk")
KEYS = [f"key-{number}" for number in range(100)]
BATCH_KEYS = 1_000
TTL_SECONDS = 3_600
AIMS = {"one": 1.02, "many": 25_000.0, "at once": 0.4, "bulk": 3.0}
# For each counted subject: with how many calls the two runs are.
SUBJECTS = {"one": (200, 1_000), "one, no batching": (200, 1_000), "many": (4, 24), "bare aiohttp": (200, 1_000)}

Figures = dict[str, Any]


def headers() -> dict[str, str]:
    """Return what the store's requests bear, too."""
    return {"Authorization": "Bearer of-the-same-length-as-a-token-is", "Accept": "application/json"}


async def run_subject(subject: str, calls: int, address: str, value: str) -> None:
    """Make the calls of one subject, and end the process: it runs under valgrind."""
    # One pass more or less over the whole heap is more than all else that is counted.
    gc.disable()
    options = HttpOptions(batching=subject != "one, no batching")
    async with (
        AsyncKVStore("bench", url=address, http=options) as store,
        aiohttp.ClientSession(headers=headers()) as session,
    ):
        await store.set_many(dict.fromkeys(KEYS, value))
        backend = RemoteBackend(URL(address), options=options)
        await backend.get("bench", KEYS[0])

        async def bare_get(key: str) -> object:
            async with session.get(f"{address}/get/bench/{key}") as response:
                return orjson.loads(await response.read())["value"]

        async def make(calls: int) -> None:
            if subject == "many":
                for _ in range(calls):
                    await backend.get_many("bench", KEYS)
                return
            get: Callable[[str], Awaitable[object]] = bare_get if subject == "bare aiohttp" else store.get
            for number in range(calls):
                await get(KEYS[number % len(KEYS)])

        await make(20)
        await make(calls)
        # The end of the loop would cost more where fewer calls have been made.
        os._exit(0)


def count(kinds: list[str], address: str, options: argparse.Namespace) -> Figures:
    """Count the instructions of a call of each subject that a kind needs."""
    subjects = [name for name in SUBJECTS if name.split(",")[0] in kinds or (name == "bare aiohttp" and "many" in kinds)]
    jobs = [(subject, calls) for subject in subjects for calls in SUBJECTS[subject]]
    totals: dict[tuple[str, int], int] = {}

    def run(job: tuple[str, int]) -> int:
        arguments = ["--subject", job[0], str(job[1]), address, "--value-bytes", str(options.value_bytes)]
        return count_instructions([__file__, *arguments])

    # Writes the bytecode that the counted runs read.
    run((subjects[-1], 1))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for job, total in zip(jobs, pool.map(run, jobs), strict=True):
            totals[job] = total
            progress(len(totals), len(jobs), "runs under valgrind")
    return {
        subject: (totals[subject, more] - totals[subject, fewer]) / (more - fewer)
        for subject, (fewer, more) in SUBJECTS.items()
        if subject in subjects
    }


async def measure_at_once(address: str, options: argparse.Namespace) -> Figures:
    """Alternate the contenders; return CPU microseconds of each of 64 gets at once, batch by batch."""
    async with AsyncKVStore("bench", url=address) as store, aiohttp.ClientSession(headers=headers()) as session:
        await store.set_many(dict.fromkeys(KEYS, "x" * options.value_bytes))

        async def bare_get(key: str) -> object:
            async with session.get(f"{address}/get/bench/{key}") as response:
                return orjson.loads(await response.read())["value"]

        contenders: dict[str, Callable[[str], Awaitable[object]]] = {"bare aiohttp": bare_get, "AsyncKVStore": store.get}
        samples: dict[str, list[float]] = {name: [] for name in contenders}

        async def run(get: Callable[[str], Awaitable[object]]) -> float:
            remaining = iter([KEYS[number % len(KEYS)] for number in range(options.calls)])

            async def work() -> None:
                for key in remaining:
                    await get(key)

            gc.collect()
            started = time.process_time()
            await asyncio.gather(*(work() for _ in range(64)))
            return (time.process_time() - started) / options.calls * 1e6

        for get in contenders.values():
            await run(get)
        for batch in range(options.rounds):
            progress(batch, options.rounds, "batches")
            for name in list(contenders)[:: 1 if batch % 2 == 0 else -1]:
                samples[name].append(await run(contenders[name]))
        progress(options.rounds, options.rounds, "batches")
    return dict(samples)


async def write_and_read(backend: BatchBackend, db_name: str, options: argparse.Namespace) -> tuple[float, float]:
    """Write keys and read them in batches, a few at once; return the seconds of each."""
    value = "x" * options.value_bytes
    keys = [f"key-{number}" for number in range(options.keys)]
    chunks = [keys[start : start + BATCH_KEYS] for start in range(0, len(keys), BATCH_KEYS)]

    async def each(call: Callable[[list[str]], Awaitable[None]]) -> float:
        remaining = iter(chunks)

        async def work() -> None:
            for chunk in remaining:
                await call(chunk)

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(4)))
        return time.perf_counter() - started

    async def write(chunk: list[str]) -> None:
        if any(await backend.set_many(db_name, [Entry(key, value, TTL_SECONDS) for key in chunk])):
            raise RuntimeError("a write failed")

    async def read(chunk: list[str]) -> None:
        if any(outcome != value for outcome in await backend.get_many(db_name, chunk)):
            raise RuntimeError("a read failed")

    return await each(write), await each(read)


async def measure_bulk(options: argparse.Namespace) -> Figures:
    """Alternate SQLite in this process and behind a server; return the seconds of each round."""
    samples: dict[str, list[float]] = {name: [] for name in ("SQLite", "over HTTP")}
    parts: dict[str, list[tuple[float, float]]] = {name: [] for name in samples}
    with (
        tempfile.TemporaryDirectory(dir=options.folder or Path.cwd()) as folder,
        served(f"sqlite:///{folder}/served.db") as address,
    ):
        local, remote = SqliteBackend(Path(folder) / "local.db"), RemoteBackend(URL(address))
        if not isinstance(local, BatchBackend):
            raise RuntimeError("SQLite takes no batches here")  # noqa: TRY004 (of an older version)
        await remote.get("bench", "learns what the server can")
        contenders: dict[str, BatchBackend] = {"SQLite": local, "over HTTP": remote}
        for number in range(options.rounds):
            progress(number, options.rounds, "rounds")
            for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
                seconds = await write_and_read(contenders[name], f"bench-{number}", options)
                parts[name].append(seconds)
                samples[name].append(sum(seconds))
        progress(options.rounds, options.rounds, "rounds")
        await remote.aclose()
        await local.aclose()
    for name, of_rounds in parts.items():
        writes, reads = zip(*of_rounds, strict=True)
        print(f"  {name:<10} {statistics.median(writes):7.2f} s to write, {statistics.median(reads):7.2f} s to read")
    return dict(samples)


def judge(figures: Figures) -> dict[str, bool]:
    """Print the figures and the aims; return which were met."""
    met: dict[str, bool] = {}
    if "one" in figures:
        alone, plain = figures["one"], figures["one, no batching"]
        print(f"\nA get alone: {alone:,.0f} instructions, without batching {plain:,.0f}")
        note_table("A get alone", ["instructions"], {"with batching": [alone], "without": [plain]})
        met["one"] = verdict("a get alone, to a plain GET,", alone / plain, AIMS["one"])
    if "many" in figures:
        of_key, bare = figures["many"] / len(KEYS), figures["bare aiohttp"]
        print(
            f"\nget_many of {len(KEYS)} keys: {of_key:,.0f} instructions for each, bare aiohttp {bare:,.0f} for a GET of each"
        )
        met["many"] = of_key <= AIMS["many"]
        note_table(f"Each key of {len(KEYS)}", ["instructions"], {"get_many": [of_key], "bare aiohttp, a GET of each": [bare]})
        note_aim("get_many, for each key", of_key, AIMS["many"], "instructions", is_met=met["many"])
        print(f"  aim: at most {AIMS['many']:,.0f} for each: {'met' if met['many'] else 'MISSED'}")
    if "AsyncKVStore" in figures:
        ours, bare = figures["AsyncKVStore"], figures["bare aiohttp, at once"]
        print(
            f"\n64 gets at once: {statistics.median(ours):.1f} us of CPU for each, bare aiohttp {statistics.median(bare):.1f}"
        )
        rows = {name: [statistics.median(values)] for name, values in (("AsyncKVStore", ours), ("bare aiohttp", bare))}
        note_table("Each of 64 gets at once", ["CPU us"], rows)
        met["at once"] = verdict("CPU of 64 gets at once, to bare aiohttp,", paired_ratio(ours, bare), AIMS["at once"])
    if "SQLite" in figures:
        ours, base = figures["over HTTP"], figures["SQLite"]
        print(f"\nKeys in bulk: {statistics.median(ours):.2f} s over HTTP, SQLite itself {statistics.median(base):.2f} s")
        rows = {name: [statistics.median(figures[name])] for name in ("SQLite", "over HTTP")}
        note_table("All keys written and read in bulk", ["seconds"], rows)
        met["bulk"] = verdict("keys over HTTP, to SQLite in process,", paired_ratio(ours, base), AIMS["bulk"])
    return met


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--calls", type=int, default=6_400, help="gets in a batch of `at once` (default: %(default)s)")
    parser.add_argument("--keys", type=int, default=100_000, help="keys of `bulk` (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of `at once` and `bulk` (default: %(default)s)")
    parser.add_argument("--value-bytes", type=int, default=100)
    parser.add_argument("--folder", help="where to put SQLite's files (default: this folder)")
    add_json_option(parser)
    parser.add_argument("--subject", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.subject:
        subject, calls, address = options.subject
        asyncio.run(run_subject(subject, int(calls), address, "x" * options.value_bytes))
    print(where())
    figures: Figures = {}
    counted = [kind for kind in ("one", "many") if kind in options.only]
    with served("memory://") as address:
        if counted and has_valgrind():
            figures |= count(counted, address, options)
        if "at once" in options.only:
            at_once = asyncio.run(measure_at_once(address, options))
            figures |= {"AsyncKVStore": at_once["AsyncKVStore"], "bare aiohttp, at once": at_once["bare aiohttp"]}
    if "bulk" in options.only:
        print(f"\n{options.keys:,} keys of {options.value_bytes} bytes in batches of {BATCH_KEYS:,}, {options.rounds} rounds")
        figures |= asyncio.run(measure_bulk(options))
    met = judge(figures)
    write_json(options, figures=figures)
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
