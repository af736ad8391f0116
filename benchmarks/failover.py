"""What a failover of a Redis or Valkey cluster costs the calls that meet it.

A cluster of three primaries and three replicas with a node timeout of two seconds, 40 tasks that set keys of their own and 40
that get keys whose set has succeeded, by one store with the default policy, and a watch. In each round a primary fails, its
replica takes over, and what failed comes back as a replica.

  kill   the primary is killed (SIGKILL) and started again
  cut    the network to the primary is cut: relays before every node swallow what is sent to it, and answer nothing
  stop   the primary stands still (SIGSTOP) and goes on later, with what the network had delivered to it meanwhile

Printed are the calls that failed (aim: none), the slowest call, the entries whose set had succeeded and that were lost with the
primary (the window that `durability="replicated"` narrows), and what the watch was told.

  python benchmarks/failover.py                        five rounds of each, about three minutes
  python benchmarks/failover.py --only kill --rounds 1
  python benchmarks/failover.py --durability replicated

The exit status is 1 where a call failed, or the watch did not go on.
"""

import argparse
import asyncio
import contextlib
import logging
import random
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from harness import REPOSITORY, add_json_option, note_aim, note_table, progress, where, write_json

from aiokv import AsyncKVStore, CallError
from aiokv.backends.redis.backend import RedisBackend
from aiokv.backends.redis.options import RedisOptions
from aiokv.backends.redis.urls import parse_url
from aiokv.backends.watching import Changed, Lost, Watch

sys.path.insert(0, str(REPOSITORY / "tests" / "backends"))
from redis_servers import RedisCluster, RedisServer, free_port, source_of

FAULTS = ("kill", "cut", "stop")
FAULT_NAMES = {"kill": "primary killed", "cut": "network cut", "stop": "primary stopped (SIGSTOP)"}
DB_NAME = "failover"
WRITERS = READERS = 40
PAUSE_SECONDS = 0.01
STEADY_SECONDS = 1.0
AFTER_SECONDS = 2.0
PATIENCE_SECONDS = 40.0


class Network:
    """What the relays have in common: which nodes are cut off."""

    def __init__(self) -> None:
        self._cut: set[str] = set()
        self._mended = asyncio.Event()

    def cut(self, host: str) -> None:
        """Forward nothing from and to a node, until `mend`; connections stay."""
        self._cut.add(host)

    def mend(self, host: str) -> None:
        """Forward again."""
        self._cut.discard(host)
        self._mended.set()
        self._mended = asyncio.Event()

    async def wait(self, *hosts: str) -> None:
        """Wait until none of the nodes is cut off."""
        while not self._cut.isdisjoint(hosts):
            await self._mended.wait()


class Relay:
    """A port in front of a node's, which swallows what comes while either end is cut off."""

    def __init__(self, network: Network, node: str, port: int, upstream: int) -> None:
        self.port = port
        self._network = network
        self._node = node
        self._upstream = upstream
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def aclose(self) -> None:
        """Close the port and the connections."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            return
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        upstream: asyncio.StreamWriter | None = None
        try:
            # A node connects to others from an address of its own.
            ends = (self._node, writer.get_extra_info("peername")[0])
            await self._network.wait(*ends)
            answers, upstream = await asyncio.open_connection("127.0.0.1", self._upstream)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, upstream, ends))
                group.create_task(self._pump(answers, writer, ends))
        except (OSError, asyncio.CancelledError, ExceptionGroup):
            return
        finally:
            for end in filter(None, (writer, upstream)):
                end.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, ends: tuple[str, str]) -> None:
        while data := await source.read(65_536):
            await self._network.wait(*ends)
            target.write(data)
            await target.drain()
        raise ConnectionError


class Figures:
    """What one fault has cost."""

    def __init__(self) -> None:
        self.calls = 0
        self.failed: list[str] = []
        self.slowest = 0.0
        self.lost = 0
        self.wrong = 0
        self.acknowledged = 0
        self.watch_lost = 0
        self.watch_changes = 0
        self.watch_seconds: list[float] = []


class Failing(NamedTuple):
    """A running cluster, and the network between its nodes and the clients."""

    cluster: RedisCluster
    network: Network

    def fail(self, fault: str, node: RedisServer) -> None:
        """Let a node fail."""
        if fault == "kill":
            node.kill()
        elif fault == "stop":
            node.pause()
        else:
            self.network.cut(source_of(self.cluster.nodes.index(node)))

    async def mend(self, fault: str, node: RedisServer) -> None:
        """Let a node come back."""
        if fault == "kill":
            node.start()
            await asyncio.to_thread(node.wait)
        elif fault == "stop":
            node.resume()
        else:
            self.network.mend(source_of(self.cluster.nodes.index(node)))


@contextlib.asynccontextmanager
async def running(*, with_relays: bool) -> AsyncGenerator[Failing]:
    """Run a cluster, with relays before the ports of its nodes or without."""
    network, relays = Network(), list[Relay]()
    announced: list[tuple[int, int, int, int]] = []
    if with_relays:
        for number in range(6):
            port, bus, told, told_bus = (free_port() for _ in range(4))
            announced.append((port, bus, told, told_bus))
            for before, behind in ((told, port), (told_bus, bus)):
                relays.append(Relay(network, source_of(number), before, behind))
                await relays[-1].start()
    with tempfile.TemporaryDirectory() as folder:
        cluster = RedisCluster(Path(folder), announced)
        try:
            await asyncio.to_thread(cluster.start)
            yield Failing(cluster, network)
        finally:
            cluster.kill()
            for relay in relays:
                await relay.aclose()


async def measure(fault: str, options: argparse.Namespace) -> Figures:
    """Run the rounds of one fault."""
    figures = Figures()
    async with running(with_relays=fault == "cut") as failing:
        backend = RedisBackend(parse_url(failing.cluster.url), options=RedisOptions(durability=options.durability))
        store = AsyncKVStore(DB_NAME, backend=backend)
        load = Load(store, figures)
        watch = backend.watch(DB_NAME)
        watching = asyncio.create_task(follow(watch, figures))
        try:
            for number in range(options.rounds):
                progress(number, options.rounds, fault)
                await play_round(fault, number, failing, load, figures)
            progress(options.rounds, options.rounds, fault)
        finally:
            await watch.aclose()
            await watching
            await backend.aclose()
    return figures


async def play_round(fault: str, number: int, failing: Failing, load: "Load", figures: Figures) -> None:
    """Let one primary fail under load and come back; look then for what was acknowledged."""
    primaries = await asyncio.to_thread(failing.cluster.primaries)
    victim = primaries[number % len(primaries)]
    lost_before, changes_before = figures.watch_lost, figures.watch_changes
    async with load.running():
        await asyncio.sleep(STEADY_SECONDS)
        failing.fail(fault, victim)
        failed_at = time.monotonic()
        while figures.watch_lost < lost_before + 2 or figures.watch_changes == changes_before:
            if time.monotonic() - failed_at > PATIENCE_SECONDS:
                figures.failed.append("the watch did not go on")
                break
            if figures.watch_lost < lost_before + 2:
                changes_before = figures.watch_changes
            await asyncio.sleep(0.02)
        figures.watch_seconds.append(time.monotonic() - failed_at)
        await asyncio.sleep(AFTER_SECONDS)
        await failing.mend(fault, victim)
        await asyncio.sleep(AFTER_SECONDS)
    await asyncio.to_thread(failing.cluster.wait)
    await load.check()


async def follow(watch: Watch, figures: Figures) -> None:
    """Count what a watch tells."""
    async for event in watch:
        figures.watch_lost += isinstance(event, Lost)
        figures.watch_changes += isinstance(event, Changed)


class Load:
    """Tasks that set and get without end."""

    def __init__(self, store: AsyncKVStore, figures: Figures) -> None:
        self._store = store
        self._figures = figures
        self._values: dict[str, str] = {}
        self._keys: list[str] = []
        self._number = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Run the tasks for as long as the context lasts; let their last calls end."""
        is_over = asyncio.Event()
        tasks = [asyncio.create_task(self._repeat(act, is_over)) for act in (*[self._set] * WRITERS, *[self._get] * READERS)]
        try:
            yield
        finally:
            is_over.set()
            await asyncio.gather(*tasks)

    async def check(self) -> None:
        """Read everything whose set has succeeded in this round, and count what is gone."""
        keys, self._keys = self._keys, []
        self._figures.acknowledged += len(keys)
        for start in range(0, len(keys), 1_000):
            part = keys[start : start + 1_000]
            values = await self._store.get_many(part)
            self._figures.lost += sum(values[key] is None for key in part)
            self._figures.wrong += sum(values[key] not in {None, self._values[key]} for key in part)
        self._values.clear()

    async def _repeat(self, act: Callable[[], Awaitable[None]], is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            started = time.perf_counter()
            try:
                await act()
            except CallError as error:
                self._figures.failed.append(f"{error.verb}: {type(error).__name__}: {error.reason}")
            self._figures.calls += 1
            self._figures.slowest = max(self._figures.slowest, time.perf_counter() - started)
            await asyncio.sleep(PAUSE_SECONDS * random.random() * 2)  # noqa: S311 (spreads the load)

    async def _set(self) -> None:
        self._number += 1
        key, value = f"key {self._number}", f"value {self._number}"
        await self._store.set(key, value, 3600)
        self._values[key] = value
        self._keys.append(key)

    async def _get(self) -> None:
        if self._keys:
            key = random.choice(self._keys)  # noqa: S311 (any)
            value = await self._store.get(key)
            self._figures.wrong += value not in {None, self._values.get(key, value)}


def show(fault: str, figures: Figures, rounds: int) -> bool:
    """Print the figures of a fault; return whether its aim is met."""
    slowest_news = max(figures.watch_seconds, default=0.0)
    print(
        f"  {fault:<5} {figures.calls} calls in {rounds} rounds: {len(figures.failed)} failed, "
        f"slowest {figures.slowest:.2f} s\n"
        f"        of {figures.acknowledged} sets that succeeded {figures.lost} were lost; {figures.wrong} wrong values\n"
        f"        the watch told {figures.watch_changes} changes and {figures.watch_lost} times that continuity was lost; "
        f"it went on after at most {slowest_news:.1f} s"
    )
    for reason in sorted(set(figures.failed)):
        print(f"        {figures.failed.count(reason)} x {reason}")
    return not figures.failed and not figures.wrong


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FAULTS, help="one fault alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--durability", choices=("acked", "replicated"), default="acked")
    add_json_option(parser)
    options = parser.parse_args()
    logging.getLogger("aiokv").setLevel(logging.ERROR)
    faults = [options.only] if options.only else FAULTS
    print(f"Failover of a cluster, {WRITERS} writers and {READERS} readers, durability={options.durability}\n{where()}")
    found: dict[str, Figures] = {}
    for fault in faults:
        found[fault] = asyncio.run(measure(fault, options))
        show(fault, found[fault], options.rounds)
    columns = ["calls", "failed", "slowest s", "acknowledged sets", "lost", "wrong", "watch silent s"]
    rows = {
        FAULT_NAMES[fault]: [
            one.calls,
            len(one.failed),
            one.slowest,
            one.acknowledged,
            one.lost,
            one.wrong,
            max(one.watch_seconds, default=0.0),
        ]
        for fault, one in found.items()
    }
    note_table(f"A cluster's node fails under load, {options.rounds} rounds", columns, rows)
    for fault, one in found.items():
        note_aim(f"failed calls, {FAULT_NAMES[fault]}", len(one.failed), 0, "calls", is_met=not one.failed)
    write_json(options)
    return int(any(figures.failed or figures.wrong for figures in found.values()))


if __name__ == "__main__":
    sys.exit(main())
