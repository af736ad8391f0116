"""`Listener`: the sockets of one process, the connections that they bring, and how all of them end.

Source: RFC 9112 section 9.6 for how a connection is closed.
"""

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import ssl
import time
from collections.abc import Coroutine, Sequence
from email.utils import formatdate

from aiokv.errors import ConfigurationError
from aiokv.server.answers import RETRY_SOON, refusal
from aiokv.server.connection import Connection
from aiokv.server.log_limit import LogLimit
from aiokv.server.operation import Operation
from aiokv.server.options import ServerOptions
from aiokv.server.service import Service
from aiokv.server.short_way import ShortWay
from aiokv.server.wrong_keys import network_of

logger = logging.getLogger("aiokv.server")

_BACKLOG = 1024
_BUFFER_BYTES = 64 * 1024
_ACCEPTED_AT_ONCE = 64
_ACCEPT_PAUSE_SECONDS = 0.2
# Files for the store, its log, the access file, threads and what the program itself holds open.
_RESERVED_FILES = 64
_MOST_CONNECTIONS = 16_384
_LOOK_SECONDS = 1.0
_PUBLISH_SECONDS = 2.0
_IDLE_DRAIN_SECONDS = 0.5
_FULL = refusal(503, "the server has as many connections as it may", RETRY_SOON, closes=True)


class Listener:
    """Accepts connections for a service, within the bounds of its options.

    Args:
        service: Answers the requests.
        operation: Counts and logs what happens.
        options: The bounds.
        tls: The server's certificate, or None for plain HTTP.

    Attributes:
        buffer: What every connection reads into.
        short_way: Of plain requests; None where all go the long way.
        connections: Those that are open.
        date: The lines that every answer bears: its date, and the extensions.
        is_draining: Whether every answer closes its connection.
    """

    def __init__(
        self, service: Service, operation: Operation, options: ServerOptions, tls: ssl.SSLContext | None = None
    ) -> None:
        self.service = service
        self.operation = operation
        self.options = options
        self.tls = tls
        self.buffer = memoryview(bytearray(_BUFFER_BYTES))
        # A log line for each request needs the whole of it.
        self.short_way = None if operation.access_log else ShortWay(service, operation.statistics)
        self.connections: set[Connection] = set()
        self.date = b""
        self.is_draining = False
        self.max_connections = _max_connections(options)
        self._max_of_address = options.max_connections_per_address or max(1, self.max_connections // 2)
        # From the moment that it is accepted on; a handshake may take a while.
        self._count = 0
        self._count_by_address: dict[str, int] = {}
        self._accepting: dict[int, socket.socket] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking: asyncio.TimerHandle | None = None
        self._looked_at = self._publish_at = 0.0
        self._log_limit = LogLimit()
        self._loop = asyncio.get_running_loop()
        self._look()

    def start(self, sockets: Sequence[socket.socket]) -> None:
        """Accept connections.

        Args:
            sockets: Bound sockets; closed at the end.
        """
        for listening in sockets:
            listening.listen(_BACKLOG)
            listening.setblocking(False)
            self._accepting[listening.fileno()] = listening
            self._loop.add_reader(listening.fileno(), self._accept, listening)

    async def drain(self) -> None:
        """Take no more connections, answer what is under way and what comes in time, and close the connections."""
        for listening in self._accepting.values():
            # Closing it would cut off those who wait to be accepted.
            for _ in range(_BACKLOG // _ACCEPTED_AT_ONCE + 1):
                if not self._accept(listening):
                    break
        self.close_sockets()
        self.is_draining = True
        self.short_way = None
        self.service.extensions.watches.close()
        deadline = self._loop.time() + self.options.drain_seconds
        # A client whose connection is idle may be about to use it: it has a moment to, and its answer closes the connection.
        idle_seconds = min(_IDLE_DRAIN_SECONDS, self.options.drain_seconds / 4)
        step_seconds = max(0.001, idle_seconds / 10)
        waited = 0.0
        # Those too that are accepted and not set up yet.
        while self._count and self._loop.time() < deadline:
            if waited >= idle_seconds:
                for connection in list(self.connections):
                    connection.close_if_idle(0.0)
            await asyncio.sleep(step_seconds)
            waited += step_seconds
        self.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.service.extensions.watches.aclose()
        # Lets the transports of what was cut tell that they are closed.
        await asyncio.sleep(0)

    def abort(self) -> None:
        """Cut what is left, and end."""
        self.close_sockets()
        self.service.extensions.watches.close()
        for connection in list(self.connections):
            connection.abort()
        for task in self._tasks:
            task.cancel()
        if self._looking is not None:
            self._looking.cancel()

    def close_sockets(self) -> None:
        """Accept no more connections; safe to call twice."""
        for descriptor, listening in self._accepting.items():
            self._loop.remove_reader(descriptor)
            listening.close()
        self._accepting.clear()

    def run(self, serving: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        """Serve in a task what has to be waited for.

        Args:
            serving: What is to be run.

        Returns:
            The task, which the listener holds.
        """
        task = self._loop.create_task(serving)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def opened(self, connection: Connection) -> None:
        """Take note of a connection; called by it."""
        self.connections.add(connection)
        self.operation.statistics.opened()

    def lost(self, connection: Connection) -> None:
        """Take note of a connection's end; called by it."""
        self.connections.discard(connection)
        self.operation.statistics.closed()
        self._left(connection.address)

    def _accept(self, listening: socket.socket) -> bool:
        """Accept some of those who wait; return whether more may."""
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, peer = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return False
            except OSError as error:
                self._pause_accepting(listening, error)
                return False
            address = peer[0] if isinstance(peer, tuple) else ""
            network = _network_of(address)
            count = self._count_by_address.get(network, 0)
            if self._count >= self.max_connections:
                self._turn_away(accepted, "connections", f"the server has its {self.max_connections:,} connections")
            elif count >= self._max_of_address:
                self._turn_away(accepted, "connections_per_address", f"{address} has its {self._max_of_address:,} connections")
            else:
                self._count += 1
                self._count_by_address[network] = count + 1
                self.run(self._welcome(accepted, address))
        return True

    async def _welcome(self, accepted: socket.socket, address: str) -> None:
        connection = Connection(self, address)
        try:
            accepted.setblocking(False)
            with contextlib.suppress(OSError):
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            handshake = {} if self.tls is None else {"ssl_handshake_timeout": self.options.head_timeout_seconds}
            await self._loop.connect_accepted_socket(lambda: connection, accepted, ssl=self.tls, **handshake)
        except BaseException as error:
            if connection not in self.connections:
                self._left(address)
            if not isinstance(error, OSError | ssl.SSLError | TimeoutError):
                raise

    def _turn_away(self, accepted: socket.socket, reason: str, message: str) -> None:
        self.operation.refused(reason)
        self._log_limit.warning(logger, reason, f"a connection was refused: {message}")
        with contextlib.suppress(OSError):
            accepted.setblocking(False)
            if self.tls is None:
                accepted.send(_FULL.head(self.date, b"Connection: close\r\n") + _FULL.body)
        accepted.close()

    def _pause_accepting(self, listening: socket.socket, error: OSError) -> None:
        if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
            self._log_limit.error(logger, "accept", f"a connection could not be accepted: {error.strerror}")
            return
        self._log_limit.error(logger, "accept", f"no connection can be accepted now: {error.strerror}")
        descriptor = listening.fileno()
        self._loop.remove_reader(descriptor)

        def go_on() -> None:
            if descriptor in self._accepting:
                self._loop.add_reader(descriptor, self._accept, listening)

        self._loop.call_later(_ACCEPT_PAUSE_SECONDS, go_on)

    def _left(self, address: str) -> None:
        self._count -= 1
        network = _network_of(address)
        count = self._count_by_address.pop(network) - 1
        if count:
            self._count_by_address[network] = count

    def _look(self) -> None:
        """Look at every connection, and come again."""
        now = self._loop.time()
        seconds = now - self._looked_at if self._looked_at else 0.0
        self._looked_at = now
        # With the header of the extensions, which every answer bears, too.
        self.date = b"Date: %b\r\n%b" % (formatdate(time.time(), usegmt=True).encode(), self.service.extensions.header)
        unread_bytes = 0
        for connection in list(self.connections):
            connection.look(seconds)
            unread_bytes += connection.unread_bytes()
            if unread_bytes > self.options.max_bytes_in_flight:
                # Small answers, of which each connection may leave some unread: there may be many connections.
                unread_bytes -= connection.unread_bytes()
                self.operation.refused("slow_reader")
                connection.abort()
        self.operation.statistics.enter_tallies()
        if now >= self._publish_at:
            self._publish_at = now + _PUBLISH_SECONDS
            self.operation.publish()
        options = self.options
        shortest = min(options.head_timeout_seconds, options.idle_timeout_seconds, options.grace_seconds)
        self._looking = self._loop.call_later(max(0.01, min(_LOOK_SECONDS, shortest / 4)), self._look)


def _network_of(address: str) -> str:
    # One machine can use all addresses of its network, of which IPv4 gives it one.
    return network_of(address) if ":" in address else address


def _max_connections(options: ServerOptions) -> int:
    """Return the bound of connections, below the limit of open files, which is raised where it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = (options.max_connections or _MOST_CONNECTIONS) + _RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    allowed = _MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, soft - _RESERVED_FILES)
    if options.max_connections is None:
        return min(allowed, _MOST_CONNECTIONS)
    if options.max_connections > allowed:
        raise ConfigurationError(
            f"max_connections is {options.max_connections:,}, but the limit of {soft:,} open files allows {allowed:,}; "
            "raise it (`ulimit -n`, or LimitNOFILE= of the systemd unit)"
        )
    return options.max_connections
