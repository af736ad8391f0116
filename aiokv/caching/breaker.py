"""A circuit breaker in front of a store: after a few failures in a row nobody waits for it until a probe has succeeded."""

import asyncio
import copy
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Literal

from aiokv import clock

logger = logging.getLogger("aiokv")

FAILURES_TO_OPEN = 3
_FIRST_PROBE_SECONDS = 0.5
_MAX_PROBE_SECONDS = 10.0
_LOG_INTERVAL_SECONDS = 60.0

Verb = Literal["read", "write"]


class Circuit:
    """The failures of one verb."""

    __slots__ = ("error", "open_for_seconds", "probe_seconds", "run", "run_seconds")

    def __init__(self) -> None:
        # Failures in a row, and the longest that one of them waited; infinite for a failure that was no lack of time.
        self.run = 0
        self.run_seconds = 0.0
        self.open_for_seconds = 0.0
        self.probe_seconds = 0.0
        self.error: BaseException | None = None

    def is_open(self, timeout: float) -> bool:
        """Return whether a caller that would wait so many seconds is not to ask at all."""
        return timeout <= self.open_for_seconds

    def succeeded(self) -> None:
        """Note a success."""
        self.run = 0
        self.run_seconds = 0.0

    def failed(self, error: BaseException, timeout: float) -> None:
        """Note a failure."""
        self.run += 1
        self.run_seconds = max(self.run_seconds, timeout if type(error) is TimeoutError else math.inf)
        self.probe_seconds = max(self.probe_seconds, timeout)
        self.error = without_traceback(error)

    def open(self) -> None:
        """Open for callers that wait no longer than those that have failed."""
        self.open_for_seconds = max(self.open_for_seconds, self.run_seconds)
        self.succeeded()

    def close(self) -> None:
        """Let every caller ask again."""
        self.succeeded()
        self.open_for_seconds = self.probe_seconds = 0.0


class Breaker:
    """The circuits of reads and of writes, and the probe that closes them.

    Args:
        probe: Does one read or one write; returns where the store answers, raises where it does not.
        sleep: Waits between probes; `asyncio.sleep` but for tests.
    """

    def __init__(
        self, probe: Callable[[Verb], Awaitable[object]], sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    ) -> None:
        self.reads = Circuit()
        self.writes = Circuit()
        self._probe = probe
        self._sleep = sleep
        self._probing: asyncio.Task[None] | None = None
        self._next_log = -math.inf

    @property
    def is_idle(self) -> bool:
        """Whether nothing has failed lately."""
        return self._probing is None and not self.reads.run and not self.writes.run

    def failed(self, verb: Verb, error: BaseException, timeout: float) -> None:
        """Note a failure of the store.

        Args:
            verb: What failed.
            error: How, for the log; errors of ours bear no value.
            timeout: Seconds that the caller would have waited.
        """
        circuit = self.reads if verb == "read" else self.writes
        circuit.failed(error, timeout)
        if self.reads.run + self.writes.run >= FAILURES_TO_OPEN:
            # What has not failed stays closed: a store may answer reads while its writes hang.
            for failing in (self.reads, self.writes):
                if failing.run:
                    failing.open()
        now = clock.monotonic()
        if now >= self._next_log:
            self._next_log = now + _LOG_INTERVAL_SECONDS
            logger.warning("the store of cached results fails, functions are called in its place: %s", _safe_text(error))
        if circuit.open_for_seconds and self._probing is None:
            self._probing = asyncio.create_task(self._probe_until_well(), name="aiokv breaker probe")
            self._probing.add_done_callback(self._probe_ended)

    async def aclose(self) -> None:
        """Stop probing; the next call asks the store itself."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait([self._probing])
        self.reads.close()
        self.writes.close()

    async def _probe_until_well(self) -> None:
        wait_seconds = _FIRST_PROBE_SECONDS
        verbs: tuple[tuple[Verb, Circuit], ...] = (("read", self.reads), ("write", self.writes))
        while any(circuit.open_for_seconds for _, circuit in verbs):
            await self._sleep(wait_seconds)
            for verb, circuit in verbs:
                if not circuit.open_for_seconds:
                    continue
                try:
                    async with asyncio.timeout(circuit.probe_seconds):
                        await self._probe(verb)
                except (Exception, asyncio.CancelledError) as error:
                    if is_cancelled(error):
                        raise
                    logger.debug("the store of cached results still fails to %s: %s", verb, _safe_text(error))
                    wait_seconds = min(2 * wait_seconds, _MAX_PROBE_SECONDS)
                    break
                circuit.close()
                logger.info("the store of cached results answers again to a %s", verb)

    def _probe_ended(self, probing: "asyncio.Task[None]") -> None:
        # However it has ended: without a probe nothing else would close the circuits.
        if probing is self._probing:
            self._probing = None
            self.reads.close()
            self.writes.close()


def is_cancelled(error: BaseException) -> bool:
    """Tell whether the running task is being cancelled; a store that gives a call up raises the same error.

    Args:
        error: What was caught.

    Returns:
        False where nobody has asked the task to end.
    """
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling() > 0)


def first_of(error: BaseException) -> BaseException:
    """Return an error, or the first one of a group: several keys of a store of the program's own may fail together.

    Args:
        error: Any error.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def without_traceback(error: BaseException) -> BaseException:
    """Copy an error, so that it holds neither frames nor the values in them.

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


def _safe_text(error: BaseException) -> str:
    # Only errors of ours are known to bear no value.
    return f"{type(error).__name__}: {error}" if type(error).__module__.startswith("aiokv.") else type(error).__name__
