"""When and how a failed call is tried again; the only importer of tenacity.

The first attempt is made outside this module, by a bare `try`: that costs a small part of a call through tenacity.
"""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Generator
from datetime import timedelta
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from aiokv import telemetry
from aiokv.errors import CallError, ConfigurationError, ConnectError, ThrottledError, TransportError
from aiokv.record import Record

if TYPE_CHECKING:
    from tenacity import RetryCallState

R = TypeVar("R")

logger = logging.getLogger("aiokv")

QUOTA_TOKENS = 500
TRANSIENT_COST_TOKENS = 14
THROTTLED_COST_TOKENS = 5
SUCCESS_TOKENS = 1


class RetryPolicy(Record, kw_only=True):
    """How long a call may take and how often it is tried; all times are in seconds.

    Before retry number n the wait is uniform in `[0, min(cap, base * 2**(n - 1))]`. After a 429, or any answer with
    Retry-After, base and cap are the throttled ones, and the wait is added to Retry-After. Where the wait would pass the
    deadline, the call fails at once.

    Args:
        attempts: How often a call is sent at most, 1 or more.
        total_timeout: From the call's start to its failure, waits and every attempt included.
        attempt_timeout: For one attempt, from its place in the connection pool to the last byte of its answer.
        connect_timeout: For making a connection, TLS included.
        backoff_base: The upper bound of the first wait.
        backoff_cap: The upper bound of every wait.
        throttled_base: The upper bound of the first wait where the service asks to slow down.
        throttled_cap: The upper bound of every such wait.
        wait_for_ready: How long a call waits for a host that takes no connections, from when that was first seen, so that a
            restart of the server costs no call. After that, calls to this host fail at once, until it is back. 0 waits for no
            host. The wait is part of one attempt, and draws on no quota.
    """

    attempts: int = 4
    total_timeout: float = 30.0
    attempt_timeout: float = 10.0
    connect_timeout: float = 3.0
    backoff_base: float = 0.05
    backoff_cap: float = 2.0
    throttled_base: float = 1.0
    throttled_cap: float = 20.0
    wait_for_ready: float = 3.0

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise ValueError(f"attempts must be an int of 1 or more, not {self.attempts!r}")
        for name in ("total_timeout", "attempt_timeout", "connect_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0 seconds, not {getattr(self, name)!r}")
        for name in ("backoff_base", "backoff_cap", "throttled_base", "throttled_cap", "wait_for_ready"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 seconds or more, not {getattr(self, name)!r}")

    @classmethod
    def none(cls) -> Self:
        """Return a policy that sends every call once, and waits for no host.

        Returns:
            The default timeouts with a single attempt.
        """
        return cls(attempts=1, wait_for_ready=0.0)

    def within(self, total_timeout: float | timedelta) -> Self:
        """Return this policy with another total, which no attempt outlives.

        Args:
            total_timeout: Seconds, or a `timedelta`; more than 0.

        Returns:
            The other policy.

        Raises:
            TypeError: It is of another type.
            ValueError: It is not more than 0.
        """
        if isinstance(total_timeout, timedelta):
            total_timeout = total_timeout.total_seconds()
        if isinstance(total_timeout, bool) or not isinstance(total_timeout, int | float):
            raise TypeError(f"timeout must be seconds or a timedelta, not {type(total_timeout).__name__}")
        if not total_timeout > 0:
            raise ValueError(f"timeout must be more than 0 seconds, not {total_timeout!r}")
        return self._replace(total_timeout=float(total_timeout))

    def wait_seconds(self, retry_number: int, error: CallError) -> float:
        """Draw the wait before a retry.

        Args:
            retry_number: 1 before the first retry.
            error: The error of the attempt before it.

        Returns:
            Seconds, at least what the service asked for.
        """
        import random  # noqa: PLC0415 (costly to import, and seldom needed)

        base, cap = (self.throttled_base, self.throttled_cap) if is_throttled(error) else (self.backoff_base, self.backoff_cap)
        # An exponent past any use would overflow a float.
        bound = min(cap, base * 2.0 ** min(retry_number - 1, 64))
        # Added to Retry-After: otherwise all clients that got the same number would come back at once.
        return (error.retry_after or 0.0) + random.uniform(0.0, bound)  # noqa: S311 (spreads load, guards nothing)


class RetryQuota:
    """A token bucket that pays for retries to one host, so that an outage does not meet four times the load.

    A retry costs 14 tokens, after throttling 5. A retry that succeeds gives its cost back, a call that succeeds at once
    gives 1, and the bucket holds at most 500: about 35 retries without a success between them, then each call is sent once.
    The event loops and threads of a process share it.

    Source: the retry quota of the standard retry mode of the AWS SDKs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.tokens = QUOTA_TOKENS

    def pay(self, cost_tokens: int) -> bool:
        """Take tokens for a retry.

        Args:
            cost_tokens: Their number.

        Returns:
            False where the bucket holds fewer; then none were taken.
        """
        with self._lock:
            if self.tokens < cost_tokens:
                return False
            self.tokens -= cost_tokens
            return True

    def refund(self, tokens: int) -> None:
        """Put tokens back.

        Args:
            tokens: Their number; what passes the capacity is dropped.
        """
        with self._lock:
            self.tokens = min(self.tokens + tokens, QUOTA_TOKENS)


_quotas: dict[str, RetryQuota] = {}


def quota_of(host: str) -> RetryQuota:
    """Return the quota that all calls to a host share in this process.

    Args:
        host: Host and port.

    Returns:
        The quota.
    """
    return _quotas.setdefault(host, RetryQuota())


def reset_quotas() -> None:
    """Fill the quota of every host, as in a new process, those in use included."""
    for quota in list(_quotas.values()):
        quota.refund(QUOTA_TOKENS)


# A thread of the parent may hold the lock of a quota, and does not exist in the child.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_quotas.clear)

_backoff = True


@contextlib.contextmanager
def disable_backoff() -> Generator[None]:
    """Skip the waits between attempts in the whole process, for tests; which calls are retried, and how often, stays.

    A wait that would pass the deadline still fails the call at once. A host that takes no connections is not waited for.
    """
    global _backoff  # noqa: PLW0603 (a switch of the process)
    before, _backoff = _backoff, False
    try:
        yield
    finally:
        _backoff = before


def has_backoff() -> bool:
    """Return whether calls wait in this process: False inside `disable_backoff`."""
    return _backoff


def is_throttled(error: CallError) -> bool:
    """Return whether an error asks to slow down, rather than being a failure.

    Args:
        error: The error of an attempt.

    Returns:
        True for a 429, and for any answer with Retry-After.
    """
    return isinstance(error, ThrottledError) or error.retry_after is not None


async def retry(  # noqa: PLR0913, PLR0917 (all that decides about a sequence)
    first_error: CallError,
    attempt: Callable[[], Awaitable[R]],
    policy: RetryPolicy,
    deadline: float,
    quota: RetryQuota,
    sleep: Callable[[float], Awaitable[None]],
) -> R:
    """Try a call again whose first attempt has failed.

    Args:
        first_error: The error of the first attempt.
        attempt: Sends the call once more.
        policy: How often to try, and with which waits.
        deadline: The event loop's time at which the call must have ended.
        quota: The tokens that pay for retries.
        sleep: Waits; `asyncio.sleep` except in tests.

    Returns:
        The result of the first successful attempt.

    Raises:
        CallError: The last attempt's error, with `attempts` counted and `maybe_applied` true where any attempt's was.
    """
    if isinstance(first_error, ConnectError):
        # It has been waited for; its attempts are counted.
        raise first_error
    if not first_error.transient or policy.attempts == 1:
        first_error.attempts = 1
        raise first_error
    sequence = _Sequence(first_error, attempt, policy, deadline, quota)
    return await sequence.run(sleep if _backoff else _yield)


class _Sequence(Generic[R]):
    """The attempts of one call after the first."""

    def __init__(
        self,
        first_error: CallError,
        attempt: Callable[[], Awaitable[R]],
        policy: RetryPolicy,
        deadline: float,
        quota: RetryQuota,
    ) -> None:
        self._pending: CallError | None = first_error
        self._attempt = attempt
        self._policy = policy
        self._deadline = deadline
        self._quota = quota
        self._attempts = 1
        self._error = first_error
        self._paid_tokens = 0
        # Whether the retry that was paid for is yet to be sent.
        self._is_waiting = False
        self._maybe_applied = first_error.maybe_applied

    async def run(self, sleep: Callable[[float], Awaitable[None]]) -> R:
        import tenacity  # noqa: PLC0415 (a program that meets no failure need not load it)

        # A new instance for each sequence: a shared one mixes up concurrent calls.
        sequence = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_is_worth_another_try),
            wait=lambda state: self._wait_seconds(state.attempt_number, _error_of(state)),
            stop=self._stops,
            before_sleep=self._notify,
            sleep=sleep,
            reraise=True,
        )
        try:
            result: R = await sequence(self._next)
        except CallError as error:
            # An attempt that found the host away was none.
            error.attempts = self._attempts - (isinstance(error, ConnectError) and not error.attempts)
            if self._maybe_applied and not error.maybe_applied:
                # This attempt may say that nothing was stored; it cannot speak for an earlier one.
                error.reason += "; an earlier attempt may have been applied"
                error.maybe_applied = True
            raise
        except BaseException:
            if self._is_waiting:
                self._quota.refund(self._paid_tokens)
            raise
        self._quota.refund(self._paid_tokens)
        return result

    async def _next(self) -> R:
        # The first call stands for the attempt that was made before, so that tenacity counts it.
        if self._pending is not None:
            error, self._pending = self._pending, None
            raise error
        self._attempts += 1
        self._is_waiting = False
        telemetry.attempted(self._attempts)
        try:
            return await self._attempt()
        except CallError as error:
            self._error = error
            self._maybe_applied = self._maybe_applied or error.maybe_applied
            raise
        except ConfigurationError as error:
            # The credentials are gone. More important is that the write may have been applied.
            self._error.reason += f"; it cannot be tried again: {error}"
            self._error.transient = False
            raise self._error from error

    def _stops(self, state: "RetryCallState") -> bool:
        late = asyncio.get_running_loop().time() + state.upcoming_sleep >= self._deadline
        if late or state.attempt_number >= self._policy.attempts:
            return True
        error = _error_of(state)
        if _is_free(error):
            self._paid_tokens = 0
        else:
            self._paid_tokens = THROTTLED_COST_TOKENS if is_throttled(error) else TRANSIENT_COST_TOKENS
        if self._quota.pay(self._paid_tokens):
            self._is_waiting = True
            return False
        error.reason += "; not tried again, since most calls to this host fail (its retry quota is spent)"
        return True

    def _wait_seconds(self, number: int, error: CallError) -> float:
        # The next attempt waits for the host itself.
        return 0.0 if _is_free(error) else self._policy.wait_seconds(number, error)

    def _notify(self, state: "RetryCallState") -> None:
        error, number = _error_of(state), state.attempt_number
        logger.log(
            logging.WARNING if number == 1 else logging.DEBUG,
            "retrying in %.2f s after attempt %d of %d: %s",
            state.upcoming_sleep,
            number,
            self._policy.attempts,
            error,
        )
        telemetry.retried(number, state.upcoming_sleep, error)


def _is_free(error: CallError) -> bool:
    """Return whether a request went down with its host, so that sending it again draws on no quota."""
    return isinstance(error, TransportError) and error.broke_with_host


def _is_worth_another_try(error: BaseException) -> bool:
    return isinstance(error, CallError) and error.transient and not isinstance(error, ConnectError)


def _error_of(state: "RetryCallState") -> CallError:
    error = state.outcome.exception() if state.outcome is not None else None
    if not isinstance(error, CallError):
        raise TypeError("only a CallError is tried again")
    return error


async def _yield(_seconds: float) -> None:
    await asyncio.sleep(0)
