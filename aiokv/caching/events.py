"""What a cached function has done: counts for the program, events for its observer."""

import logging
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from aiokv import clock

_LOG_INTERVAL_SECONDS = 60.0

logger = logging.getLogger("aiokv")

EventKind = Literal[
    "hit",
    "near_hit",
    "stale_hit",
    "stale_on_error",
    "joined",
    "miss",
    "computed",
    "not_stored",
    "store_error",
    "background_error",
]


class CacheEvent(NamedTuple):
    """What has happened to one call; bears no argument and no result.

    Args:
        kind: What happened.
        key: The entry's key, `prefix:version:digest`.
        seconds: How long a computation took, or 0.
    """

    kind: EventKind
    key: str
    seconds: float = 0.0


class CacheInfo(NamedTuple):
    """What a cached function has done in this process.

    Args:
        hits: Results from the store that were fresh.
        near_hits: Results from the near cache.
        stale_hits: Results that were served though they were no longer fresh.
        misses: Calls that found nothing to serve, and computed.
        computations: How often a result was computed.
        store_errors: How often the store failed or was given up on.
        seconds_saved: The computation time of all that the store served.
        joined: Calls that waited for a fetch or a computation that another call had begun.
        not_stored: Results that were returned but not stored, as `ttl`, `when` or their content demanded.
        background_errors: Computations behind callers that failed.
    """

    hits: int = 0
    near_hits: int = 0
    stale_hits: int = 0
    misses: int = 0
    computations: int = 0
    store_errors: int = 0
    seconds_saved: float = 0.0
    joined: int = 0
    not_stored: int = 0
    background_errors: int = 0


class Events:
    """The counts of one function, and its observer.

    Args:
        observer: Called with each event; its failures are logged.
    """

    def __init__(self, observer: Callable[[CacheEvent], None] | None) -> None:
        self.observer = observer
        self.counts: dict[EventKind, int] = {
            "hit": 0,
            "near_hit": 0,
            "stale_hit": 0,
            "stale_on_error": 0,
            "joined": 0,
            "miss": 0,
            "computed": 0,
            "not_stored": 0,
            "store_error": 0,
            "background_error": 0,
        }
        self.saved = {"seconds": 0.0}
        self._logged_reasons: set[str] = set()
        self._next_failure_log = -math.inf

    def emit(self, kind: EventKind, key: str, seconds: float = 0.0) -> None:
        """Count an event and notify the observer."""
        # Exact in several threads, too: adding to an item of a dictionary gives no other thread a turn.
        self.counts[kind] += 1
        if self.observer is not None:
            try:
                self.observer(CacheEvent(kind, key, seconds))
            except Exception:
                logger.exception("the observer of cached calls failed")

    def served(self, kind: EventKind, key: str, compute_seconds: float) -> None:
        """Count a result that came from the store, and the time that its computation took."""
        if self.observer is None:
            self.counts[kind] += 1
        else:
            self.emit(kind, key)
        self.saved["seconds"] += compute_seconds

    def not_stored(self, key: str, name: str, reason: str) -> None:
        """Count a result that cannot be stored; log each reason once."""
        self.emit("not_stored", key)
        if reason not in self._logged_reasons and len(self._logged_reasons) < 100:  # noqa: PLR2004 (a bound, no more)
            self._logged_reasons.add(reason)
            logger.warning("a result of %s is returned but not stored: %s", name, reason)

    def computation_failed(self, name: str, error: BaseException) -> None:
        """Log that a stored result stands in for a failing function, once a minute at the most; never what the error says."""
        now = clock.monotonic()
        if now >= self._next_failure_log:
            self._next_failure_log = now + _LOG_INTERVAL_SECONDS
            logger.warning("computing a result of %s failed, what is stored is served: %s", name, type(error).__qualname__)

    def info(self) -> CacheInfo:
        """Return the counts of all calls so far."""
        counts = self.counts
        return CacheInfo(
            hits=counts["hit"],
            near_hits=counts["near_hit"],
            stale_hits=counts["stale_hit"] + counts["stale_on_error"],
            misses=counts["miss"],
            computations=counts["computed"],
            store_errors=counts["store_error"],
            seconds_saved=self.saved["seconds"],
            joined=counts["joined"],
            not_stored=counts["not_stored"],
            background_errors=counts["background_error"],
        )
