"""What the tests of cached plain functions need: calls of either kind, threads, and a held-up background store."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any

from aiokv import background


def ask(call: Any) -> Any:
    """Return the result of a call of either kind: a value, or a coroutine to be run."""
    return asyncio.run(call) if isinstance(call, Coroutine) else call


def in_background(work: Callable[[], object]) -> None:
    """Run a function in the background loop, as an event that code there waits for asks for."""

    async def run() -> None:
        work()

    background.run(run)


def begin(work: Callable[..., Any], *args: Any) -> "Future[Any]":
    """Run a function in a thread of its own; return its result to be."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work(*args))
        except BaseException as error:  # noqa: BLE001 (a test looks at whatever it is)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def results(futures: "Iterable[Future[Any]]", seconds: float = 15.0) -> list[Any]:
    """Return the results of threads, none of which may hang."""
    return [future.result(seconds) for future in futures]


def wait_until(is_true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until another thread has come so far."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.001)
