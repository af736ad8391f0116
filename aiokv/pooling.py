"""Opened backends, shared by the stores of one event loop, and what a fork does to them.

A backend is opened by the first store that needs it and closed by the last one that lets go, or at the end of its loop.
"""

import asyncio
import os
import threading
import weakref
from asyncio import get_running_loop
from collections.abc import AsyncGenerator, Callable, Collection, Hashable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from aiokv.backends.base import Backend

if TYPE_CHECKING:

    class PoolUser(Protocol):
        """A store that uses a shared backend."""

        def _unbind(self) -> None:
            """Forget the backend: the next call opens one anew."""
            ...


fork_generation = 0
"""How many forks this process has behind it: what another generation opened is not this process's to use."""


class _Shared:
    """A backend that is open in one loop, and the stores that share it."""

    __slots__ = ("backend", "closing", "loop", "users")

    def __init__(self, loop: asyncio.AbstractEventLoop, backend: Backend, closing: AsyncGenerator[None, None]) -> None:
        self.loop = loop
        self.backend = backend
        self.closing = closing
        self.users: weakref.WeakSet[PoolUser] = weakref.WeakSet()


_shared: dict[Hashable, _Shared] = {}
_lock = threading.Lock()
# A forked child neither uses nor closes what it finds: the connections are its parent's.
_of_parents: list[dict[Hashable, _Shared]] = []


async def acquire(user: "PoolUser", sharing_key: Hashable, open_backend: Callable[[], Backend]) -> Backend:
    """Join the stores that share a backend in the running loop.

    Args:
        user: The store, held weakly.
        sharing_key: What the stores that share the backend have in common.
        open_backend: Make the backend where none is open; it must not wait.

    Returns:
        The backend, which stays open until `release` or the end of the loop.
    """
    loop = get_running_loop()
    key = (loop, sharing_key)
    with _lock:
        _forget_closed_loops()
        shared = _shared.get(key)
        is_new = shared is None
        if shared is None:
            backend = open_backend()
            shared = _shared[key] = _Shared(loop, backend, _close_with_loop(key, backend))
        shared.users.add(user)
    if is_new:
        # Run to its first yield, which does not suspend: from here on the loop knows the generator.
        await anext(shared.closing)
    return shared.backend


def join(user: "PoolUser", groups: "Iterable[weakref.WeakSet[Any]]") -> None:
    """Add a store to groups that are released together.

    Args:
        user: The store.
        groups: The groups, which other threads may release meanwhile.
    """
    with _lock:
        for group in groups:
            group.add(user)


async def release(users: "Collection[PoolUser]", sharing_key: Hashable) -> None:
    """Leave every backend of the running loop; close those that no other store uses.

    Args:
        users: The stores that leave.
        sharing_key: That of their backend, which is closed also where only stores that are gone have used it.
    """
    loop = get_running_loop()
    unused: list[_Shared] = []
    with _lock:
        leaving = list(users)
        for user in leaving:
            user._unbind()  # noqa: SLF001 (of the protocol above; no method for users of a store)
        for key, shared in list(_shared.items()):
            if shared.loop is not loop or (key != (loop, sharing_key) and not any(user in shared.users for user in leaving)):
                continue
            shared.users.difference_update(leaving)
            if not shared.users:
                del _shared[key]
                unused.append(shared)
    for shared in unused:
        await shared.closing.aclose()


async def _close_with_loop(key: Hashable, backend: Backend) -> AsyncGenerator[None, None]:
    """Close a backend when its loop ends: `asyncio.run` finishes the generators that are still open."""
    try:
        yield
    finally:
        with _lock:
            shared = _shared.get(key)
            if shared is not None and shared.backend is backend:
                del _shared[key]
                for user in list(shared.users):
                    user._unbind()  # noqa: SLF001 (of the protocol above; no method for users of a store)
        await backend.aclose()


def _forget_closed_loops() -> None:
    for key in [key for key, shared in _shared.items() if shared.loop.is_closed()]:
        del _shared[key]


def _after_fork_in_child() -> None:
    global _lock, fork_generation  # noqa: PLW0603 (a fork is the one event that changes them)
    _lock = threading.Lock()
    fork_generation += 1
    _of_parents.append(dict(_shared))
    _shared.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
