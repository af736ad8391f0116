"""The one clock of the package: the wall clock that expiries are counted by, and the monotonic clock of near caches.

Code calls `clock.now()` and `clock.monotonic()` through the module, at each use, so that tests can move both at once.
Both are the functions of `time` themselves: a call costs nothing more.
"""

import time
from collections.abc import Callable

now: Callable[[], float] = time.time
"""Return the wall clock's time in seconds since the epoch."""

monotonic: Callable[[], float] = time.monotonic
"""Return seconds since an arbitrary moment, which no change of the wall clock moves."""
