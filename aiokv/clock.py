"""The one clock of the package: the wall clock that expiries are counted by, and the monotonic clock of near caches.

Code asks `clock.now()` and `clock.monotonic()` through the module, at each use, so that tests can move both at once.
"""

import time


def now() -> float:
    """Return the wall clock's time.

    Returns:
        Seconds since the epoch.
    """
    return time.time()


def monotonic() -> float:
    """Return a time that no change of the wall clock moves.

    Returns:
        Seconds since an arbitrary moment.
    """
    return time.monotonic()
