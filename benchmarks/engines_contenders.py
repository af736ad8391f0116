"""The engines, servers and clients that `engines.py` compares: how each is started, asked and counted. Linux only."""

import contextlib
import importlib
import importlib.util
import json
import select
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from harness import REPOSITORY, progress
from server_contenders import HOST, free_port, start_process, wait_for

if TYPE_CHECKING:
    from redis_servers import RedisServer

_CLIENT = Path(__file__).with_name("engines_subjects.py")
_ANSWER_SECONDS = 120.0
_COUNTED_SECONDS = 1.5

_PAGES = ("page_count", "freelist_count", "page_size")

Figures = dict[str, float]


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time of processes and their children so far, user and system, of all threads."""
    # The clock of another process: see clock_getcpuclockid(3).
    return sum(time.clock_gettime((~one << 3) | 2) for pid in pids for one in (pid, *_children(pid)))


def _children(pid: int) -> Iterable[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


@dataclass
class Engine:
    """What holds the values: aiokv's URL for it, what peers need, and its processes (none for an embedded one)."""

    url: str
    peer: Mapping[str, Any]
    pids: Sequence[int] = ()
    held_bytes: Callable[[], float] | None = None
    """Return the bytes that the engine's own processes or files hold; None where the client's memory is what counts."""


def used_bytes(nodes: Sequence["RedisServer"]) -> float:
    """Return what Redis servers hold in memory for their keys: entries and hash tables, without buffers of connections."""
    total = 0.0
    # A server counts the buffers of its connections anew once a second.
    time.sleep(_COUNTED_SECONDS)
    for node in nodes:
        with node.client() as client:
            stats = client.memory_stats()
        tables = stats.get("db.0", {})
        total += stats["dataset.bytes"] + sum(size for name, size in tables.items() if name.startswith("overhead."))
    return total


@contextlib.contextmanager
def open_memory(_folder: Path) -> Generator[Engine]:
    """Yield the memory of the client's own process, or of a server's."""
    yield Engine("memory://", {"kind": "py-key-value", "store": "memory"})


@contextlib.contextmanager
def open_sqlite(folder: Path) -> Generator[Engine]:
    """Yield a file in the folder."""
    path = folder / "kv.db"

    def file_bytes() -> float:
        if not path.exists():
            return 0.0
        # What the pages take, wherever they are: most may still be in the log beside the file.
        with contextlib.closing(sqlite3.connect(path)) as connection:
            pages, free, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in _PAGES)
        return float((pages - free) * size)

    peer = {"kind": "py-key-value", "store": "disk", "folder": str(folder / "disk")}
    yield Engine(f"sqlite:///{path}", peer, held_bytes=file_bytes)


@contextlib.contextmanager
def open_redis(_folder: Path) -> Generator[Engine]:
    """Yield one Redis or Valkey server without persistence."""
    with _servers().running_redis("--appendonly", "no") as node:
        peer = {"store": "redis", "port": node.port}
        yield Engine(f"redis://{node.address}", peer, _pids([node]), lambda: used_bytes([node]))


@contextlib.contextmanager
def open_cluster(_folder: Path) -> Generator[Engine]:
    """Yield a cluster of three primaries with a replica each, on this machine."""
    with _servers().running_cluster() as cluster:
        peer = {"port": cluster.nodes[0].port, "is_cluster": True}
        # Each entry is on a primary and on its replica.
        yield Engine(cluster.url, peer, _pids(cluster.nodes), lambda: used_bytes(cluster.nodes) / 2)


def _servers() -> ModuleType:
    """Return what starts servers for the tests, too; it needs redis-py."""
    folder = str(REPOSITORY / "tests" / "backends")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("redis_servers")


def _pids(nodes: Sequence["RedisServer"]) -> list[int]:
    return [node.ask("INFO", "server")["process_id"] for node in nodes]


OPENERS: dict[str, Callable[[Path], AbstractContextManager[Engine]]] = {
    "memory": open_memory,
    "sqlite": open_sqlite,
    "redis": open_redis,
    "cluster": open_cluster,
}


@dataclass(frozen=True)
class Contender:
    """A client, the engine below it, and what has to be there for it."""

    name: str
    engine: str
    door: str
    """`embedded`, `served` or `peer`."""
    needs: Sequence[str] = ()
    sends_alone: bool = False
    """Whether each get is a request of its own, though the server takes batches."""
    get_note: str = ""
    set_note: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether it is aiokv."""
        return self.door != "peer"


_REDIS = ("redis-py", "redis-server")
DICT = "a dict"
CONTENDERS = (
    Contender(DICT, "memory", "peer", get_note="the loop of the measurement", set_note="the loop of the measurement"),
    Contender("memory", "memory", "embedded"),
    Contender("memory, served", "memory", "served", ["httptools"]),
    Contender(
        "memory, served, alone", "memory", "served", ["httptools", "batching"], get_note="each is a request", sends_alone=True
    ),
    Contender("py-key-value, memory", "memory", "peer", ["py-key-value", "cachetools"]),
    Contender("sqlite", "sqlite", "embedded", set_note="on the disk"),
    Contender("sqlite, served", "sqlite", "served", ["httptools"], set_note="on the disk"),
    Contender(
        "sqlite, served, alone",
        "sqlite",
        "served",
        ["httptools", "batching"],
        get_note="each is a request",
        sends_alone=True,
        set_note="on the disk",
    ),
    Contender("py-key-value, disk", "sqlite", "peer", ["py-key-value", "diskcache"], set_note="not flushed"),
    Contender("redis", "redis", "embedded", [*_REDIS, "redis://"]),
    Contender("redis, served", "redis", "served", [*_REDIS, "redis://", "httptools"]),
    Contender(
        "redis, served, alone",
        "redis",
        "served",
        [*_REDIS, "redis://", "httptools", "batching"],
        get_note="each is a request",
        sends_alone=True,
    ),
    Contender("redis-py", "redis", "peer", _REDIS),
    Contender("py-key-value, redis", "redis", "peer", [*_REDIS, "py-key-value"]),
    Contender("cluster", "cluster", "embedded", [*_REDIS, "redis+cluster://"]),
    Contender("cluster, served", "cluster", "served", [*_REDIS, "redis+cluster://", "httptools"]),
    Contender(
        "cluster, served, alone",
        "cluster",
        "served",
        [*_REDIS, "redis+cluster://", "httptools", "batching"],
        get_note="each is a request",
        sends_alone=True,
    ),
    Contender("redis-py, cluster", "cluster", "peer", _REDIS),
)

# For each engine the contender that the others are compared with.
BASES = {"memory": "py-key-value, memory", "sqlite": "py-key-value, disk", "redis": "redis-py", "cluster": "redis-py, cluster"}

_INSTALLED_BY = {
    "redis-server": "apt-get install redis-server",
    "redis-py": "pip install 'redis[hiredis]'",
    "httptools": "pip install 'aiokv[server]'",
    "py-key-value": "pip install py-key-value-aio",
    "cachetools": "pip install 'py-key-value-aio[memory]'",
    "diskcache": "pip install 'py-key-value-aio[disk]'",
}
_MODULES = {"redis-py": "redis", "py-key-value": "key_value"}


def reason_to_leave_out(contender: Contender) -> str | None:
    """Return the first thing that a contender lacks here, None where nothing is missing."""
    for need in contender.needs:
        if need.endswith("://"):
            from aiokv.backends.registry import check_url  # noqa: PLC0415 (only for those who ask)

            try:
                check_url(f"{need}{HOST}:1")
            except ValueError:
                return f"this aiokv has no {need}"
        elif need == "batching":
            from aiokv import HttpOptions  # noqa: PLC0415 (likewise)

            if not hasattr(HttpOptions(), need):
                return "this aiokv sends each get alone as it is"
        elif need == "redis-server":
            if _servers().find_server() is None:
                return _INSTALLED_BY[need]
        elif importlib.util.find_spec(_MODULES.get(need, need)) is None:
            return _INSTALLED_BY[need]
    return None


class Client:
    """One client process of one contender, with the processes whose CPU counts for it."""

    def __init__(
        self, spec: Mapping[str, Any], engine: Engine, server: Sequence[int], folder: Path, contender: Contender
    ) -> None:
        self._groups, self._name = (server, engine.pids), contender.name
        held_bytes = engine.held_bytes if contender.door == "embedded" else None
        before = 0.0 if held_bytes is None else held_bytes()
        with (folder / "client.log").open("w") as self._log:
            self._process = subprocess.Popen(
                [sys.executable, str(_CLIENT), json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        self._folder = folder
        first = self._answer()
        in_engine = None if held_bytes is None else max(0.0, held_bytes() - before) / spec["keys"]
        self.entry_bytes = first["entry_bytes"] if in_engine is None else in_engine
        """What an entry takes in the engine of an embedded store, or in this client where the engine is in its memory."""

    def measure(self, kind: str, concurrency: int, seconds: float) -> Figures:
        """Run a batch; return microseconds of CPU and latency for each call, and calls a second."""
        before = [cpu_seconds(pids) for pids in self._groups]
        command = {"kind": kind, "concurrency": concurrency, "seconds": seconds}
        if self._process.stdin is None:
            raise RuntimeError("the client has no standard input")
        print(json.dumps(command), file=self._process.stdin, flush=True)
        figures = self._answer()
        after = [cpu_seconds(pids) for pids in self._groups]
        server_us, engine_us = ((then - first) / figures["calls"] * 1e6 for then, first in zip(after, before, strict=True))
        total = figures["client_us"] + server_us + engine_us
        return {**figures, "server_us": server_us, "engine_us": engine_us, "total_us": total}

    def stop(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _answer(self) -> Figures:
        if self._process.stdout is None:
            raise RuntimeError("the client has no standard output")
        ready, _, _ = select.select([self._process.stdout], [], [], _ANSWER_SECONDS)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._process.kill()
            logs = "".join(f"\n{path.name}: {path.read_text()[-2000:]}" for path in sorted(self._folder.glob("*.log")))
            raise RuntimeError(f"the client of {self._name} failed{logs}")
        answer: Figures = json.loads(line)
        return answer


@contextlib.contextmanager
def _serving(url: str, folder: Path) -> Generator[tuple[Sequence[int], str]]:
    """Run `aiokv serve` over a URL with its defaults; yield its process and its address."""
    port = free_port()
    process = start_process([sys.executable, "-m", "aiokv", "serve", "--port", str(port), "--store", url], folder, "aiokv")
    try:
        wait_for(port, process)
        yield [process.pid], f"http://{HOST}:{port}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _spec_of(contender: Contender, engine: Engine, address: str | None) -> dict[str, Any]:
    if contender.name == DICT:
        return {"kind": "dict"}
    if contender.is_ours:
        return {"kind": "aiokv", "url": address or engine.url, "sends_alone": contender.sends_alone}
    return {"kind": "py-key-value" if contender.name.startswith("py-key-value") else "redis-py", **engine.peer}


@contextlib.contextmanager
def started(contenders: Sequence[Contender], folder: Path, keys: int, value_bytes: int) -> Generator[dict[str, Client]]:
    """Run every contender with its keys stored; stop them all at the end."""
    with contextlib.ExitStack() as stack:
        clients: dict[str, Client] = {}
        engines: dict[str, Engine] = {}
        for number, contender in enumerate(contenders):
            progress(number, len(contenders), "contenders started")
            own = folder / str(number)
            own.mkdir()
            # Embedded engines are one for each contender; a server is shared, in a namespace for each.
            engine = engines.get(contender.engine) or stack.enter_context(OPENERS[contender.engine](own))
            if engine.pids:
                engines[contender.engine] = engine
            server: Sequence[int] = ()
            address = None
            if contender.door == "served":
                server, address = stack.enter_context(_serving(engine.url, own))
            spec = {**_spec_of(contender, engine, address), "db": f"bench{number}", "keys": keys, "value_bytes": value_bytes}
            client = Client(spec, engine, server, own, contender)
            stack.callback(client.stop)
            clients[contender.name] = client
        progress(len(contenders), len(contenders), "contenders started")
        yield clients
