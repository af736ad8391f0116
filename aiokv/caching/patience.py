"""A bound for many waits of one length, with one timer for all: a timer for each costs more than a look into the near cache."""

import asyncio
from types import TracebackType


class Patience:
    """Bound waits of one event loop, each to the same number of seconds: `with patience.bound(): await ...`.

    Args:
        seconds: How long.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        # In the order of their deadlines, since all wait equally long.
        self._bounds: dict[_Bound, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def bound(self) -> "_Bound":
        """Make a bound, which begins when it is entered; it does what `asyncio.timeout` does.

        Returns:
            A context manager that raises `TimeoutError` where its content took too long and was cancelled for that.
        """
        return _Bound(self)

    def begin(self, bound: "_Bound") -> float:
        """Note that a wait begins; give its deadline."""
        deadline = self._loop.time() + self._seconds
        self._bounds[bound] = None
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._tick)
        return deadline

    def end(self, bound: "_Bound") -> None:
        """Note that a wait has ended."""
        del self._bounds[bound]

    def _tick(self) -> None:
        self._timer = None
        now = self._loop.time()
        for bound in self._bounds:
            if bound.expired:
                continue
            if bound.deadline > now:
                self._timer = self._loop.call_at(bound.deadline, self._tick)
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
        self.deadline = self._patience.begin(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._patience.end(self)
        # Not where somebody else has cancelled the task meanwhile.
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error
