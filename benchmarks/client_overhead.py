"""Cost of a GET and a SET through AsyncKVStore, against a bare aiohttp loop that sends and reads the same.

Two figures, each beside bare aiohttp in one run:

  instructions  what the client's process executes for a call, under valgrind (cachegrind, the kernel's left out): two runs of
                each contender, with fewer and with more calls, and the difference divided by the number of calls between. They
                are the same from run to run, whatever else the machine does. One call after the other, and 64 at once
  CPU           of a GET, in alternating batches in this process. Only its own CPU time is measured, so neither the server nor
                a busy machine counts

Connections are warm, and the server is another process.

  python benchmarks/client_overhead.py                  CPU
  python benchmarks/client_overhead.py --instructions   instructions, 3 minutes on 2 idle cores
"""

import argparse
import asyncio
import contextlib
import gc
import os
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import aiohttp
import orjson
from harness import (
    add_json_option,
    count_instructions,
    has_valgrind,
    note_table,
    progress,
    report,
    served,
    verdict,
    where,
    write_json,
)
from yarl import URL

from aiokv import AsyncKVStore

Call = Callable[[str], Awaitable[object]]

BARE, TUNED, OURS = "bare aiohttp", "bare aiohttp, tuned", "AsyncKVStore"
KEYS = [f"key-{number}" for number in range(100)]
TTL_SECONDS = 3_600
FEWER, MORE = 200, 1_000
# The largest ratio to bare aiohttp that is no failure, by verb.
AIMS = {"get": 1.07, "set": 1.12}
CONCURRENCIES = (1, 64)


class Subject(NamedTuple):
    """What is counted in a process of its own."""

    contender: str
    verb: str
    concurrency: int


@contextlib.asynccontextmanager
async def contenders(address: str, value_bytes: int) -> AsyncGenerator[dict[tuple[str, str], Call]]:
    """Open every contender's connections, and store the values."""
    value = "x" * value_bytes
    headers = {"Authorization": "Bearer of-the-same-length-as-a-token-is", "Accept": "application/json"}
    async with (
        AsyncKVStore("bench", url=address, credentials="bench:secret") as store,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=100), headers=headers) as session,
        # As an expert uses aiohttp: no cookies, and the URL is neither decoded nor encoded.
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=100), headers=headers, cookie_jar=aiohttp.DummyCookieJar()
        ) as lean,
    ):
        await store.set_many(dict.fromkeys(KEYS, value))

        async def bare_get(key: str) -> object:
            async with session.get(f"{address}/get/bench/{key}") as response:
                return orjson.loads(await response.read())["value"]

        async def tuned_get(key: str) -> object:
            async with lean.get(URL(f"{address}/get/bench/{key}", encoded=True)) as response:
                return orjson.loads(await response.read())["value"]

        async def bare_set(key: str) -> object:
            url, plain = f"{address}/set/bench/{key}?ttl={TTL_SECONDS}", {"Content-Type": "text/plain; charset=utf-8"}
            async with session.put(url, data=value.encode(), headers=plain) as response:
                return orjson.loads(await response.read())

        async def our_set(key: str) -> object:
            return await store.set(key, value, TTL_SECONDS)

        assert await store.get("key-1") == await bare_get("key-1") == await tuned_get("key-1") == value  # noqa: S101
        yield {
            (BARE, "get"): bare_get,
            (TUNED, "get"): tuned_get,
            (OURS, "get"): store.get,
            (BARE, "set"): bare_set,
            (OURS, "set"): our_set,
        }


async def make_calls(call: Call, calls: int, concurrency: int) -> None:
    """Make the calls from `concurrency` tasks."""
    remaining = iter([KEYS[number % len(KEYS)] for number in range(calls)])

    async def work() -> None:
        for key in remaining:
            await call(key)

    await asyncio.gather(*(work() for _ in range(concurrency)))


async def run_subject(subject: Subject, calls: int, address: str, value_bytes: int) -> None:
    """Make the calls of one subject, and end the process: it runs under valgrind."""
    # One pass more or less over the whole heap is more than all else that is counted.
    gc.disable()
    async with contenders(address, value_bytes) as all_contenders:
        call = all_contenders[subject.contender, subject.verb]
        await make_calls(call, len(KEYS), subject.concurrency)
        await make_calls(call, calls, subject.concurrency)
        # The end of the loop would cost more where fewer calls have been made.
        os._exit(0)


def count(address: str, value_bytes: int) -> bool:
    """Count the instructions of each subject; print them and whether the aims are met."""
    subjects = [Subject(name, verb, number) for number in CONCURRENCIES for verb in AIMS for name in (BARE, OURS)]
    jobs = [(subject, calls) for subject in subjects for calls in (FEWER, MORE)]
    totals: dict[tuple[Subject, int], int] = {}

    def run(job: tuple[Subject, int]) -> int:
        subject, calls = job
        arguments = ["--subject", subject.contender, subject.verb, str(subject.concurrency), str(calls), address]
        return count_instructions([__file__, *arguments, "--value-bytes", str(value_bytes)])

    # Writes the bytecode that the counted runs read.
    run((subjects[-1], 1))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for job, total in zip(jobs, pool.map(run, jobs), strict=True):
            totals[job] = total
            progress(len(totals), len(jobs), "runs under valgrind")
    costs = {subject: (totals[subject, MORE] - totals[subject, FEWER]) / (MORE - FEWER) for subject in subjects}
    print(f"\nInstructions of a call on a warm connection, {value_bytes}-byte values\n{where()}, {MORE:,} calls less {FEWER:,}")
    met = []
    rows = {}
    for subject, cost in costs.items():
        ratio = cost / costs[subject._replace(contender=BARE)]
        rows[f"{subject.verb}, {subject.concurrency} at once, {subject.contender}"] = [cost, ratio]
        print(
            f"  {subject.verb}, {subject.concurrency:2} at once, {subject.contender:<13} {cost:10,.0f} instructions"
            f"  {ratio:5.3f} x {BARE}"
        )
        if subject.contender == OURS:
            met.append(verdict(f"{subject.verb}, {subject.concurrency} at once,", ratio, AIMS[subject.verb]))
    note_table("Instructions of a call on a warm connection", ["instructions", f"x {BARE}"], rows)
    return all(met)


async def cpu_microseconds_per_call(call: Call, calls: int, concurrency: int) -> float:
    """Return the CPU time of one call."""
    gc.collect()
    started = time.process_time()
    await make_calls(call, calls, concurrency)
    return (time.process_time() - started) / calls * 1e6


async def measure(address: str, options: argparse.Namespace) -> float:
    """Alternate the contenders and print the CPU of a GET with each."""
    async with contenders(address, options.value_bytes) as all_contenders:
        gets = [(name, call) for (name, verb), call in all_contenders.items() if verb == "get"]
        samples: dict[str, list[float]] = {name: [] for name, _ in gets}
        for _, get in gets:
            await cpu_microseconds_per_call(get, options.calls, options.concurrency)
        for batch in range(options.batches):
            progress(batch, options.batches, "batches")
            for name, get in gets if batch % 2 == 0 else reversed(gets):
                samples[name].append(await cpu_microseconds_per_call(get, options.calls, options.concurrency))
        progress(options.batches, options.batches, "batches")
    title = f"Client CPU of a GET on a warm connection, concurrency {options.concurrency}, {options.value_bytes}-byte values"
    return report(title, "us", samples, BARE)


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", action="store_true", help="count instructions in place of CPU")
    parser.add_argument("--concurrency", type=int, default=64, help="calls at once in a batch")
    parser.add_argument("--calls", type=int, default=2_000, help="calls in a batch")
    parser.add_argument("--batches", type=int, default=15, help="batches of each contender")
    parser.add_argument("--value-bytes", type=int, default=100)
    parser.add_argument("--aim", type=float, default=1.25, help="largest ratio of CPU that is no failure")
    add_json_option(parser)
    parser.add_argument("--subject", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.subject:
        contender, verb, concurrency, calls, address = options.subject
        asyncio.run(run_subject(Subject(contender, verb, int(concurrency)), int(calls), address, options.value_bytes))
    with served("memory://") as address:
        if options.instructions:
            met = not has_valgrind() or count(address, options.value_bytes)
        else:
            met = verdict("CPU of a GET", asyncio.run(measure(address, options)), options.aim)
    write_json(options)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
