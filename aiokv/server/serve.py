"""The server as a process or inside a program: bind, announce, serve and stop."""

import asyncio
import contextlib
import signal
import ssl
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from aiohttp import web

from aiokv.backends.base import Backend
from aiokv.backends.registry import open_backend
from aiokv.errors import ConfigurationError
from aiokv.server.access import AccessFile
from aiokv.server.app import READINESS_PROBE, HttpServer, Service
from aiokv.wire import is_loopback

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8787
# Longer than clients keep an idle connection, so that the client closes it first.
KEEPALIVE_SECONDS = 75.0
DRAIN_SECONDS = 10.0
_BACKLOG = 1024


@contextlib.asynccontextmanager
async def running_server(  # noqa: PLR0913 (keywords, each with a default that serves)
    backend: Backend,
    *,
    host: str = DEFAULT_HOST,
    port: int = 0,
    access: AccessFile | None = None,
    tls: ssl.SSLContext | None = None,
    drain_seconds: float = DRAIN_SECONDS,
) -> AsyncGenerator[str]:
    """Serve a backend for as long as the context lasts; the backend stays open.

    Args:
        backend: The store of the values.
        host: The address to bind; anything but loopback needs an access file.
        port: The port, 0 for a free one.
        access: The accounts; None takes any credentials.
        tls: The server's certificate, or None for plain HTTP.
        drain_seconds: How long requests under way may take to finish at the end.

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
    runner = web.ServerRunner(HttpServer(Service(backend, access), KEEPALIVE_SECONDS), shutdown_timeout=drain_seconds)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, ssl_context=tls, backlog=_BACKLOG)
        try:
            await site.start()
        except (OSError, OverflowError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ConfigurationError(f"cannot listen on {host} port {port}: {reason}") from error
        url_host = f"[{host}]" if ":" in host else host
        yield f"{'https' if tls else 'http'}://{url_host}:{site.port}"
    finally:
        await runner.cleanup()


async def serve(  # noqa: PLR0913 (one for each option of the command)
    store_url: str,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    access_file: str | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
) -> None:
    """Serve a store until SIGTERM or SIGINT, then finish the requests under way.

    Args:
        store_url: The store of the values, such as `sqlite:///kv.db`.
        host: The address to bind.
        port: The port, 0 for a free one.
        access_file: The file of the accounts; None lets every program of this machine in.
        tls_cert: A PEM file with the certificate chain, or None for plain HTTP.
        tls_key: A PEM file with the certificate's key; None where `tls_cert` holds the key, too.

    Raises:
        ConfigurationError: An option cannot work, or the store cannot be opened.
    """
    tls = server_tls(tls_cert, tls_key)
    access = AccessFile(access_file) if access_file is not None else None
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    backend = open_backend(store_url)
    try:
        # Read once before the address is announced: a store that cannot be opened is an error at the start.
        await backend.get(*READINESS_PROBE)
        async with running_server(backend, host=host, port=port, access=access, tls=tls) as address:
            note = "" if access else ", any credentials taken (no access file)"
            print(f"aiokv: serving {store_url} at {address}{note}", file=sys.stderr, flush=True)  # noqa: T201
            await stop.wait()
            print("aiokv: stopping, finishing what is under way", file=sys.stderr, flush=True)  # noqa: T201
    finally:
        await backend.aclose()


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
        context.load_cert_chain(tls_cert, tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"{tls_cert} and its key cannot be used for TLS: {error}") from error
    return context
