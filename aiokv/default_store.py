"""The store that cached functions use where they name none, and who is notified when it changes."""

import os
import threading
import weakref
from typing import Protocol

from aiokv.store import AsyncKVStore

DEFAULT_DB_NAME = "aiokv"


class DefaultStoreWatcher(Protocol):
    """An object that remembers something that belongs to the default store."""

    def default_store_changed(self, store: AsyncKVStore | None) -> None:
        """Drop what belongs to another store.

        Args:
            store: The default store from now on, or None where it is yet to be made.
        """
        ...


_lock = threading.Lock()
_default: AsyncKVStore | None = None
# Weakly: a cached function that is dropped need not be notified.
_watchers: "weakref.WeakSet[DefaultStoreWatcher]" = weakref.WeakSet()


def default_store() -> AsyncKVStore:
    """Return the store that cached functions use where they name none.

    Returns:
        The one that `set_default_store` was given, else one of `AIOKV_URL` and the namespace `AIOKV_DB` (or `aiokv`).
    """
    store = _default
    if store is None:
        new = AsyncKVStore(os.environ.get("AIOKV_DB") or DEFAULT_DB_NAME)
        with _lock:
            store = _default
            if store is None:
                store = new
                _change(new)
    return store


def set_default_store(store: AsyncKVStore | None) -> None:
    """Choose the store that cached functions use where they name none.

    Args:
        store: The store, or None for the one of the environment.

    Raises:
        TypeError: It is no store.
    """
    if store is not None and not isinstance(store, AsyncKVStore):
        raise TypeError(
            f"store must be an AsyncKVStore, not {type(store).__name__}"
            f"{'; pass store.async_store' if hasattr(store, 'async_store') else ''}"
        )
    with _lock:
        _change(store)


def watch_default_store(watcher: DefaultStoreWatcher) -> None:
    """Notify an object of the default store, now and whenever it changes.

    Args:
        watcher: The object, held weakly.
    """
    with _lock:
        _watchers.add(watcher)
        watcher.default_store_changed(_default)


def _change(store: AsyncKVStore | None) -> None:
    global _default  # noqa: PLW0603 (the one default of the process)
    _default = store
    for watcher in list(_watchers):
        watcher.default_store_changed(store)


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603 (a thread of the parent may have held it)
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
