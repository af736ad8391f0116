"""CPU of a cached HTTP response, against a plain GET on a warm connection and beside other caches, in one process.

The origin is a process of its own on loopback that answers from memory, so what is counted is the client's CPU alone, kernel
included. Every contender takes its turn in alternating batches, over the same URLs; a body is JSON of --body-bytes, read by
`text()`. Latency on a real network is not measured: there a hit also saves the way to the origin.

  aiohttp GET                no cache: the base
  aiokv, memory              `caching` over `memory://`
  aiokv, SQLite              `caching` over a file
  aiohttp-client-cache       its `CachedSession` over its memory
  httpx GET                  no cache
  hishel with httpx, aiokv   hishel's client over `AsyncKVStorage` on `memory://`
  hishel with httpx, SQLite  hishel's client over hishel's own storage in a file

  python benchmarks/http_responses.py
  python benchmarks/http_responses.py --json http.json --plot http.svg

Peers that are not installed are left out, and how to get them is said. The exit status is 1 where an aim is missed.
"""

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from harness import add_json_option, paired_ratio, progress, report, verdict, where, write_json

from aiokv import AsyncKVStore
from aiokv.adapters.aiohttp_client import caching

Get = Callable[[str], Awaitable[str]]

BASE, OURS, SQLITE = "aiohttp GET", "aiokv, memory", "aiokv, SQLite"
URLS = 100
ORIGIN = """
import asyncio, sys
from email.utils import formatdate

body = b'{"text": "' + b"x" * (int(sys.argv[1]) - 12) + b'"}'
head = f"HTTP/1.1 200 OK\\r\\nDate: {formatdate(usegmt=True)}\\r\\nContent-Type: application/json\\r\\nETag: \\"1\\"\\r\\n"
head += f"Server: origin\\r\\nCache-Control: public, max-age=86400\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"

class Answering(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.read = transport, b""
    def data_received(self, data):
        self.read += data
        while b"\\r\\n\\r\\n" in self.read:
            self.read = self.read.partition(b"\\r\\n\\r\\n")[2]
            self.transport.write(head.encode() + body)

async def main():
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@contextlib.contextmanager
def origin(body_bytes: int) -> Generator[str]:
    """Run the origin in a process of its own; yield its address."""
    with subprocess.Popen([sys.executable, "-c", ORIGIN, str(body_bytes)], stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline() if server.stdout else ""
            yield f"http://127.0.0.1:{int(line)}"
        finally:
            server.terminate()


@contextlib.asynccontextmanager
async def aiohttp_get(_folder: Path) -> AsyncGenerator[Get]:
    """Ask the origin each time."""
    async with aiohttp.ClientSession() as session:
        yield through(session)


@contextlib.asynccontextmanager
async def over(url: str) -> AsyncGenerator[Get]:
    """Ask through our middleware."""
    async with (
        AsyncKVStore("bench", url=url) as store,
        caching(store) as cache,
        aiohttp.ClientSession(middlewares=[cache]) as session,
    ):
        yield through(session)
        if (misses := cache.info().misses) > URLS:
            raise RuntimeError(f"{misses} requests reached the origin, where {URLS} should have")


@contextlib.asynccontextmanager
async def aiohttp_client_cache(_folder: Path) -> AsyncGenerator[Get]:
    """Ask through aiohttp-client-cache."""
    module = importlib.import_module("aiohttp_client_cache")
    async with module.CachedSession(cache=module.CacheBackend(expire_after=86_400)) as session:
        yield through(session)


@contextlib.asynccontextmanager
async def httpx_get(_folder: Path) -> AsyncGenerator[Get]:
    """Ask the origin each time, by httpx."""
    async with importlib.import_module("httpx").AsyncClient() as client:
        yield by_httpx(client)


@contextlib.asynccontextmanager
async def hishel_over_aiokv(_folder: Path) -> AsyncGenerator[Get]:
    """Ask through hishel's client, over our storage."""
    adapter = importlib.import_module("aiokv.adapters.hishel")
    async with AsyncKVStore("bench", url="memory://hishel") as store:
        storage = adapter.AsyncKVStorage(store)
        async with importlib.import_module("hishel.httpx").AsyncCacheClient(storage=storage, rfc=True) as client:
            yield by_httpx(client)


@contextlib.asynccontextmanager
async def hishel_over_sqlite(folder: Path) -> AsyncGenerator[Get]:
    """Ask through hishel's client, over its own storage."""
    storage = importlib.import_module("hishel").AsyncSqliteStorage(database_path=folder / "hishel.db")
    async with importlib.import_module("hishel.httpx").AsyncCacheClient(storage=storage, rfc=True) as client:
        yield by_httpx(client)


def through(session: Any) -> Get:
    """Return what gets a text by a session of aiohttp's kind."""

    async def get(url: str) -> str:
        async with session.get(url) as response:
            text: str = await response.text()
            return text

    return get


def by_httpx(client: Any) -> Get:
    """Return what gets a text by a client of httpx's kind."""

    async def get(url: str) -> str:
        text: str = (await client.get(url)).text
        return text

    return get


CONTENDERS: dict[str, tuple[Sequence[str], Callable[[Path], contextlib.AbstractAsyncContextManager[Get]]]] = {
    BASE: ((), aiohttp_get),
    OURS: ((), lambda _: over("memory://http")),
    SQLITE: ((), lambda folder: over(f"sqlite:///{folder}/kv.db")),
    "aiohttp-client-cache": (("aiohttp_client_cache",), aiohttp_client_cache),
    "httpx GET": (("httpx",), httpx_get),
    "hishel with httpx, aiokv": (("httpx",), hishel_over_aiokv),
    "hishel with httpx, SQLite": (("httpx", "anysqlite"), hishel_over_sqlite),
}


async def cpu_microseconds(get: Get, base: str, calls: int) -> float:
    """Return the CPU time of one request."""
    urls = [f"{base}/item/{number % URLS}?lang=en" for number in range(calls)]
    gc.collect()
    started = time.process_time()
    for url in urls:
        await get(url)
    return (time.process_time() - started) / calls * 1e6


async def measure(base: str, folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Alternate the contenders."""
    samples: dict[str, list[float]] = {}
    async with contextlib.AsyncExitStack() as stack:
        gets: dict[str, Get] = {}
        for name, (modules, make) in CONTENDERS.items():
            absent = [module for module in modules if importlib.util.find_spec(module) is None]
            if absent:
                print(f"{name} is left out: pip install {' '.join(absent)}".replace("_", "-"), file=sys.stderr)
                continue
            gets[name] = await stack.enter_async_context(make(folder))
            samples[name] = []
            # All URLs, so that the rest are hits.
            texts = {await gets[name](f"{base}/item/{number}?lang=en") for number in range(URLS)}
            if {len(text) for text in texts} != {options.body_bytes}:
                raise RuntimeError(f"{name} did not get the origin's body")
        for batch in range(options.batches):
            progress(batch, options.batches, "batches")
            order = list(gets.items())
            for name, get in order if batch % 2 == 0 else reversed(order):
                samples[name].append(await cpu_microseconds(get, base, options.calls))
        progress(options.batches, options.batches, "batches")
    return samples


def plot(samples: Mapping[str, Sequence[float]], options: argparse.Namespace) -> None:
    """Draw the CPU of each contender."""
    import matplotlib as mpl  # noqa: PLC0415 (only for those who want a plot)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 (after the choice of the backend)

    figure, axes = plt.subplots(figsize=(8, 0.5 * len(samples) + 1.5), layout="constrained")
    medians = [statistics.median(values) for values in samples.values()]
    bars = axes.barh(list(samples), medians, color=["C1" if name.startswith("aiokv") else "C0" for name in samples])
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_title(f"CPU of a response of {options.body_bytes:,} bytes, microseconds\n{where()}", fontsize=9)
    figure.savefig(options.plot)
    print(f"\nplot: {options.plot}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1_000, help="requests in a batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=11, help="batches of each contender (default: %(default)s)")
    parser.add_argument("--body-bytes", type=int, default=2_000, help="size of a body (default: %(default)s)")
    parser.add_argument(
        "--aim", type=float, default=1.5, help="largest ratio of a hit to a plain GET that is no failure (default: %(default)s)"
    )
    parser.add_argument("--plot", metavar="FILE.svg", help="draw a plot (needs matplotlib)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        print("--plot needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, origin(options.body_bytes) as base:
        samples = asyncio.run(measure(base, Path(folder), options))
    report(f"CPU of a response of {options.body_bytes:,} bytes", "us", samples, BASE)
    met = [verdict(f"{name} to {BASE}", paired_ratio(samples[name], samples[BASE]), options.aim) for name in (OURS, SQLITE)]
    write_json(options, contenders=samples)
    if options.plot:
        plot(samples, options)
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
