"""One process's server: what it is made of, from its backend to its sockets, and how it ends."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from aiokv.backends.base import Backend
from aiokv.errors import ConfigurationError
from aiokv.server.access import AccessFile
from aiokv.server.access_log import AccessLog
from aiokv.server.announce import address_of
from aiokv.server.listener import Listener
from aiokv.server.listening import bind
from aiokv.server.operation import Operation
from aiokv.server.options import ServerOptions
from aiokv.server.service import Service
from aiokv.server.statistics import Statistics
from aiokv.wire import is_loopback


class Server:
    """One process's server of a backend.

    Args:
        backend: The store of the values; the caller opens and closes it.
        options: The bounds; None takes the defaults.
        access: The accounts; None takes any credentials.
        statistics: The counters of this process; None makes some.
        access_log: The log of requests, or None; the caller closes it.
        tls: The server's certificate, or None for plain HTTP.

    Attributes:
        service: What answers the requests.

    Raises:
        ConfigurationError: The bounds cannot be kept.
    """

    def __init__(  # noqa: PLR0913 (keywords, each with a default that serves)
        self,
        backend: Backend,
        options: ServerOptions | None = None,
        *,
        access: AccessFile | None = None,
        statistics: Statistics | None = None,
        access_log: AccessLog | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._options = options or ServerOptions()
        self.service = Service(backend, access, self._options)
        operation = Operation(self.service, backend, access, statistics or Statistics(), access_log)
        self._listener = Listener(self.service, operation, self._options, tls)

    async def start(self, sockets: Sequence[socket.socket] | None = None) -> str:
        """Accept connections.

        Args:
            sockets: Bound sockets; None binds the host and the port of the options.

        Returns:
            The address, such as `http://127.0.0.1:8787`.

        Raises:
            ConfigurationError: The address cannot be bound.
        """
        bound = bind(self._options.host, self._options.port) if sockets is None else sockets
        self._listener.start(bound)
        return address_of(bound[0], is_tls=self._listener.tls is not None)

    def reload(self, *, tls: ssl.SSLContext | None = None) -> None:
        """Take a new certificate for the connections to come.

        Args:
            tls: The certificate, or None to keep the present one.
        """
        self._listener.tls = tls or self._listener.tls

    async def drain(self) -> None:
        """Say at `/readyz` that the server stops, go on for `drain_delay_seconds`, then end within `drain_seconds`."""
        self.service.readiness.is_stopping = True
        self._listener.operation.statistics.drain()
        if self._options.drain_delay_seconds:
            await asyncio.sleep(self._options.drain_delay_seconds)
        await self._listener.drain()

    def abort(self) -> int:
        """End at once, whatever is under way.

        Returns:
            How many connections were open.
        """
        count = len(self._listener.connections)
        self._listener.abort()
        return count


@contextlib.asynccontextmanager
async def running_server(  # noqa: PLR0913 (keywords, each with a default that serves)
    backend: Backend,
    *,
    host: str = ServerOptions.host,
    port: int = 0,
    access: AccessFile | None = None,
    tls: ssl.SSLContext | None = None,
    drain_seconds: float = ServerOptions.drain_seconds,
    options: ServerOptions | None = None,
) -> AsyncGenerator[str]:
    """Serve a backend for as long as the context lasts; the backend stays open.

    Args:
        backend: The store of the values.
        host: The address to bind; anything but loopback needs an access file.
        port: The port, 0 for a free one.
        access: The accounts; None takes any credentials.
        tls: The server's certificate, or None for plain HTTP.
        drain_seconds: How long requests under way may take to finish at the end.
        options: The bounds; None takes the defaults. Its host, port and drain_seconds are not looked at.

    Yields:
        The address, such as `http://127.0.0.1:8787`, once connections are accepted.

    Raises:
        ConfigurationError: The address cannot be bound, or would be open to other machines without an access file.
    """
    if access is None and not is_loopback(host):
        raise ConfigurationError(
            f"without an access file the server binds to loopback only, not to {host!r}; "
            "make one with `aiokv access add <account> --access-file FILE` and pass it"
        )
    options = (options or ServerOptions())._replace(host=host, port=port, drain_seconds=drain_seconds)
    server = Server(backend, options, access=access, tls=tls)
    try:
        yield await server.start()
    finally:
        await server.drain()


def server_tls(tls_cert: str | None, tls_key: str | None) -> ssl.SSLContext | None:
    """Load a server's certificate.

    Args:
        tls_cert: A PEM file with the certificate chain, or None for plain HTTP.
        tls_key: A PEM file with the certificate's key; None where `tls_cert` holds the key, too.

    Returns:
        The context, or None for plain HTTP.

    Raises:
        ConfigurationError: A file is missing or does not fit.
    """
    if tls_cert is None:
        if tls_key is not None:
            raise ConfigurationError("--tls-key needs --tls-cert")
        return None
    for path in filter(None, (tls_cert, tls_key)):
        if not Path(path).is_file():
            raise ConfigurationError(f"TLS file {path} does not exist")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        if tls_key is None and b"PRIVATE KEY-----" not in Path(tls_cert).read_bytes():
            raise ConfigurationError(f"TLS file {tls_cert} has no key in it; pass --tls-key")
        context.load_cert_chain(tls_cert, tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"{tls_cert} and its key cannot be used for TLS: {error}") from error
    return context
