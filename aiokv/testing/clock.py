"""Time for tests: move every clock that aiokv asks, and no other."""

import math
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta

from aiokv import clock

_lock = threading.Lock()
_open_clocks: "list[MovableClock]" = []
_wall_ahead = 0.0
# Never taken back, since a monotonic clock never goes back: a near cache would serve what it holds for that much longer.
_monotonic_ahead = 0.0
# What a test put in place of the clocks before; None asks `time`, whatever freezegun or time-machine make of it.
_other_now: Callable[[], float] | None = None
_other_monotonic: Callable[[], float] | None = None


def _moved_now() -> float:
    return (_other_now or time.time)() + _wall_ahead


def _moved_monotonic() -> float:
    return (_other_monotonic or time.monotonic)() + _monotonic_ahead


def _unless_of_time(function: Callable[[], float]) -> Callable[[], float] | None:
    """Return what a test put in place of a clock; None for the functions of `time`, and for those of freezegun."""
    return None if function in {time.time, time.monotonic} else function


def _install() -> None:
    """Put the moved clocks in place, also after freezegun has put its own there; call this with the lock."""
    global _other_monotonic, _other_now  # noqa: PLW0603 (one time for the whole process)
    if clock.now is not _moved_now:
        _other_now = _unless_of_time(clock.now)
        clock.now = _moved_now
        # freezegun remembers by the names in a module which of them are clocks: with another name it looks anew.
        clock.__dict__["is_moved"] = True
    if clock.monotonic is not _moved_monotonic:
        _other_monotonic = _unless_of_time(clock.monotonic)
        clock.monotonic = _moved_monotonic


class MovableClock:
    """The clock of `movable_clock` and of the fixture `kv_clock`."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._is_open = True

    @property
    def ahead_seconds(self) -> float:
        """How many seconds this clock has been moved in all."""
        return self._ahead

    def advance(self, by: float | timedelta) -> None:
        """Move aiokv's time forward, in every thread and event loop of this process, at once.

        Args:
            by: Seconds, or a `timedelta`; 0 or more.

        Raises:
            TypeError: It is of another type.
            ValueError: It is less than 0, NaN or infinite.
            RuntimeError: The block of this clock has ended.
        """
        global _monotonic_ahead, _wall_ahead  # noqa: PLW0603 (one time for the whole process)
        if isinstance(by, timedelta):
            by = by.total_seconds()
        if isinstance(by, bool) or not isinstance(by, int | float):
            raise TypeError(f"by must be seconds or a timedelta, not {type(by).__name__}")
        if not 0 <= by < math.inf:
            raise ValueError(f"by must be 0 seconds or more, not {by!r}; start another clock to be back at the present")
        with _lock:
            if not self._is_open:
                raise RuntimeError("the clock cannot be moved after its block or its test has ended")
            _install()
            self._ahead += by
            _wall_ahead += by
            _monotonic_ahead += by


@contextmanager
def movable_clock() -> Generator[MovableClock]:
    """Let a test move the time of cached functions and embedded stores, without waiting.

    `clock.advance(...)` moves near caches, freshness, early refresh, claims, the waits after failures, the life of tokens, and
    the expiry of entries in `memory://` and `sqlite:///` stores, a server in this process included. Nothing else moves:
    `time`, `datetime` and the event loop are as they were, so timeouts and sleeps take as long as ever, and what waits already
    goes on waiting. Stores in other processes do not move. Blocks may be nested, and overlap in several threads: all their
    moves add up.

    The end of the block takes back what its clock has moved, also where the block raises. What was stored meanwhile then lives
    that much longer, so give each test a store of its own, such as `memory://name`.

    With freezegun and time-machine: aiokv's clocks follow theirs, alone and beside this one, and `advance` adds to that. A
    freeze may begin before the block or in it; what began last must end first. Pass `freeze_time(..., real_asyncio=True)`, or
    the event loop's clock stands still, too, and no timeout or sleep ends.

    Yields:
        The clock.
    """
    global _other_monotonic, _other_now, _wall_ahead  # noqa: PLW0603 (one time for the whole process)
    moved = MovableClock()
    with _lock:
        _install()
        _open_clocks.append(moved)
    try:
        yield moved
    finally:
        with _lock:
            moved._is_open = False  # noqa: SLF001 (of this module)
            _open_clocks.remove(moved)
            _wall_ahead -= moved.ahead_seconds
            if not _open_clocks:
                _wall_ahead = 0.0
                if clock.now is _moved_now:
                    clock.now = _other_now or time.time
                clock.__dict__.pop("is_moved", None)
                if clock.monotonic is _moved_monotonic and _other_monotonic is not None:
                    clock.monotonic = _other_monotonic
                _other_now = _other_monotonic = None
