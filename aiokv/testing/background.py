"""The servers of the pytest fixtures, each with an event loop in its own thread, for tests that await and for others."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.sqlite import SqliteBackend
from aiokv.server.serve import running_server
from aiokv.store import AsyncKVStore
from aiokv.testing.proxy import FaultProxy

T = TypeVar("T")

# A stalled attempt takes its whole time, even where the waits between attempts are disabled.
FLAKY_RETRY = RetryPolicy(attempt_timeout=1.0)
# A quarter of it is for the connections of stores that a test has left open; nobody uses them after the test.
_DRAIN_SECONDS = 0.04


@dataclass(frozen=True, slots=True)
class KVServer:
    """A running server.

    Args:
        url: Its address.
    """

    url: str


@dataclass(frozen=True, slots=True)
class FlakyKV:
    """A store behind a proxy.

    Args:
        store: The store whose requests go through the proxy.
        proxy: The proxy.
    """

    store: AsyncKVStore
    proxy: FaultProxy


@contextlib.contextmanager
def in_thread(make: Callable[[], AbstractAsyncContextManager[T]]) -> Generator[T]:
    """Enter an asynchronous context in an event loop of a new thread.

    Args:
        make: Return the context.

    Yields:
        The value of the context.

    Raises:
        BaseException: The exception of the context at its beginning or its end.
    """
    entered: Future[tuple[T, Callable[[], None]]] = Future()
    ended: Future[None] = Future()

    async def hold() -> None:
        leave = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with make() as given:
            entered.set_result((given, lambda: _call_in(loop, leave.set)))
            await leave.wait()

    def run() -> None:
        try:
            asyncio.run(hold())
        except BaseException as error:  # noqa: BLE001 (raised again in the thread of the caller)
            (ended if entered.done() else entered).set_exception(error)
        else:
            ended.set_result(None)

    thread = threading.Thread(target=run, name="aiokv testing", daemon=True)
    thread.start()
    given, leave = entered.result()
    try:
        yield given
    finally:
        leave()
        ended.result()
        thread.join()


def _call_in(loop: asyncio.AbstractEventLoop, act: Callable[[], object]) -> None:
    # The loop may have ended by itself.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(act)


@contextlib.asynccontextmanager
async def kv_server(path: Path | None) -> AsyncGenerator[KVServer]:
    """Run a server.

    Args:
        path: The SQLite file with its values, or None for memory.

    Yields:
        The server.
    """
    backend = MemoryBackend() if path is None else SqliteBackend(path)
    try:
        async with running_server(backend, drain_seconds=_DRAIN_SECONDS) as url:
            yield KVServer(url)
    finally:
        await backend.aclose()
