"""`aiokv ping`: can the store be reached, and if not, which step fails and what to do."""

import argparse
import asyncio
import secrets
import socket
import ssl
import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, TypeVar

from aiokv import clock
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.redis.urls import SCHEMES as REDIS_SCHEMES
from aiokv.backends.redis.urls import format_address, parse_url
from aiokv.backends.registry import canonical_url, check_url, redacted_url, resolve_url, sqlite_path_of
from aiokv.cli.entries import add_url
from aiokv.cli.terminal import can_show
from aiokv.errors import AioKVError, CallError
from aiokv.limits import MIN_TTL_SECONDS
from aiokv.store import AsyncKVStore

T = TypeVar("T")

_FAILED = 3
_ROUND_TRIPS = 20
_CONNECT_SECONDS = 5.0
_DEFAULT_DB = "aiokv-ping"
_TLS_SCHEMES = ("https", "rediss", "valkeys")

_EPILOG = """\
examples: aiokv ping
          aiokv ping --url https://kv.example.com --write

Each step is a line with the time that it took: the name is resolved, a connection made, TLS agreed on, a first get answered
(with the credentials of the environment), and 20 gets of an absent key. --write also sets, gets and deletes a key of its own.
The first step that fails says what to do. Exit status: 0 all is well, 2 wrong usage, 3 a step failed.
"""


def add_ping(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ping`.

    Args:
        parser: That of the command.
    """
    parser.epilog = _EPILOG
    add_url(parser)
    parser.add_argument(
        "--db", dest="db_name", metavar="DB", default=_DEFAULT_DB, help=f"the namespace (default: {_DEFAULT_DB})"
    )
    parser.add_argument("--write", action="store_true", help="set, get and delete a key, too")
    parser.set_defaults(run=_ping)


def _ping(options: argparse.Namespace) -> int:
    url = resolve_url(options.url)
    check_url(url)
    store = AsyncKVStore(options.db_name, url=url, retry=RetryPolicy.none())
    steps = _Steps()
    print(redacted_url(url), flush=True)
    try:
        asyncio.run(_take_steps(steps, store, canonical_url(url), write=options.write))
    except _StepError:
        return _FAILED
    return _FAILED if steps.failed else 0


class _StepError(Exception):
    """A step failed, and has said so; those behind it make no sense."""


class _Steps:
    """Steps, each shown with the time that it took."""

    def __init__(self) -> None:
        self.failed = 0
        self._marks = ("✓", "✗") if can_show("✓✗", sys.stdout) else ("ok  ", "FAIL")

    async def take(self, name: str, step: Awaitable[T], say: Callable[[T], str], way_out: Callable[[Exception], str]) -> T:
        """Take a step and show it.

        Raises:
            _StepError: It failed.
        """
        began = clock.monotonic()
        try:
            result = await step
        except (AioKVError, OSError, ValueError) as error:
            self.show(name, way_out(error), clock.monotonic() - began, is_good=False)
            raise _StepError from None
        self.show(name, say(result), clock.monotonic() - began)
        return result

    def show(self, name: str, text: str, seconds: float, *, is_good: bool = True) -> None:
        """Show a step that has been taken."""
        self.failed += not is_good
        line = f"{self._marks[not is_good]} {name:<9} {1_000 * seconds:9.1f} ms  {text}"
        if not can_show(line, sys.stdout):
            line = line.encode("ascii", "backslashreplace").decode()
        print(line, flush=True)


class _Host(NamedTuple):
    """A host that a URL names."""

    name: str
    port: int
    is_tls: bool


def _hosts_of(url: str) -> Sequence[_Host]:
    """Return the hosts behind a canonical URL; none of an embedded store, and of schemes that are not known here."""
    scheme = url.partition("://")[0]
    is_tls = scheme.partition("+")[0] in _TLS_SCHEMES
    if scheme in REDIS_SCHEMES:
        return [_Host(name, port, is_tls) for name, port in parse_url(url).hosts]
    if scheme not in {"http", "https"}:
        return []
    from yarl import URL  # noqa: PLC0415 (only here)

    parts = URL(url)
    return [_Host(parts.host or "", parts.port or (443 if is_tls else 80), is_tls)]


async def _take_steps(steps: _Steps, store: AsyncKVStore, url: str, *, write: bool) -> None:
    hosts = _hosts_of(url)
    reached = 0
    for host in hosts:
        try:
            await _reach(steps, host)
            reached += 1
        except _StepError:
            # Of a cluster another host may do.
            continue
    if hosts and not reached:
        raise _StepError
    place = (
        "a first get was answered; credentials, where the server asks for any, were accepted"
        if hosts
        else _describe_embedded(url)
    )
    key = f"ping-{secrets.token_hex(8)}"
    async with store:
        await steps.take("sign in" if hosts else "open", store.get(key), lambda _: place, _way_out_of_call)
        await steps.take("gets", _round_trips(store, key), str, _way_out_of_call)
        if write:
            try:
                await steps.take("set", store.set(key, "ping", MIN_TTL_SECONDS), lambda _: "a key of its own", _way_out_of_call)
                await steps.take("get", _read_back(store, key), str, _way_out_of_call)
            finally:
                await steps.take("delete", store.delete(key), lambda _: "the same key", _way_out_of_call)


async def _reach(steps: _Steps, host: _Host) -> None:
    loop = asyncio.get_running_loop()
    address = format_address((host.name, host.port))

    await steps.take(
        "resolve",
        loop.getaddrinfo(host.name, host.port, type=socket.SOCK_STREAM),
        lambda found: f"{host.name} is {', '.join(dict.fromkeys(str(entry[4][0]) for entry in found))}",
        lambda error: f"{host.name} is not known ({error}): look at the host in the URL, and at this machine's DNS",
    )
    _, writer = await steps.take(
        "connect", _connect(host, None), lambda _: address, lambda error: _no_connection(address, error)
    )
    writer.close()
    if host.is_tls:
        context = ssl.create_default_context()
        _, writer = await steps.take(
            "TLS", _connect(host, context), lambda pair: _describe_tls(pair[1]), lambda error: _no_tls(host, error)
        )
        writer.close()


async def _connect(host: _Host, context: ssl.SSLContext | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with asyncio.timeout(_CONNECT_SECONDS):
        return await asyncio.open_connection(host.name, host.port, ssl=context)


def _describe_tls(writer: asyncio.StreamWriter) -> str:
    encrypted = writer.get_extra_info("ssl_object")
    return f"{encrypted.version()}, certificate until {(encrypted.getpeercert() or {}).get('notAfter', 'an unknown date')}"


def _no_connection(address: str, error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer from {address} within {_CONNECT_SECONDS:g} s: a firewall may be between, or the host is down"
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens at {address}: start the server (`aiokv serve`), or look at the port in the URL"
    return f"{address} cannot be reached ({error}): look at the network, and at the address in the URL"


def _no_tls(host: _Host, error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {host.name} is not trusted ({error.verify_message}): name its authority's PEM file in "
            "SSL_CERT_FILE, or use the name that the certificate is for"
        )
    if isinstance(error, ssl.SSLError):
        return (
            f"port {host.port} does not speak TLS ({error.reason}): write http:// or redis:// if that is meant, or another port"
        )
    return f"the connection ended while TLS was agreed on ({type(error).__name__}): look at the port, and at what is between"


def _describe_embedded(url: str) -> str:
    if url.startswith("sqlite:"):
        return f"the file {sqlite_path_of(url)}"
    return "the memory of this process" if url.startswith("memory:") else "what an installed package has opened"


def _way_out_of_call(error: Exception) -> str:
    transient = "; it may be over soon: try again" if isinstance(error, CallError) and error.transient else ""
    return f"{error}{transient}"


async def _round_trips(store: AsyncKVStore, key: str) -> str:
    times = []
    for _ in range(_ROUND_TRIPS):
        began = clock.monotonic()
        await store.get(key)
        times.append(1_000 * (clock.monotonic() - began))
    return (
        f"{_ROUND_TRIPS} round trips: least {min(times):.2f}, median {statistics.median(times):.2f}, most {max(times):.2f} ms"
    )


async def _read_back(store: AsyncKVStore, key: str) -> str:
    if await store.get(key) is None:
        raise ValueError(
            "the key that was just set is absent: is there a second server behind this address, with a store of its own?"
        )
    return "what was set"
