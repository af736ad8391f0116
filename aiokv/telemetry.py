"""What happens to calls, told to whoever asks for it: events, and the protocol of those who receive them.

Nothing here costs anything where nobody asks: a store without an observer does not come by.
"""

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from aiokv.errors import CallError, shown

logger = logging.getLogger("aiokv")


@dataclass(frozen=True, slots=True, eq=False)
class CallStarted:
    """A get, set or delete begins; later events of the call hold this one, which is equal to itself alone.

    Args:
        verb: `"get"`, `"set"` or `"delete"`.
        db_name: The namespace.
        key: The key, whole; shown cut at 100 characters.
        url: The store's URL.
    """

    verb: Literal["get", "set", "delete"]
    db_name: str
    key: str
    url: str

    def __repr__(self) -> str:
        return f"CallStarted({self.verb} {shown(self.key)} in db {shown(self.db_name)} at {self.url})"


@dataclass(frozen=True, slots=True)
class CallRetried:
    """An attempt has failed, and another one follows.

    Args:
        call: The call.
        attempt: The number of the one that failed, from 1.
        wait_seconds: How long the call waits before the next one.
        error: What the attempt met.
    """

    call: CallStarted
    attempt: int
    wait_seconds: float
    error: CallError


@dataclass(frozen=True, slots=True)
class CallHedged:
    """A get has waited longer than most do, and is sent a second time.

    Args:
        call: The call.
        after_seconds: How long it has waited.
    """

    call: CallStarted
    after_seconds: float


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call has ended, whichever way.

    Args:
        call: The call.
        elapsed_seconds: From its start.
        attempts: How often it was tried; 1 more than it was retried.
        hedged: Whether it was sent a second time without waiting for the first.
        found: For a get that succeeded, whether there was a value; otherwise None.
        error: What it failed with, `asyncio.CancelledError` among others, or None where it succeeded.
    """

    call: CallStarted
    elapsed_seconds: float
    attempts: int
    hedged: bool
    found: bool | None
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class TokenRenewed:
    """Credentials were exchanged for a token, or could not be.

    Args:
        url: The token endpoint.
        elapsed_seconds: How long the exchange took, its retries included.
        error: What it failed with, or None.
    """

    url: str
    elapsed_seconds: float
    error: BaseException | None


Event = CallStarted | CallRetried | CallHedged | CallEnded | TokenRenewed


class Observer(Protocol):
    """Receive events: any function of one argument does.

    It is called in the task of the call (`TokenRenewed` in that of the exchange), in the order of the events, and must not
    block. What it raises is logged and
    otherwise ignored. No event bears a value, a token or a secret; keys and errors are there.
    """

    def __call__(self, event: Event, /) -> object:
        """Take note of an event.

        Args:
            event: What has happened.
        """
        ...


class ObservedCall:
    """A call that somebody watches: `with ObservedCall(...) as call: ...; call.found = ...`."""

    __slots__ = ("_observer", "_outer", "_started_at", "attempts", "found", "hedged", "started")

    def __init__(self, observer: Observer, started: CallStarted) -> None:
        self._observer = observer
        self._outer: ObservedCall | None = None
        self._started_at = time.perf_counter()
        self.started = started
        self.attempts = 1
        self.hedged = False
        self.found: bool | None = None

    def __enter__(self) -> Self:
        self.tell(self.started)
        self._outer = _current.get()
        _current.set(self)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # Not by its token: a coroutine that is thrown away unfinished is closed in another context, which a token refuses.
        if _current.get() is self:
            _current.set(self._outer)
        elapsed_seconds = time.perf_counter() - self._started_at
        self.tell(CallEnded(self.started, elapsed_seconds, self.attempts, self.hedged, self.found, error))

    def tell(self, event: Event) -> None:
        """Tell the observer, whose failures are its own, and whose calls are no part of this one."""
        here = _current.get()
        if here is not None:
            _current.set(None)
        try:
            self._observer(event)
        except Exception:
            logger.exception("the observer of a store failed")
        finally:
            if here is not None:
                _current.set(here)


_current: "ContextVar[ObservedCall | None]" = ContextVar("aiokv_observed_call", default=None)


def retried(attempt: int, wait_seconds: float, error: CallError) -> None:
    """Tell that the call that this code is a part of is tried again, if somebody watches it.

    Args:
        attempt: The number of the attempt that failed, from 1.
        wait_seconds: How long the call waits.
        error: What the attempt met.
    """
    call = _current.get()
    if call is not None:
        call.tell(CallRetried(call.started, attempt, wait_seconds, error))


def attempted(number: int) -> None:
    """Note that the call that this code is a part of is sent once more, if somebody watches it.

    Args:
        number: The number of this attempt, from 1.
    """
    call = _current.get()
    if call is not None:
        call.attempts = number


def hedged(after_seconds: float) -> None:
    """Tell that the call that this code is a part of is sent a second time, if somebody watches it.

    Args:
        after_seconds: How long it has waited.
    """
    call = _current.get()
    if call is not None:
        call.hedged = True
        call.tell(CallHedged(call.started, after_seconds))


def detached() -> ObservedCall | None:
    """Take the present task out of the call that began it, whose retries its own are not.

    Returns:
        That call, to tell its observer of other things, or None where nobody watches.
    """
    call = _current.get()
    if call is not None:
        _current.set(None)
    return call
