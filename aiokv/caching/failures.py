"""Failures of a store as errors that say what has happened."""

import asyncio

from aiokv.errors import CallTimeoutError, StoreClosedError
from aiokv.store import AsyncKVStore


def overtaken_error(store: AsyncKVStore, key: str, verb: str) -> CallTimeoutError:
    """Return the error of a write that another loop's older write may follow."""
    return CallTimeoutError(
        "another event loop is still storing an older result, which may be served until that has ended",
        verb=verb,
        db_name=store.db_name,
        key=key,
        maybe_applied=True,
    )


def own_error(store: AsyncKVStore, error: BaseException, key: str = "", verb: str = "get") -> BaseException:
    """Return an error that says what has happened: the bare ones would look as if the caller were cancelled or late."""
    if isinstance(error, asyncio.CancelledError):
        return StoreClosedError("the store gave the call up", db_name=store.db_name, key=key)
    if type(error) is TimeoutError:
        return CallTimeoutError(
            "the store did not answer within read_timeout",
            verb=verb,
            db_name=store.db_name,
            key=key,
            attempts=1,
            maybe_applied=verb != "get",
        )
    return error


class SkippedError(Exception):
    """The store was not asked, since it has failed too often.

    Args:
        error: What it failed with last.
    """

    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error = error
