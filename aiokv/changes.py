"""`Changes`: the changes of a namespace as a program reads them, for as long as its store is open."""

import contextlib
import weakref
from asyncio import get_running_loop
from collections.abc import Awaitable, Callable, Container
from typing import Self

from aiokv.backends.watching import Alive, Changed, Lost, Watch


class Changes:
    """The changes of a namespace, read by one task: `async for change in store.watch()`.

    `Lost` comes first, once changes are being told of. It is also an asynchronous context manager, which begins at once
    and ends with its block.

    Args:
        store: The store, which stays open for it.
        begin: Begin to watch.
    """

    def __init__(self, store: object, begin: Callable[[], Awaitable[Watch]]) -> None:
        self.store = store
        self._begin = begin
        self._watch: Watch | None = None
        self._is_closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Changed | Lost:
        while True:
            watch = self._watch or await self._open()
            if watch is None:
                raise StopAsyncIteration
            event = await anext(watch)
            if not isinstance(event, Alive):
                return event

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # The program has left its loop by `break`. The collector may run in any thread, and the event loop may have ended.
        watch = getattr(self, "_watch", None)
        if watch is not None and not watch.is_closed:
            with contextlib.suppress(RuntimeError):
                watch.loop.call_soon_threadsafe(watch.close)

    async def aclose(self) -> None:
        """End: a task that reads it goes on behind its loop. Safe to call twice."""
        self._is_closed = True
        if self._watch is not None:
            await self._watch.aclose()

    def end_here(self) -> None:
        """End without waiting, where it was begun in the running event loop."""
        if self._watch is not None and self._watch.loop is get_running_loop():
            self._is_closed = True
            self._watch.close()

    async def _open(self) -> Watch | None:
        """Begin, unless that was done; return None where it has ended."""
        if self._watch is None and not self._is_closed:
            self._keep(await self._begin())
        return self._watch

    def _keep(self, watch: Watch) -> None:
        if self._watch is None and not self._is_closed:
            self._watch = watch
            _begun[id(self)] = self
        else:
            # Closed meanwhile, or begun by another task.
            watch.close()


# Weakly: those that are dropped end by themselves.
_begun: "weakref.WeakValueDictionary[int, Changes]" = weakref.WeakValueDictionary()


def end_watches(stores: Container[object]) -> None:
    """End what watches some stores in the running event loop.

    Args:
        stores: The stores.
    """
    # The list is made in one step, whatever other threads begin meanwhile.
    for reference in _begun.valuerefs():
        changes = reference()
        if changes is not None and changes.store in stores:
            changes.end_here()
