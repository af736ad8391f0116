"""Listings of a namespace: pages read one ahead, and clearing in bounded steps."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

from aiokv.backends.capabilities import MAX_BATCH_KEYS, KeyInfo, Page, ScanBackend
from aiokv.errors import CallError


async def list_keys(open_scan: Callable[[], Awaitable[ScanBackend]], db_name: str, prefix: str) -> AsyncGenerator[KeyInfo]:
    """List keys; the next page is read while the caller works on the present one.

    Args:
        open_scan: Return the backend.
        db_name: The namespace.
        prefix: What the keys begin with.

    Yields:
        What is known of each entry.
    """
    scan = await open_scan()
    page = await scan.scan(db_name, prefix)
    while page.cursor is not None:
        reading = asyncio.create_task(_read(scan, db_name, prefix, page.cursor), name="aiokv next page of keys")
        try:
            for info in page.infos:
                yield info
            page = await reading
        finally:
            if not reading.done():
                reading.cancel()
                await asyncio.wait([reading])
            if not reading.cancelled():
                # Taken note of, also where the caller has left.
                reading.exception()
    for info in page.infos:
        yield info


async def clear_keys(scan: ScanBackend, db_name: str, prefix: str) -> int:
    """Delete all entries, in steps.

    Args:
        scan: The backend.
        db_name: The namespace.
        prefix: What the keys begin with.

    Returns:
        How many were deleted.

    Raises:
        CallError: `maybe_applied` is true where some are gone, or may be.
    """
    deleted = 0
    while True:
        try:
            step = await scan.clear(db_name, prefix)
        except CallError as error:
            error.maybe_applied = error.maybe_applied or deleted > 0
            raise
        deleted += step
        if step < MAX_BATCH_KEYS:
            return deleted


async def _read(scan: ScanBackend, db_name: str, prefix: str, cursor: str) -> Page:
    return await scan.scan(db_name, prefix, cursor)
