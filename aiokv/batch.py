"""Many calls at once: bounded concurrency, and an error that tells which of them succeeded."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from aiokv.errors import AioKVError, BatchError

T = TypeVar("T")


async def call_each(keys: list[str], call: Callable[[str], Awaitable[T]], concurrency: int) -> dict[str, T]:
    """Make one call for each key; start no further one after a failure.

    Args:
        keys: Different keys.
        call: Make the call for one key.
        concurrency: How many calls are under way at once, 1 or more.

    Returns:
        Each key with its result, in the order of the keys.

    Raises:
        BatchError: A call failed; it holds the results of the calls that succeeded.
        Exception: What a backend of the program's own failed with, where that is no `AioKVError`.
    """
    remaining = iter(keys)
    results: dict[str, T] = {}
    errors: dict[str, Exception] = {}

    async def work() -> None:
        while not errors and (key := next(remaining, None)) is not None:
            try:
                results[key] = await call(key)
            except Exception as error:  # noqa: BLE001 (raised below, after the calls that are under way)
                errors[key] = error

    async with asyncio.TaskGroup() as group:

        def share() -> None:
            for _ in range(min(concurrency, len(keys)) - 1):
                group.create_task(work())

        # Where no call waits for anything, this task makes all of them before the loop goes on, and no other is needed.
        sharing = asyncio.get_running_loop().call_soon(share)
        try:
            await work()
        finally:
            sharing.cancel()
    for error in errors.values():
        if not isinstance(error, AioKVError):
            # Of a backend of the program's own: as it would come from a single call.
            raise error
    if errors:
        texts = {key: value if isinstance(value, str) else None for key, value in results.items()}
        raise BatchError(errors, texts, list(remaining))
    return {key: results[key] for key in keys}
