"""The events of calls, and the protocol of the observers that receive them.

A store without an observer does not use this module, so it pays nothing for it.
"""

import logging
import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Literal, Protocol, Self

from aiokv.errors import CallError, truncated
from aiokv.record import Record

logger = logging.getLogger("aiokv")


Verb = Literal["get", "set", "delete", "get_many", "set_many", "delete_many", "keys", "count", "clear", "claim", "release"]


class CallStarted(Record):
    """A call begins. Later events of the call hold this one, which is equal to no other.

    A batch of keys is one call, whatever the number of its keys; so are a page of a listing and a step of clearing. A claim is
    a call each time that it is taken or renewed. Watches make no events.

    Args:
        verb: `"get"`, `"set"` or `"delete"`; `"get_many"`, `"set_many"` or `"delete_many"` for a batch; `"keys"`, `"count"`,
            `"clear"`, `"claim"` or `"release"`.
        db_name: The namespace.
        key: The whole key, or the prefix of a listing; "" for a batch. `repr` cuts it at 100 characters.
        url: The store's URL.
        keys: How many keys a batch has; 1 for every other call.
    """

    verb: Verb
    db_name: str
    key: str
    url: str
    keys: int = 1

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        what = f"{self.keys:,} keys" if self.verb.endswith("_many") else truncated(self.key)
        return f"CallStarted({self.verb} {what} in db {truncated(self.db_name)} at {self.url})"


class CallRetried(Record):
    """An attempt has failed, and another follows.

    Args:
        call: The call.
        attempt: The number of the attempt that failed, from 1.
        wait_seconds: How long the call waits before the next attempt.
        error: The error of the attempt.
    """

    call: CallStarted
    attempt: int
    wait_seconds: float
    error: CallError


class CallHedged(Record):
    """A get has waited longer than most, and is sent a second time.

    Args:
        call: The call.
        after_seconds: How long it has waited.
    """

    call: CallStarted
    after_seconds: float


class CallEnded(Record):
    """A call has ended, in success or failure.

    Args:
        call: The call.
        elapsed_seconds: From its start.
        attempts: How often it was tried: 1 more than the number of retries.
        hedged: Whether it was sent a second time while the first request was under way.
        found: For a get that succeeded, whether a value was there; otherwise None.
        error: Its error, which may be `asyncio.CancelledError`, or None where it succeeded. Where some keys of a batch failed,
            the error of the first of these.
        failed_keys: How many keys of a batch failed by themselves; 0 where the call failed as a whole.
    """

    call: CallStarted
    elapsed_seconds: float
    attempts: int
    hedged: bool
    found: bool | None
    error: BaseException | None
    failed_keys: int = 0


class TokenRenewed(Record):
    """Credentials were exchanged for a token, or could not be.

    Args:
        url: The token endpoint.
        elapsed_seconds: How long the exchange took, its retries included.
        error: The error of the exchange, or None.
    """

    url: str
    elapsed_seconds: float
    error: BaseException | None


Event = CallStarted | CallRetried | CallHedged | CallEnded | TokenRenewed


class Observer(Protocol):
    """A receiver of events: any function of one argument.

    It is called in the task of the call (`TokenRenewed` in that of the exchange), in the order of the events, and must not
    block. An exception that it raises is logged and ignored. No event holds a value, a token or a secret; some hold keys and
    errors.
    """

    def __call__(self, event: Event, /) -> object:
        """Receive an event.

        Args:
            event: The event.
        """
        ...


class ObservedCall:
    """A call with an observer: `with ObservedCall(...) as call: ...; call.found = ...`, or `call.errors = ...` of a batch."""

    __slots__ = ("_observer", "_outer", "_started_at", "attempts", "errors", "found", "hedged", "started")

    def __init__(self, observer: Observer, started: CallStarted) -> None:
        self._observer = observer
        self._outer: ObservedCall | None = None
        self._started_at = time.perf_counter()
        self.started = started
        self.attempts = 1
        self.hedged = False
        self.found: bool | None = None
        # Of keys of a batch.
        self.errors: Sequence[BaseException] = ()

    def __enter__(self) -> Self:
        self.notify(self.started)
        self._outer = _current.get()
        _current.set(self)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # Without the variable's token: an unfinished coroutine may be closed in another context, where the token is refused.
        if _current.get() is self:
            _current.set(self._outer)
        elapsed_seconds = time.perf_counter() - self._started_at
        if error is None and self.errors:
            error = self.errors[0]
        self.notify(CallEnded(self.started, elapsed_seconds, self.attempts, self.hedged, self.found, error, len(self.errors)))

    def notify(self, event: Event) -> None:
        """Send an event to the observer; log its failure, and keep the calls that it makes apart from this one.

        Args:
            event: The event.
        """
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
    """Notify the observer of the running call, if there is one, that it is tried again.

    Args:
        attempt: The number of the attempt that failed, from 1.
        wait_seconds: How long the call waits.
        error: The error of the attempt.
    """
    call = _current.get()
    if call is not None:
        call.notify(CallRetried(call.started, attempt, wait_seconds, error))


def attempted(number: int) -> None:
    """Count another attempt of the running call, if it has an observer.

    Args:
        number: The number of this attempt, from 1.
    """
    call = _current.get()
    if call is not None:
        call.attempts = number


def hedged(after_seconds: float) -> None:
    """Notify the observer of the running call, if there is one, that it is sent a second time.

    Args:
        after_seconds: How long it has waited.
    """
    call = _current.get()
    if call is not None:
        call.hedged = True
        call.notify(CallHedged(call.started, after_seconds))


def detached() -> ObservedCall | None:
    """Detach the running task from the call that started it, so that its retries are not counted as the call's.

    Returns:
        That call, whose observer can be notified of other events, or None where it has no observer.
    """
    call = _current.get()
    if call is not None:
        _current.set(None)
    return call
