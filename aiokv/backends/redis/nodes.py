"""`Node`: the connections to one server, and commands sent over them."""

import asyncio
import socket
import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import redis.exceptions as theirs
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection

from aiokv.backends.redis.errors import NoDatabaseError
from aiokv.backends.redis.urls import Address, Login, format_address

# Close by a reset: what a call that was given up has left in the kernel's buffer must not arrive later.
_NO_LINGER: Final = struct.pack("ii", 1, 0)
_RESP3: Final = 3
# What a server says of a database that it does not have.
_NO_DATABASE: Final = "DB index is out of range"
# An outage that nobody has met for so long may be over: it says nothing of the next failure.
_FORGOTTEN_SECONDS: Final = 5.0


class ConnectionSettings(NamedTuple):
    """What the connections to every node of a store have in common."""

    login: Login
    is_tls: bool
    database: int
    connect_timeout: float
    ca_file: str | None = None


class NodeError(Exception):
    """A connection failed, or could not be made.

    Args:
        cause: The exception of redis-py or of the socket.
        was_sent: Whether the commands may have reached the server.
        replies: The replies that came before.
    """

    def __init__(self, cause: BaseException, replies: Sequence[Any] = (), *, was_sent: bool) -> None:
        super().__init__()
        self.cause = cause
        self.was_sent = was_sent
        self.replies = replies


def pack(*arguments: bytes) -> bytes:
    """Write a command as it is sent.

    Args:
        arguments: The command's name and its arguments.

    Returns:
        Its bytes.
    """
    return b"*%d\r\n" % len(arguments) + b"".join([b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments])


class Outage:
    """For how long something has failed without a success in between."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._began_at = self._failed_at = -_FORGOTTEN_SECONDS

    def failed(self) -> None:
        """Note a failure."""
        now = self._loop.time()
        if now - self._failed_at >= _FORGOTTEN_SECONDS:
            self._began_at = now
        self._failed_at = now

    def ended(self) -> None:
        """Note a success."""
        self._failed_at = -_FORGOTTEN_SECONDS

    def seconds(self) -> float:
        """Return for how long it has lasted; 0 where there is none that anybody has met lately."""
        now = self._loop.time()
        return now - self._began_at if now - self._failed_at < _FORGOTTEN_SECONDS else 0.0


class Node:
    """The connections to one server; belongs to one event loop.

    Args:
        address: Host and port.
        settings: How connections are made.
        max_connections: Connections at once, and so commands or pipelines under way at once; `ask` has its own.
    """

    def __init__(self, address: Address, settings: ConnectionSettings, max_connections: int) -> None:
        self.address = address
        self.host = format_address(address)
        self.outage = Outage()
        self.lack = Outage()
        """Lasts while too few replicas have the writes."""
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._free = asyncio.Semaphore(max_connections)
        self._idle: list[AbstractConnection] = []
        # The connections in use, each with the time at which its commands began.
        self._in_use: dict[AbstractConnection, float] = {}
        self._is_retired = False

    async def run(self, packed: bytes, reply_count: int, deadline: float) -> list[Any]:
        """Send commands in one go, and read their replies.

        Args:
            packed: The commands.
            reply_count: How many there are.
            deadline: The loop's time at which the replies must be there.

        Returns:
            A reply for each command; an error reply is an exception of redis-py among them.

        Raises:
            NodeError: The connection failed, or no reply came in time.
        """
        if self._free.locked():
            try:
                async with asyncio.timeout_at(deadline):
                    await self._free.acquire()
            except TimeoutError:
                raise NodeError(theirs.MaxConnectionsError(), was_sent=False) from None
        else:
            await self._free.acquire()
        try:
            return await self._exchange(packed, reply_count, deadline)
        finally:
            self._free.release()

    async def ask(self, packed: bytes, reply_count: int, seconds: float) -> list[Any]:
        """As `run`, for questions about the server itself: they do not wait for a free connection.

        Args:
            packed: The commands.
            reply_count: How many there are.
            seconds: How long the answer may take.

        Returns:
            As `run`.

        Raises:
            NodeError: As `run`.
        """
        return await self._exchange(packed, reply_count, self._loop.time() + seconds)

    async def connect(self, seconds: float | None = None) -> AbstractConnection:
        """Make a connection that the caller closes by `drop`.

        Args:
            seconds: How long that may take; None takes the settings' `connect_timeout`.

        Returns:
            The connection, logged in.

        Raises:
            NodeError: None could be made.
        """
        settings = self._settings
        kind: type[Connection] = SSLConnection if settings.is_tls else Connection
        tls: dict[str, Any] = {"ssl_ca_certs": settings.ca_file} if settings.is_tls else {}
        connection = kind(
            host=self.address[0],
            port=self.address[1],
            db=settings.database,
            username=settings.login.username,
            password=settings.login.password,
            protocol=_RESP3,
            # Deadlines are set around each exchange, and retries are made by the caller.
            socket_timeout=None,
            socket_connect_timeout=None,
            driver_info=None,
            **tls,
        )
        try:
            async with asyncio.timeout(settings.connect_timeout if seconds is None else seconds):
                await connection.connect()  # type: ignore[no-untyped-call]
        except (TimeoutError, OSError, theirs.RedisError) as error:
            await drop(connection)
            is_database = isinstance(error, theirs.ResponseError) and _NO_DATABASE in str(error)
            raise NodeError(NoDatabaseError(settings.database) if is_database else error, was_sent=False) from None
        except BaseException:
            await drop(connection)
            raise
        _set_no_linger(connection)
        return connection

    def stalled_for(self) -> float:
        """Return for how many seconds the oldest of its commands has been under way."""
        # In the order in which they began.
        oldest = next(iter(self._in_use.values()), None)
        return 0.0 if oldest is None else self._loop.time() - oldest

    async def drop_all(self) -> None:
        """Cut every connection: commands under way fail at once, as where the server is no primary any more."""
        idle, self._idle = self._idle, []
        for connection in [*idle, *self._in_use]:
            await drop(connection)

    async def retire(self) -> None:
        """Cut every connection, and keep none from now on."""
        self._is_retired = True
        await self.drop_all()

    async def _exchange(self, packed: bytes, reply_count: int, deadline: float) -> list[Any]:
        connection: AbstractConnection | None = None
        replies: list[Any] = []
        was_sent = is_clean = False
        try:
            async with asyncio.timeout_at(deadline):
                connection = await self._take()
                self._in_use[connection] = self._loop.time()
                was_sent = True
                await connection.send_packed_command([packed], check_health=False)
                for _ in range(reply_count):
                    try:
                        replies.append(await connection.read_response())
                    except theirs.ResponseError as error:
                        replies.append(error)
                is_clean = True
        except NodeError:
            raise
        except (TimeoutError, OSError, theirs.RedisError) as error:
            raise NodeError(error, replies, was_sent=was_sent) from None
        finally:
            if connection is not None:
                self._in_use.pop(connection, None)
                if is_clean and connection.is_connected and not self._is_retired:
                    self._idle.append(connection)
                else:
                    await drop(connection)
        return replies

    async def _take(self) -> AbstractConnection:
        while self._idle:
            connection = self._idle.pop()
            # Something to read on an idle connection is its end, or the answer to somebody else.
            if connection.is_connected and not await connection.can_read():
                return connection
            await drop(connection)
        return await self.connect()


async def drop(connection: AbstractConnection) -> None:
    """Close a connection at once, whatever is under way on it.

    Args:
        connection: The connection.
    """
    writer = connection._writer  # noqa: SLF001 (redis-py's `disconnect` would flush what must not be sent any more)
    if writer is not None:
        writer.transport.abort()
    await connection.disconnect(nowait=True)


def _set_no_linger(connection: AbstractConnection) -> None:
    writer = connection._writer  # noqa: SLF001 (no other way to the socket)
    found = None if writer is None else writer.get_extra_info("socket")
    if found is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
