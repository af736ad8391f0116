"""CPU of a GET through AsyncKVStore, against a bare aiohttp loop that reads and decodes the same answer.

Both run in this process, in alternating batches, with warm connections and the same concurrency. The server is another
process. Only the CPU time of this process is measured, so neither the server nor a busy machine counts.
"""

import argparse
import asyncio
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable

import aiohttp
import orjson
from harness import progress, report
from yarl import URL

from aiokv import AsyncKVStore

Get = Callable[[str], Awaitable[object]]


async def cpu_microseconds_per_call(get: Get, keys: list[str], concurrency: int) -> float:
    """Get all keys from `concurrency` tasks; return the CPU time of one call."""
    remaining = iter(keys)

    async def work() -> None:
        for key in remaining:
            await get(key)

    gc.collect()
    started = time.process_time()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return (time.process_time() - started) / len(keys) * 1e6


async def measure(address: str, options: argparse.Namespace) -> float:
    """Alternate the contenders and print the cost of each."""
    keys = [f"key-{number % 500}" for number in range(options.calls)]
    async with (
        AsyncKVStore("bench", url=address, credentials="bench:secret") as store,
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=100),
            headers={"Authorization": "Bearer of-the-same-length-as-a-token-is", "Accept": "application/json"},
        ) as session,
        # As an expert uses aiohttp: no cookies, and the URL is neither decoded nor encoded.
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=100),
            headers={"Authorization": "Bearer of-the-same-length-as-a-token-is", "Accept": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as lean,
    ):
        await store.set_many({f"key-{number}": "x" * options.value_bytes for number in range(500)})

        async def bare(key: str) -> object:
            async with session.get(f"{address}/get/bench/{key}") as response:
                return orjson.loads(await response.read())["value"]

        async def tuned(key: str) -> object:
            async with lean.get(URL(f"{address}/get/bench/{key}", encoded=True)) as response:
                return orjson.loads(await response.read())["value"]

        expected = "x" * options.value_bytes
        assert await store.get("key-1") == await bare("key-1") == await tuned("key-1") == expected  # noqa: S101
        contenders: dict[str, Get] = {"bare aiohttp": bare, "bare aiohttp, tuned": tuned, "AsyncKVStore": store.get}
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for get in contenders.values():
            await cpu_microseconds_per_call(get, keys, options.concurrency)
        for batch in range(options.batches):
            progress(batch, options.batches, "batches")
            order = list(contenders.items())
            for name, get in order if batch % 2 == 0 else reversed(order):
                samples[name].append(await cpu_microseconds_per_call(get, keys, options.concurrency))
        progress(options.batches, options.batches, "batches")
    title = f"Client CPU of a GET on a warm connection, concurrency {options.concurrency}, {options.value_bytes}-byte values"
    return report(title, "us", samples, "bare aiohttp")


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--calls", type=int, default=2_000, help="calls in a batch")
    parser.add_argument("--batches", type=int, default=15, help="batches of each contender")
    parser.add_argument("--value-bytes", type=int, default=100)
    parser.add_argument("--aim", type=float, default=1.25, help="largest ratio that is no failure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [sys.executable, "-m", "aiokv", "serve", "--port", "0", "--store", f"sqlite:///{folder}/kv.db"],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            address = (server.stderr.readline() if server.stderr else "").split(" at ", 1)[1].split(",")[0].strip()
            ratio = asyncio.run(measure(address, options))
        finally:
            server.terminate()
            server.wait()
    print(f"  aim: at most {options.aim} x: {'met' if ratio <= options.aim else 'MISSED'}")
    return 0 if ratio <= options.aim else 1


if __name__ == "__main__":
    sys.exit(main())
