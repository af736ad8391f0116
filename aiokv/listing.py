"""Listings of a namespace: pages read one ahead, and clearing in bounded steps; both end, whatever a server answers."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

from aiokv.backends.capabilities import KeyInfo, Page, ScanBackend, mark_partly_cleared
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
        course.check(page.cursor, has_found=bool(page.infos))
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
            course.check(cursor, has_found=step.deleted > 0)
        except CallError as error:
            if deleted:
                mark_partly_cleared(error)
            raise


# A step looks at some ten thousand keys of others, where the store has to. No store has so many.
_MAX_EMPTY_STEPS = 10_000


class _Course:
    """Notices a cursor that comes again: a server that does not tell the truth must not keep its client for ever.

    By Brent's algorithm: one cursor is remembered, and each time after twice as many steps another one. A server with ever new
    cursors is noticed by steps that find nothing.
    """

    def __init__(self, verb: str, db_name: str, prefix: str) -> None:
        self._names = (verb, db_name, prefix)
        self._remembered: str | None = None
        self._steps_left = self._steps = 1
        self._empty_steps = 0

    def check(self, cursor: str, *, has_found: bool) -> None:
        """Raise `TransportError` where the cursor is the remembered one, or too many steps in a row have found nothing."""
        if cursor == self._remembered:
            raise self._fault(
                "the store answers with a cursor that it has given before, and would do so for ever; it is at fault"
            )
        self._empty_steps = 0 if has_found else self._empty_steps + 1
        if self._empty_steps >= _MAX_EMPTY_STEPS:
            raise self._fault(f"the store has found nothing in {_MAX_EMPTY_STEPS:,} steps, and names no end; it is at fault")
        self._steps_left -= 1
        if not self._steps_left:
            self._remembered = cursor
            self._steps *= 2
            self._steps_left = self._steps

    def _fault(self, reason: str) -> TransportError:
        verb, db_name, prefix = self._names
        return TransportError(reason, verb=verb, db_name=db_name, key=prefix, transient=False)


async def _read(scan: ScanBackend, db_name: str, prefix: str, cursor: str) -> Page:
    return await scan.scan(db_name, prefix, cursor)
