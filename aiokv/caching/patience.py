"""A bound for many waits of one length, with one timer for all: a timer for each costs more than a look into the near cache."""

import asyncio
from types import TracebackType


class Patience:
    """Bound waits of one event loop, each to the same number of seconds: `with patience.bound(): await ...`.

    Args:
        seconds: How long.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.loop = asyncio.get_running_loop()
        # In the order of their deadlines, since all wait equally long.
        self.waiting: dict[_Bound, None] = {}
        self.is_watching = False

    def bound(self) -> "_Bound":
        """Make a bound, which begins when it is entered; it does what `asyncio.timeout` does.

        Returns:
            A context manager that raises `TimeoutError` where its content took too long and was cancelled for that.
        """
        return _Bound(self)

    def watch(self) -> None:
        """Look at the waits when the first of them is due."""
        self.is_watching = False
        now = self.loop.time()
        for bound in self.waiting:
            if bound.expired:
                continue
            if bound.deadline > now:
                self.is_watching = True
                self.loop.call_at(bound.deadline, self.watch)
                break
            bound.expire()


class _Bound:
    """One wait that may take too long."""

    __slots__ = ("_cancelling", "_patience", "_task", "deadline", "expired")

    def __init__(self, patience: Patience) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a wait can be bounded inside a task only")
        self._patience = patience
        self._task = task
        self._cancelling = task.cancelling()
        self.deadline = 0.0
        self.expired = False

    def expire(self) -> None:
        """Cancel what is awaited, since it took too long."""
        self.expired = True
        self._task.cancel()

    def __enter__(self) -> None:
        # All in one place: this is on the way of every hit.
        patience = self._patience
        self.deadline = patience.loop.time() + patience.seconds
        patience.waiting[self] = None
        if not patience.is_watching:
            patience.is_watching = True
            patience.loop.call_at(self.deadline, patience.watch)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del self._patience.waiting[self]
        # Not where somebody else has cancelled the task meanwhile.
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error
