"""A breaker in front of a store: once it has failed a few times, nobody waits for it until a probe has found it well."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger("aiokv")

FAILURES_TO_OPEN = 3
_FIRST_PROBE_SECONDS = 0.5
_MAX_PROBE_SECONDS = 10.0
_LOG_INTERVAL_SECONDS = 60.0


class Breaker:
    """Count failures in a row, and probe in the background while open.

    Args:
        probe: Asks the store for something; returns where it answers, raises where it does not.
        sleep: Waits between probes; `asyncio.sleep` but for tests.
    """

    def __init__(
        self, probe: Callable[[], Awaitable[object]], sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._probe = probe
        self._sleep = sleep
        self._failures = 0
        self._probing: asyncio.Task[None] | None = None
        # What it failed with last.
        self.error: BaseException | None = None
        self._next_log = float("-inf")
        self.open = False

    def succeeded(self) -> None:
        """Note that the store has answered."""
        self._failures = 0

    def failed(self, error: BaseException, now: float) -> None:
        """Note that the store has failed, and open where it has too often.

        Args:
            error: How, for the log; errors of ours bear no value.
            now: A time in seconds, to log once in a while only.
        """
        self._failures += 1
        self.error = error
        if now >= self._next_log:
            self._next_log = now + _LOG_INTERVAL_SECONDS
            logger.warning("the store of cached results fails, functions are called in its place: %s", _told(error))
        if self._failures >= FAILURES_TO_OPEN and not self.open:
            self.open = True
            self._probing = asyncio.create_task(self._probe_until_well(), name="aiokv breaker probe")

    async def aclose(self) -> None:
        """Cease to probe; the next call tries the store itself."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait([self._probing])
        self._failures = 0
        self.open = False

    async def _probe_until_well(self) -> None:
        wait_seconds = _FIRST_PROBE_SECONDS
        while True:
            await self._sleep(wait_seconds)
            try:
                await self._probe()
            except Exception as error:  # noqa: BLE001 (whatever it is, the store is not well)
                logger.debug("the store of cached results still fails: %s", _told(error))
                wait_seconds = min(2 * wait_seconds, _MAX_PROBE_SECONDS)
            else:
                self._failures = 0
                self.open = False
                logger.info("the store of cached results answers again")
                return


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if type(error).__module__.startswith("aiokv.") else type(error).__name__
