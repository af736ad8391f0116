"""A breaker in front of a store: once it has failed a few times, nobody waits for it until a probe has found it well."""

import asyncio
import copy
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
        # What it failed with last, without the frames of that.
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
        self.error = without_traceback(error)
        if now >= self._next_log:
            self._next_log = now + _LOG_INTERVAL_SECONDS
            logger.warning("the store of cached results fails, functions are called in its place: %s", _told(error))
        if self._failures >= FAILURES_TO_OPEN and not self.open:
            self.open = True
            self._probing = asyncio.create_task(self._probe_until_well(), name="aiokv breaker probe")
            self._probing.add_done_callback(self._close)

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
            except (Exception, asyncio.CancelledError) as error:
                if is_cancelled(error):
                    raise
                # Whatever it is, the store is not well.
                logger.debug("the store of cached results still fails: %s", _told(error))
                wait_seconds = min(2 * wait_seconds, _MAX_PROBE_SECONDS)
            else:
                logger.info("the store of cached results answers again")
                return

    def _close(self, probing: "asyncio.Task[None]") -> None:
        # However the probes have ended: without them nothing else would close it.
        if probing is self._probing:
            self._failures = 0
            self.open = False


def is_cancelled(error: BaseException) -> bool:
    """Tell whether the running task is being cancelled, which a store that gives itself up raises, too.

    Args:
        error: What was caught.

    Returns:
        False where nobody has asked the task to end.
    """
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling() > 0)


def without_traceback(error: BaseException) -> BaseException:
    """Copy an error, so that neither frames nor the values in them are held with it.

    Args:
        error: Any error.

    Returns:
        An error of its class; where that cannot be copied, one that names the class.
    """
    try:
        made = copy.copy(error)
    except Exception:  # noqa: BLE001 (a class of somebody's own)
        made = error
    if made is error:
        made = OSError(f"the store failed with {type(error).__name__}")
    # Libraries that pickle tracebacks have them copied, too.
    made.__traceback__ = made.__cause__ = made.__context__ = None
    return made


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if type(error).__module__.startswith("aiokv.") else type(error).__name__
