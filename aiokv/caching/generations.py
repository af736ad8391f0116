"""May this result still be stored, kept or joined? One counter answers, for every loop and thread of the process.

`invalidate`, `refresh` and `prime` raise the generation of a key. Whoever fetches or computes a result notes the counter
before beginning; a result whose key has been raised since then is superseded.
"""

import os
import threading
import weakref

from aiokv.target import Target

Place = tuple[Target, str]
"""A key of a target."""

_MAX_REMEMBERED = 65_536


class Generations:
    """The generations of the keys of one prefix.

    The last 65,536 raised keys are remembered. What began before the oldest of these counts as superseded: it is computed
    once more, which is the lesser evil.
    """

    def __init__(self) -> None:
        self.now = 0
        self._raised: dict[Place, int] = {}
        # The latest refresh, prime or invalidation that has begun to write, at the same keys.
        self._begun: dict[Place, int] = {}
        self._forgotten = 0
        self._distrusted: dict[Place, float] = {}
        self._lock = threading.Lock()

    def raise_for(self, place: Place) -> int:
        """Supersede everything that is under way for a place.

        Args:
            place: Target and key.

        Returns:
            The new generation.
        """
        with self._lock:
            return self._raise(place)

    def is_current(self, place: Place, seen: int) -> bool:
        """Return whether a fetch or computation has not been superseded.

        Args:
            place: Target and key.
            seen: `now`, as it was when the fetch or computation began.
        """
        return seen == self.now or (seen >= self._forgotten and self._raised.get(place, 0) <= seen)

    def begin(self, place: Place, generation: int) -> bool:
        """Begin to write for a refresh, prime or invalidation, unless a later one has begun; earlier ones may not begin now.

        Args:
            place: Target and key.
            generation: What `raise_for` returned to the one that asks.

        Returns:
            False where a later one has begun: what it writes, or that it fails, is what counts.
        """
        with self._lock:
            if not self.is_latest(place, generation):
                return False
            self._begun[place] = generation
            return True

    def is_latest(self, place: Place, generation: int) -> bool:
        """Return whether no later refresh, prime or invalidation has begun to write.

        Args:
            place: Target and key.
            generation: What `raise_for` returned to the one that asks.
        """
        return generation >= self._forgotten and self._begun.get(place, 0) <= generation

    def land(self, place: Place, generation: int) -> bool:
        """End a refresh, prime or invalidation: supersede what has read meanwhile, since it may have read what was before.

        Args:
            place: Target and key.
            generation: What `raise_for` returned to the one that ends.

        Returns:
            Whether it is the latest.
        """
        with self._lock:
            if not self.is_latest(place, generation):
                return False
            self._begun[place] = generation
            self._raise(place)
            return True

    def distrust(self, place: Place, until: float) -> None:
        """Serve nothing of a place that was computed up to a moment: the store could neither take a newer result nor delete.

        Args:
            place: Target and key.
            until: Seconds since the epoch.
        """
        with self._lock:
            self._distrusted[place] = max(until, self._distrusted.pop(place, 0.0))
            if len(self._distrusted) > _MAX_REMEMBERED:
                del self._distrusted[next(iter(self._distrusted))]

    def trusts(self, place: Place, started: float) -> bool:
        """Return whether a stored result may be served.

        Args:
            place: Target and key.
            started: When its computation began, in seconds since the epoch.
        """
        return not self._distrusted or place not in self._distrusted or started > self._distrusted[place]

    def _raise(self, place: Place) -> int:
        self.now += 1
        self._raised.pop(place, None)
        self._raised[place] = self.now
        if len(self._raised) > _MAX_REMEMBERED:
            oldest = next(iter(self._raised))
            self._forgotten = self._raised.pop(oldest)
            self._begun.pop(oldest, None)
        return self.now

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()


# Functions of one prefix share keys, and so generations.
_by_prefix: "weakref.WeakValueDictionary[str, Generations]" = weakref.WeakValueDictionary()


def generations_of(prefix: str) -> Generations:
    """Return the generations of a prefix.

    Args:
        prefix: The beginning of a function's keys.
    """
    return _by_prefix.setdefault(prefix, Generations())


def _after_fork_in_child() -> None:
    # A thread that held a lock does not exist in the child.
    for generations in list(_by_prefix.values()):
        generations._renew_lock()  # noqa: SLF001 (this module's own)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Backoff:
    """Waits between attempts of what has failed, for each place: 1 second, doubling to 30."""

    FIRST_SECONDS = 1.0
    MAX_SECONDS = 30.0

    def __init__(self) -> None:
        self._failures: dict[Place, tuple[float, float]] = {}

    def is_waiting(self, place: Place, now: float) -> bool:
        """Return whether the next attempt is to wait.

        Args:
            place: Target and key.
            now: Monotonic seconds.
        """
        # A place's hash costs more than to look whether there is any.
        return bool(self._failures) and place in self._failures and now < self._failures[place][1]

    def failed(self, place: Place, now: float) -> None:
        """Note a failure.

        Args:
            place: Target and key.
            now: Monotonic seconds.
        """
        wait, _ = self._failures.pop(place, (self.FIRST_SECONDS / 2, 0.0))
        wait = min(2 * wait, self.MAX_SECONDS)
        self._failures[place] = (wait, now + wait)
        if len(self._failures) > _MAX_REMEMBERED:
            del self._failures[next(iter(self._failures))]

    def succeeded(self, place: Place) -> None:
        """Note a success.

        Args:
            place: Target and key.
        """
        if self._failures:
            self._failures.pop(place, None)
