"""One process of the server: its event loop, its signals, and what a supervisor or systemd tells it."""

import asyncio
import mmap
import os
import signal
import socket
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from aiokv.backends.base import Backend, HostedBackend, HostingOptions
from aiokv.backends.redis.options import RedisOptions
from aiokv.backends.registry import open_backend, redacted_url, sqlite_path_of
from aiokv.backends.scheme import ClientOptions
from aiokv.backends.sqlite_paths import is_file_of_store, is_same_file
from aiokv.errors import AioKVError, ConfigurationError
from aiokv.server import seat as seats
from aiokv.server.access import AccessFile
from aiokv.server.access_log import AccessLog
from aiokv.server.announce import reload_line, say, start_line
from aiokv.server.options import ServerOptions, changed_keys, check_exposure
from aiokv.server.quotas import AccountLimits
from aiokv.server.readiness import READINESS_PROBE
from aiokv.server.seat import Seat
from aiokv.server.serve import Server, server_tls
from aiokv.server.statistics import ROW_BYTES, Statistics
from aiokv.server.systemd import Notifier

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Twice in the time that systemd allows.
_WATCHDOG_SHARE = 0.5
SECOND_SIGNAL_SECONDS = 0.5
"""A stop signal that comes so soon after the first is the same one: `timeout` signals its child and its group."""


def run_process(read_options: Callable[[], ServerOptions], notifier: Notifier, sockets: Sequence[socket.socket]) -> int:
    """Serve in this process until SIGTERM or SIGINT, then finish the requests under way.

    Args:
        read_options: Return the server's options; called again at SIGHUP.
        notifier: How systemd hears of it.
        sockets: Listening sockets; empty binds the host and the port of the options.

    Returns:
        The exit status.

    Raises:
        AioKVError: An option cannot work, or the store cannot be opened.
    """
    options = read_options()
    hosts = [listener.getsockname()[0] for listener in sockets if listener.family != socket.AF_UNIX]
    warning = check_exposure(options, hosts if sockets else [options.host])
    if warning:
        say(f"warning: {warning}")
    process = _Process(options, sockets, lambda address: _announce(options, notifier, address), notifier)
    process.read_options = read_options
    return _run(process)


def run_worker(seat: Seat) -> int:
    """Serve as a worker until the supervisor says otherwise.

    Args:
        seat: The worker's place.

    Returns:
        The exit status.

    Raises:
        AioKVError: An option cannot work, or the store cannot be opened.
    """
    channel = seat.open_channel()
    process = _Process(seat.server_options, seat.open_listeners(), lambda _: _send(channel, seats.READY), Notifier({}))
    process.statistics = _shared_statistics(seat)
    process.waits = seat.waits
    process.channel = channel
    return _run(process)


def _announce(options: ServerOptions, notifier: Notifier, address: str) -> None:
    line = start_line(options, address)
    notifier.ready(line)
    say(line)


def _run(process: "_Process") -> int:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(process.run())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if find_spec("uvloop") is None:
        return None
    from uvloop import new_event_loop  # noqa: PLC0415 (an extra)

    return new_event_loop


def _shared_statistics(seat: Seat) -> Statistics | None:
    if seat.statistics is None:
        return None
    # Every worker gives it the same size; zeros at first.
    os.ftruncate(seat.statistics, seat.rows * ROW_BYTES)
    rows = mmap.mmap(seat.statistics, seat.rows * ROW_BYTES)
    # The mapping has a descriptor of its own.
    os.close(seat.statistics)
    return Statistics(rows, seat.row)


def _send(channel: socket.socket, message: bytes) -> None:
    try:
        channel.send(message)
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        # The supervisor is slow, or gone; the end of the channel says the latter.
        return


class _Process:
    """What one process serves, from the opening of its store to its end."""

    channel: socket.socket | None = None
    statistics: Statistics | None = None
    read_options: Callable[[], ServerOptions] | None = None
    waits = False

    def __init__(
        self, options: ServerOptions, sockets: Sequence[socket.socket], ready: Callable[[str], None], notifier: Notifier
    ) -> None:
        self._options = options
        self._sockets = sockets
        self._ready = ready
        self._notifier = notifier
        self._server: Server | None = None
        self._access: AccessFile | None = None
        self._access_log: AccessLog | None = None
        self._stop = asyncio.Event()
        self._stopping = False
        self._stopped_at = 0.0
        self._has_terminal = os.isatty(0)
        self._may_open = asyncio.Event()

    async def run(self) -> int:
        """Serve; return the exit status."""
        self._task = asyncio.current_task()
        self._listen()
        try:
            await self._serve()
        except asyncio.CancelledError:
            # Asked to end before the start was through.
            if not self._stopping:
                raise
        return 0

    async def _serve(self) -> None:
        options = self._options
        tls = server_tls(options.tls_cert, options.tls_key)
        if options.access_file is not None:
            limits = AccountLimits(options.requests_per_second, options.max_stored_bytes, options.max_stored_entries)
            self._access = AccessFile(options.access_file, default_limits=limits)
        statistics = self.statistics or Statistics()
        if options.access_log is not None:
            self._check_access_log(Path(options.access_log))
            self._access_log = AccessLog(options.access_log, log_keys=options.log_keys, on_dropped=statistics.dropped_lines)
        hosting = HostingOptions(
            min_free_bytes=options.min_free_bytes, ballast_bytes=options.ballast_bytes, quick_check=options.quick_check
        )
        redis = RedisOptions(durability=options.durability)
        backend: Backend = open_backend(options.store, ClientOptions(hosting=hosting, redis=redis))
        try:
            self._check_quotas(backend)
            if self.waits:
                await self._may_open.wait()
            # Read once before the address is announced: a store that cannot be opened is an error at the start.
            await backend.get(*READINESS_PROBE)
            server = Server(backend, options, access=self._access, statistics=statistics, access_log=self._access_log, tls=tls)
            address = await server.start(self._sockets or None)
            self._server = server
            self._ready(address)
            # Of several workers that start together, the first one says it.
            if not self.waits and (problem := await server.service.readiness.problem()):
                say(f"warning: not ready: {problem}")
            await self._stop.wait()
            if self.channel is None:
                say("stopping, finishing what is under way")
            self._notifier.stopping("finishing what is under way")
            await server.drain()
        finally:
            await backend.aclose()
            if self._access_log is not None:
                self._access_log.close()

    def _check_access_log(self, log: Path) -> None:
        """Refuse a log that would be written into another file of the server."""
        options = self._options
        others = [name for name in (options.access_file, options.tls_cert, options.tls_key) if name is not None]
        is_taken = any(is_same_file(log, Path(name)) for name in others)
        if options.store.lower().startswith("sqlite:"):
            is_taken = is_taken or is_file_of_store(log, Path(sqlite_path_of(options.store)))
        if is_taken:
            raise ConfigurationError(f"access log {log} is another file of this server; name a file of its own by --access-log")

    def _check_quotas(self, backend: Backend) -> None:
        """Refuse quotas that nobody could keep."""
        options = self._options
        has_quotas = options.max_stored_bytes is not None or options.max_stored_entries is not None
        if isinstance(backend, HostedBackend) or not (has_quotas or (self._access and self._access.has_stored_quotas())):
            return
        raise ConfigurationError(
            f"the store {redacted_url(options.store)} cannot count what an account stores, so quotas of bytes and entries "
            "cannot be kept; take max-stored-bytes and max-stored-entries out of the options, and max-bytes and max-entries "
            "out of the access file, or serve a store that counts, such as sqlite:///kv.db"
        )

    def _listen(self) -> None:
        """Hear signals, and the supervisor where there is one."""
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_stop_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        if self.channel is not None:
            loop.add_reader(self.channel, self._on_command, self.channel)
            self._repeat(seats.ALIVE_SECONDS, _send, self.channel, seats.ALIVE)
        if self._notifier.watchdog_seconds is not None:
            self._repeat(self._notifier.watchdog_seconds * _WATCHDOG_SHARE, self._notifier.alive)

    def _repeat(self, seconds: float, act: Callable[..., None], *arguments: object) -> None:
        act(*arguments)
        asyncio.get_running_loop().call_later(seconds, self._repeat, seconds, act, *arguments)

    def _on_stop_signal(self, number: int) -> None:
        # A worker may get one from systemd and one from its supervisor: there, a second one means nothing.
        now = asyncio.get_running_loop().time()
        if self._stopping and self.channel is None and now - self._stopped_at >= SECOND_SIGNAL_SECONDS:
            self._end_at_once(number)
        if not self._stopping:
            self._stopped_at = now
        self._begin_stop()

    def _begin_stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        if self._server is not None:
            self._stop.set()
        elif self._task is not None:
            self._task.cancel()

    def _end_at_once(self, number: int) -> None:
        cut = 0 if self._server is None else self._server.abort()
        if self.channel is None:
            connections = "1 open connection" if cut == 1 else f"{cut:,} open connections"
            say(f"ended at once by a second signal; cut {connections}")
        # Without waiting for threads: a disk that hangs holds nobody. What was acknowledged is on the disk.
        os._exit(128 + number)

    def _on_hangup(self) -> None:
        if self._has_terminal and not os.isatty(0):
            # The terminal was closed: nobody could end this process by Ctrl-C any more.
            self._begin_stop()
        else:
            self._reload()

    def _on_command(self, channel: socket.socket) -> None:
        try:
            commands = channel.recv(64)
        except BlockingIOError:
            return
        except ConnectionResetError:
            commands = b""
        if not commands:
            asyncio.get_running_loop().remove_reader(channel)
            self._begin_stop()
        if seats.ABORT in commands:
            self._end_at_once(signal.SIGTERM)
        if seats.DRAIN in commands:
            self._begin_stop()
        if seats.OPEN in commands:
            self._may_open.set()
        if seats.RELOAD in commands:
            self._reload()

    def _reload(self) -> None:
        if self._server is None or self._stopping:
            return
        self._notifier.reloading()
        try:
            if self._access is not None:
                self._access.reload()
            if self._access_log is not None:
                self._access_log.reopen()
            self._server.reload(tls=server_tls(self._options.tls_cert, self._options.tls_key))
            if self.read_options is not None:
                changed = ", ".join(changed_keys(self._options, self.read_options()))
                say(reload_line(self._options) + (f"; changed, and in force after a restart: {changed}" if changed else ""))
        except AioKVError as error:
            say(f"not reloaded, what was read before stays: {error}")
        self._notifier.ready("serving")
