"""The servers that `server.py` compares: how each is started, asked and counted. Linux only, for the CPU of other processes."""

import contextlib
import http.client
import importlib.util
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from server_subjects import BODY

VALUE = "x" * 100
KEYS = 1_000
HOST = "127.0.0.1"
_START_SECONDS = 30.0
# What our own client sends; every server has to parse it.
HEADERS = {"Accept": "*/*", "Accept-Encoding": "gzip, deflate", "User-Agent": "Python/3.11 aiohttp/3.14"}
_ENTRIES = ("GET", "/get/bench/key-", "PUT", "/set/bench/key-", "?ttl=86400")
_WEBDIS = ("GET", "/GET/key-", "PUT", "/SET/key-", "")
_CONSTANT = ("GET", "/key-", "", "", "")


@dataclass
class Running:
    """A contender that serves: its processes, its address, and how it is asked for and given a value."""

    processes: list["subprocess.Popen[str]"]
    port: int
    is_tls: bool = False
    token: str = "none"  # noqa: S105 (what is sent where any token is taken)
    # The method and the path of a get; the method, the path and the query of a set.
    calls: tuple[str, str, str, str, str] = _CONSTANT

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a request."""
        return {**HEADERS, "Authorization": f"Bearer {self.token}"}

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"{'https' if self.is_tls else 'http'}://{HOST}:{self.port}"

    def get_path(self, number: int) -> str:
        """Return the path that gets a key's value."""
        return f"{self.calls[1]}{number}"

    def pids(self) -> list[int]:
        """Return its processes, their children included."""
        found = [process.pid for process in self.processes]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        return found

    def cpu_seconds(self) -> float:
        """Return the CPU time of all threads of its processes so far, user and system."""
        # The clock of another process: see clock_getcpuclockid(3).
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.pids())

    def resident_bytes(self) -> int:
        """Return the memory that its processes hold, less what they share."""
        return sum(
            1024 * int(line.split()[1])
            for pid in self.pids()
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            if line.startswith(("Private_Clean", "Private_Dirty"))
        )

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection."""
        if self.is_tls:
            return http.client.HTTPSConnection(HOST, self.port, context=ssl._create_unverified_context())  # noqa: S323, SLF001
        return http.client.HTTPConnection(HOST, self.port)

    def fill(self) -> None:
        """Store every key, and check that a get returns a value; it also warms the server."""
        connection = self.connect()
        for number in range(KEYS):
            if self.calls[2]:
                self._ask(connection, self.calls[2], f"{self.calls[3]}{number}{self.calls[4]}", VALUE)
            if VALUE not in self._ask(connection, "GET", self.get_path(number)):
                raise RuntimeError(f"{self.address} does not return the value that was set")
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, method: str, path: str, body: str | None = None) -> str:
        connection.request(method, path, body, self.headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        if answer.status != http.client.OK:
            raise RuntimeError(f"{self.address} answered {method} {path} with {answer.status}")
        return text

    def stop(self) -> None:
        """End its processes."""
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Contender:
    """A server, what has to be installed for it, and which loads it gets."""

    name: str
    start: Callable[[Path], Running]
    needs: Sequence[str] = ()
    loads: Sequence[str] = ("get",)
    note: str = ""
    ours: bool = field(default=False)


# What has to be installed: a program or a module, and the command that adds it.
INSTALLED_BY = {
    "wrk": "apt-get install wrk",
    "webdis": "apt-get install webdis",
    "redis-server": "apt-get install redis-server",
    "nginx": "apt-get install nginx-light",
    "granian": "pip install granian",
    "uvicorn": "pip install uvicorn",
    "uvloop": "pip install uvloop",
    "trustme": "pip install trustme",
}


def is_installed(name: str) -> bool:
    """Return whether a program or a module is there."""
    return shutil.which(name) is not None or importlib.util.find_spec(name.replace("-", "_")) is not None


def start_process(arguments: Sequence[str | Path], folder: Path, name: str, **environment: str) -> "subprocess.Popen[str]":
    """Start a process in a folder, with its output in a log there."""
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [*map(str, arguments)], cwd=folder, stdout=log, stderr=log, text=True, env={**os.environ, **environment}
        )


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.create_server((HOST, 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def wait_for(port: int, process: "subprocess.Popen[str]") -> None:
    """Wait until a process listens; raise where it ends before that, or takes too long."""
    command = " ".join(process.args) if isinstance(process.args, list) else process.args
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection((HOST, port)).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"this does not start: {command}") from None
            time.sleep(0.05)
        else:
            return


def _aiokv(store: str, *flags: str, uvloop: bool = True, access: bool = False, tls: bool = False) -> Callable[[Path], Running]:
    """Return what starts `aiokv serve` with every bound at its default."""

    def start(folder: Path) -> Running:
        port = free_port()
        arguments = ["serve", "--port", str(port), "--store", store, *flags]
        key = ""
        if access:
            command = [sys.executable, "-m", "aiokv", "access", "add", "bench", "--access-file", "access"]
            key = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.split()[-1]
            arguments += ["--access-file", "access"]
        if tls:
            import trustme  # noqa: PLC0415 (one contender's)

            trustme.CA().issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(folder / "tls.pem")
            arguments += ["--tls-cert", "tls.pem"]
        # A module that is None cannot be imported, as one that is not installed.
        hidden = "" if uvloop else "sys.modules['uvloop'] = None; "
        program = f"import sys; {hidden}from aiokv.cli import main; sys.exit(main())"
        process = start_process([sys.executable, "-c", program, *arguments], folder, "aiokv")
        running = Running([process], port, is_tls=tls, calls=_ENTRIES)
        wait_for(port, process)
        if access:
            connection = running.connect()
            connection.request("POST", "/storage/auth/token", headers={"Authorization": f"Key {key}"})
            running.token = json.loads(connection.getresponse().read())["token"]
        return running

    return start


def _webdis(folder: Path) -> Running:
    redis_port, port = free_port(), free_port()
    # Without snapshots and log: nothing of it is on a disk.
    redis = start_process(
        ["redis-server", "--bind", HOST, "--port", str(redis_port), "--save", "", "--appendonly", "no"], folder, "redis"
    )
    wait_for(redis_port, redis)
    settings = {
        "redis_host": HOST,
        "redis_port": redis_port,
        "http_host": HOST,
        "http_port": port,
        "threads": 2,
        "daemonize": False,
        "verbosity": 0,
        "logfile": str(folder / "webdis.txt"),
    }
    (folder / "webdis.json").write_text(json.dumps(settings))
    webdis = start_process(["webdis", "webdis.json"], folder, "webdis")
    wait_for(port, webdis)
    return Running([redis, webdis], port, calls=_WEBDIS)


def _nginx(folder: Path) -> Running:
    port = free_port()
    (folder / "nginx.conf").write_text(f"""
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 600;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen {HOST}:{port} reuseport; location / {{ default_type application/json; return 200 '{BODY.decode()}'; }} }}
}}
""")
    process = start_process(["nginx", "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "error.log"], folder, "nginx")
    wait_for(port, process)
    return Running([process], port)


def _python(name: str, *arguments: str) -> Callable[[Path], Running]:
    """Return what starts a server in Python; `PORT` stands for its port."""

    def start(folder: Path) -> Running:
        port, here = free_port(), Path(__file__).resolve().parent
        given = [argument.replace("PORT", str(port)).replace("HERE", str(here)) for argument in arguments]
        process = start_process([sys.executable, *given], folder, name, PYTHONPATH=str(here))
        wait_for(port, process)
        return Running([process], port)

    return start


_UVICORN = ("-m", "uvicorn", "server_subjects:hello", "--port", "PORT", "--no-access-log", "--log-level", "warning")
_GRANIAN = ("-m", "granian", "server_subjects:hello", "--port", "PORT", "--interface", "asgi", "--no-access-log")
_ALL, _MEMORY = ("get", "set", "idle"), ("get", "idle")

WEBDIS = "webdis with Redis"
CONTENDERS = (
    Contender("memory", _aiokv("memory://"), ["uvloop"], _MEMORY, ours=True),
    Contender("sqlite", _aiokv("sqlite:///kv.db"), ["uvloop"], _ALL, ours=True),
    Contender("sqlite, access file", _aiokv("sqlite:///kv.db", access=True), ["uvloop"], _ALL, ours=True),
    Contender("sqlite, TLS", _aiokv("sqlite:///kv.db", tls=True), ["uvloop", "trustme"], _ALL, ours=True),
    Contender("sqlite, 2 workers", _aiokv("sqlite:///kv.db", "--workers", "2"), ["uvloop"], _ALL, ours=True),
    Contender("memory, no uvloop", _aiokv("memory://", uvloop=False), loads=_MEMORY, ours=True),
    Contender("sqlite, no uvloop", _aiokv("sqlite:///kv.db", uvloop=False), loads=_ALL, ours=True),
    Contender(WEBDIS, _webdis, ["webdis", "redis-server"], _ALL, "in memory: its sets are not durable"),
    Contender("granian hello", _python("granian", *_GRANIAN, "--loop", "uvloop"), ["granian", "uvloop"], _MEMORY),
    Contender("uvicorn hello", _python("uvicorn", *_UVICORN, "--loop", "uvloop"), ["uvicorn", "uvloop"], _MEMORY),
    Contender("nginx constant", _nginx, ["nginx"], _MEMORY),
    Contender("floor", _python("floor", "HERE/server_subjects.py", "PORT"), ["uvloop"], _MEMORY, "a protocol, a constant"),
    Contender("floor, no uvloop", _python("floor", "HERE/server_subjects.py", "PORT", "--no-uvloop"), loads=_MEMORY),
)


@contextlib.contextmanager
def started(contenders: Sequence[Contender], folder: Path) -> Generator[dict[str, Running]]:
    """Run contenders side by side, each in a folder of its own, with its keys stored; stop them at the end."""
    running: dict[str, Running] = {}
    try:
        for number, contender in enumerate(contenders):
            own = folder / str(number)
            own.mkdir()
            running[contender.name] = contender.start(own)
            running[contender.name].fill()
        yield running
    finally:
        for one in running.values():
            one.stop()
