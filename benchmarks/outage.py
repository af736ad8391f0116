"""Latency that `kv_cached` adds while its store is refused, slow or talks nonsense, and after the store recovers.

The load is steady, each call has another key, and every result is checked. The function itself takes no time, so the whole
time of a call is added latency.

  refused   nobody listens at the port
  slow      the server takes ten seconds to answer, and recovers at the end
  nonsense  the server answers every request with an HTML page
"""

import argparse
import asyncio
import logging
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

from aiohttp import web
from harness import progress, where

from aiokv import AsyncKVStore, RetryPolicy, kv_cached
from aiokv.caching.access import access_of

MAX_LATER_SECONDS = 0.001

Handler = Callable[[web.BaseRequest], Awaitable[web.Response]]


class State:
    """What the slow server does now."""

    stalls = True


async def serve(handler: Handler) -> tuple[web.ServerRunner, str]:
    """Run a server; return it and its address."""
    runner = web.ServerRunner(web.Server(handler), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{site.port}"


async def slow(request: web.BaseRequest) -> web.Response:
    """Take ten seconds while `State.stalls`; then know no key and accept every value."""
    await request.read()
    if State.stalls:
        await asyncio.sleep(10)
    if request.method == "GET":
        return web.json_response({"error": "no such key"}, status=404)
    return web.json_response({"ok": True})


async def nonsense(request: web.BaseRequest) -> web.Response:
    """Answer every request with a page."""
    await request.read()
    return web.Response(text="<html>Welcome</html>", content_type="text/html")


async def measure(name: str, url: str, options: argparse.Namespace) -> bool:
    """Run the load, print what it cost, and return whether the aims were met."""
    store = AsyncKVStore("outage", url=url, retry=RetryPolicy())
    added: list[tuple[float, float]] = []
    wrong = 0

    @kv_cached(600, store=store, key=lambda number: number, prefix=name, read_timeout=options.read_timeout)
    async def double(number: int) -> int:
        return 2 * number

    async def call(number: int, began: float) -> None:
        nonlocal wrong
        started = time.perf_counter()
        wrong += await double(number) != 2 * number
        added.append((started - began, time.perf_counter() - started))

    began = time.perf_counter()
    tasks: list[asyncio.Task[None]] = []
    total = int(options.seconds * options.rate)
    for number in range(total):
        progress(number, total, name)
        await asyncio.sleep(max(0.0, began + number / options.rate - time.perf_counter()))
        tasks.append(asyncio.create_task(call(number, began)))
    await asyncio.gather(*tasks)
    progress(total, total, name)
    bound = options.read_timeout + 0.5
    first = max(seconds for at, seconds in added if at < bound)
    later = sorted(seconds for at, seconds in added if at >= bound)
    median, high = statistics.median(later), later[int(len(later) * 0.99)]
    print(
        f"  {name:<8}  {len(added)} calls, {wrong} wrong; first {bound:g} s: at most {first * 1e3:.1f} ms; "
        f"later: median {median * 1e3:.3f} ms, 99 % {high * 1e3:.3f} ms"
    )
    if name == "slow":
        State.stalls = False
        recovered, errors = time.perf_counter(), double.info().store_errors
        reads = access_of(store.target).breaker.reads
        while reads.is_open(options.read_timeout):  # noqa: ASYNC110 (seen from outside)
            await asyncio.sleep(0.01)
        print(
            f"            used again {time.perf_counter() - recovered:.1f} s after it recovered, "
            f"with {double.info().store_errors - errors} more failures"
        )
    await double.aclose()
    await store.aclose()
    # A busy machine fires timers late: so the bound has some room, and later calls are judged by their median.
    return wrong == 0 and first < bound and median < MAX_LATER_SECONDS


async def main_async(options: argparse.Namespace) -> bool:
    """Measure each kind of outage."""
    load = f"{options.rate} calls a second, read_timeout {options.read_timeout:g} s"
    print(f"Added latency of kv_cached in an outage, {load}\n{where()}")
    met = await measure("refused", "http://127.0.0.1:1", options)
    for name, handler in (("slow", slow), ("nonsense", nonsense)):
        runner, address = await serve(handler)
        met &= await measure(name, address, options)
        await runner.cleanup()
    return met


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="how long each outage lasts")
    parser.add_argument("--rate", type=int, default=200, help="calls a second")
    parser.add_argument("--read-timeout", type=float, default=1.0)
    logging.basicConfig(level=logging.ERROR)
    met = asyncio.run(main_async(parser.parse_args()))
    print(f"  aim: no wrong result, read_timeout at most, a median under 1 ms later: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
