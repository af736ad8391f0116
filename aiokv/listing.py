"""Listings of a namespace: pages read one ahead, and clearing in bounded steps; both end, whatever a server answers."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

from aiokv.backends.capabilities import KeyInfo, Page, ScanBackend
from aiokv.errors import CallError, TransportError


async def list_keys(open_scan: Callable[[], Awaitable[ScanBackend]], db_name: str, prefix: str) -> AsyncGenerator[KeyInfo]:
    """List keys; the next page is read while the caller works on the present one.

    Args:
        open_scan: Return the backend.
        db_name: The namespace.
        prefix: What the keys begin with.

    Yields:
        What is known of each entry.

    Raises:
        CallError: A page could not be read, or the pages come to a cursor where they have been.
    """
    scan = await open_scan()
    page = await scan.scan(db_name, prefix)
    course = _Course("keys", db_name, prefix)
    while page.cursor is not None:
        course.check(page.cursor)
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
    """Delete all entries that are there now, in steps.

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
    cursor: str | None = None
    course = _Course("clear", db_name, prefix)
    while True:
        try:
            step = await scan.clear(db_name, prefix, cursor)
            deleted += step.deleted
            cursor = step.cursor
            if cursor is None:
                return deleted
            course.check(cursor)
        except CallError as error:
            error.maybe_applied = error.maybe_applied or deleted > 0
            raise


class _Course:
    """Notices a cursor that comes again: a server that does not tell the truth must not keep its client for ever.

    By Brent's algorithm: one cursor is remembered, and each time after twice as many steps another one.
    """

    def __init__(self, verb: str, db_name: str, prefix: str) -> None:
        self._names = (verb, db_name, prefix)
        self._remembered: str | None = None
        self._steps_left = self._steps = 1

    def check(self, cursor: str) -> None:
        """Raise `TransportError` where the cursor is the remembered one."""
        if cursor == self._remembered:
            verb, db_name, prefix = self._names
            reason = "the store answers with a cursor that it has given before, and would do so for ever; it is at fault"
            raise TransportError(reason, verb=verb, db_name=db_name, key=prefix, transient=False)
        self._steps_left -= 1
        if not self._steps_left:
            self._remembered = cursor
            self._steps *= 2
            self._steps_left = self._steps


async def _read(scan: ScanBackend, db_name: str, prefix: str, cursor: str) -> Page:
    return await scan.scan(db_name, prefix, cursor)
