"""What a server that is away, slow or broken costs its clients, and how soon they notice that it is back.

First AsyncKVStore with its defaults, against `aiokv serve` in a process of its own, which is killed and started anew:

  away      the server is killed (SIGKILL) under a steady load of gets, and started again after --away-seconds: attempts to
            connect (the interpreter's audit event socket.connect), how soon calls fail, how soon one succeeds again
  restarts  64 tasks set and get, and 200 tasks set 1.8 MB; the server is killed and started a second later, and then the same
            through a proxy that resets every connection and refuses new ones for a second: no call may fail

Then the latency that `kv_cached` adds. The load is steady, each call has another key, and every result is checked. The function
itself takes no time, so the whole time of a call is added latency.

  refused   nobody listens at the port
  slow      the server takes ten seconds to answer, and recovers at the end
  nonsense  the server answers every request with an HTML page

  python benchmarks/outage.py               two minutes
  python benchmarks/outage.py --only away   a part

The exit status is 1 where an aim is missed.
"""

import argparse
import asyncio
import contextlib
import logging
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from aiohttp import web
from harness import add_json_option, note_aim, note_table, progress, where, write_json

from aiokv import AsyncKVStore, CallError, RetryPolicy, kv_cached
from aiokv.caching.access import access_of
from aiokv.testing import FaultProxy

MAX_LATER_SECONDS = 0.001
MAX_CONNECTS_A_SECOND = 3
MAX_FAILING_SECONDS = 0.005
MAX_RETURN_SECONDS = 1.2
# With the default of wait_for_ready, the host is known to be down after this long.
DOWN_SECONDS = 3.2

TASKS, LARGE_TASKS, LARGE_BYTES = 64, 200, 1_800_000

# A server that has loaded everything, and takes its port when it is told to.
STANDBY = "import sys; from aiokv.cli import main; sys.stdin.readline(); sys.exit(main(sys.argv[1:]))"

# The moment of every attempt to connect of this process, by port.
_connects: list[tuple[int, float]] = []

Handler = Callable[[web.BaseRequest], Awaitable[web.Response]]


def _note_connect(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        _connects.append((arguments[1][1], time.monotonic()))


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
    columns = ["calls", "wrong", "at most ms, at first", "later median ms", "later p99 ms"]
    row = [len(added), wrong, first * 1e3, median * 1e3, high * 1e3]
    note_table(f"kv_cached, time added while the store is away: {name}", columns, {"kv_cached": row})
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


class Standby:
    """A server that is ready to start on a port.

    Args:
        port: Its port.
        folder: Where its file is.
    """

    def __init__(self, port: int, folder: str) -> None:
        arguments = ["serve", "--port", str(port), "--store", f"sqlite:///{folder}/kv.db"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", STANDBY, *arguments], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    async def start(self) -> None:
        """Start, and wait until it accepts connections."""
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        if self._process.stdin is None or self._process.stderr is None:
            raise AssertionError("the process has pipes")
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stderr.readline()
        if " at http" not in line:
            raise RuntimeError(f"the server did not start: {line}")

    def kill(self) -> None:
        """Kill the process as a crash would."""
        self._process.kill()
        self._process.wait()


@contextlib.asynccontextmanager
async def two_servers() -> AsyncGenerator[tuple[str, int, Standby, Standby]]:
    """Start a server, and have a second one ready for the same port and file."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        servers = []
        for _ in range(2):
            servers.append(Standby(port, folder))
            stack.callback(servers[-1].kill)
        await servers[0].start()
        # The second one loads, so that its start takes no time of the measurement.
        await asyncio.sleep(2)
        yield f"http://127.0.0.1:{port}", port, servers[0], servers[1]


def most_in_a_second(moments: list[float]) -> int:
    """Return the largest number of moments within one second."""
    return max((sum(first <= moment < first + 1 for moment in moments) for first in moments), default=0)


async def measure_away(options: argparse.Namespace) -> bool:
    """Kill the server under load, start it again, and print what its clients met."""
    calls: list[tuple[float, float, bool]] = []
    async with two_servers() as (url, port, first, second), AsyncKVStore("outage", url=url) as store:
        await store.set("key", "value")

        async def call() -> None:
            began = time.monotonic()
            try:
                found = await store.get("key") == "value"
            except CallError:
                found = False
            calls.append((began, time.monotonic() - began, found))

        tasks: list[asyncio.Task[None]] = []

        async def load(seconds: float) -> None:
            start = time.monotonic()
            for number in range(int(seconds * options.away_rate)):
                await asyncio.sleep(start + number / options.away_rate - time.monotonic())
                tasks.append(asyncio.create_task(call()))

        await load(1)
        first.kill()
        killed = time.monotonic()
        await load(options.away_seconds)
        loading = asyncio.create_task(load(3))
        await second.start()
        back = time.monotonic()
        await loading
        await asyncio.gather(*tasks)
    connects = [moment for other, moment in _connects if other == port and killed < moment < back]
    down = sorted(seconds for began, seconds, _ in calls if killed + DOWN_SECONDS < began < back - 1)
    most, typical, high, highest = most_in_a_second(connects), statistics.median(down), down[int(len(down) * 0.99)], down[-1]
    returned = min(began + seconds for began, seconds, found in calls if found and began + seconds > back - 0.5) - back
    print(
        f"  away      {back - killed:.1f} s, {options.away_rate} calls a second: {len(connects)} attempts to connect,"
        f" at most {most} in a second;\n            once it is known, {len(down)} calls fail: median {typical * 1e3:.2f} ms,"
        f" 99 % {high * 1e3:.2f} ms, longest {highest * 1e3:.1f} ms;\n"
        f"            first success {returned:.2f} s after it accepted connections"
    )
    columns = ["attempts to connect a second, at most", "failing call median ms", "p99 ms", "s to the first success"]
    note_table("A server that is away", columns, {"AsyncKVStore": [most, typical * 1e3, high * 1e3, returned]})
    return most <= MAX_CONNECTS_A_SECOND and high < MAX_FAILING_SECONDS and returned < MAX_RETURN_SECONDS


async def measure_restart(name: str, url: str, restart: Callable[[], Awaitable[None]]) -> bool:
    """Restart the server under load; print how many calls failed."""
    failures: list[CallError] = []
    longest, done, is_over = 0.0, 0, False

    async def repeat(store: AsyncKVStore, number: int, size: int) -> None:
        nonlocal longest, done
        turn = 0
        while not is_over:
            value, began = f"{turn}".ljust(size, "x"), time.monotonic()
            try:
                await store.set(f"key-{number}-{size}", value)
                if size == 1 and await store.get(f"key-{number}-{size}") != value:
                    raise RuntimeError("a value is another one")
            except CallError as error:
                failures.append(error)
                await asyncio.sleep(0.1)
            longest, done, turn = max(longest, time.monotonic() - began), done + 1, turn + 1

    async with AsyncKVStore("outage", url=url) as store, asyncio.TaskGroup() as group:
        for number in range(TASKS):
            group.create_task(repeat(store, number, 1))
        for number in range(LARGE_TASKS):
            group.create_task(repeat(store, number, LARGE_BYTES))
        await asyncio.sleep(2)
        await restart()
        await asyncio.sleep(4)
        is_over = True
    print(f"  {name:<8}  {done} turns of {TASKS} + {LARGE_TASKS} tasks, {len(failures)} failed; longest {longest:.1f} s")
    note_table(
        f"A restart of a second: {name}", ["turns", "failed", "longest s"], {"AsyncKVStore": [done, len(failures), longest]}
    )
    for error in failures[:1]:
        print(f"            {error}")
    return not failures


async def measure_restarts() -> bool:
    """Kill and start a server, and interrupt the way to one, for a second."""
    async with two_servers() as (url, _, first, second):

        async def kill_and_start() -> None:
            first.kill()
            await asyncio.sleep(1)
            await second.start()

        met = await measure_restart("killed", url, kill_and_start)
    async with two_servers() as (url, _, _, _), FaultProxy(url) as proxy:

        async def interrupt() -> None:
            async with proxy.outage():
                await asyncio.sleep(1)

        return await measure_restart("reset", proxy.url, interrupt) and met


async def main_async(options: argparse.Namespace) -> bool:
    """Measure what is asked for."""
    met = True
    if "away" in options.only:
        print(f"AsyncKVStore while its server is away\n{where()}")
        met &= await measure_away(options)
    if "restarts" in options.only:
        print(f"AsyncKVStore over restarts of a second\n{where()}")
        met &= await measure_restarts()
    if "cached" in options.only:
        met &= await measure_cached(options)
    return met


async def measure_cached(options: argparse.Namespace) -> bool:
    """Measure each kind of outage for `kv_cached`."""
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
    parser.add_argument("--away-seconds", type=float, default=30.0, help="how long the server is away")
    parser.add_argument("--away-rate", type=int, default=500, help="calls a second meanwhile")
    parts = ("away", "restarts", "cached")
    parser.add_argument("--only", choices=parts, nargs="+", default=parts, help="measure some parts only")
    add_json_option(parser)
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    sys.addaudithook(_note_connect)
    met = asyncio.run(main_async(options))
    print(
        f"  aims: away: at most {MAX_CONNECTS_A_SECOND} connects a second, 99 % fail in {MAX_FAILING_SECONDS * 1e3:g} ms, back"
        f" within {MAX_RETURN_SECONDS:g} s; restarts: no failed call;\n"
        f"  cached: no wrong result, read_timeout at most, a median under 1 ms later: {'met' if met else 'MISSED'}"
    )
    note_aim("all aims of outages", float(met), 1, "", is_met=met)
    write_json(options)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
