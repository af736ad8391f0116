"""When and how a failed call is tried again; the only importer of tenacity.

The first attempt is made outside this module, by a bare `try`: a call through tenacity costs many times what that does.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from aiokv.errors import CallError, ThrottledError

if TYPE_CHECKING:
    from tenacity import RetryCallState

R = TypeVar("R")

logger = logging.getLogger("aiokv")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Say how long a call may take and how often it is tried; all times are in seconds.

    Before retry number n the wait is uniform in `[0, min(cap, base * 2**(n - 1))]`. After a 429, or any answer that bears
    Retry-After, base and cap are the throttled ones, and the wait comes on top of Retry-After; where that passes the deadline,
    the call fails at once.

    Args:
        attempts: How often a call is sent at most, 1 or more.
        total_timeout: From the call's start to its failure, waits and every attempt included.
        attempt_timeout: For one attempt, from the moment it has a connection's place to the last byte of its answer.
        connect_timeout: For making a connection, TLS included.
        backoff_base: The first wait's upper bound.
        backoff_cap: Every wait's upper bound.
        throttled_base: Likewise where the service asks to slow down.
        throttled_cap: Likewise.
    """

    attempts: int = 4
    total_timeout: float = 30.0
    attempt_timeout: float = 10.0
    connect_timeout: float = 3.0
    backoff_base: float = 0.05
    backoff_cap: float = 2.0
    throttled_base: float = 1.0
    throttled_cap: float = 20.0

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise ValueError(f"attempts must be an int of 1 or more, not {self.attempts!r}")
        for name in ("total_timeout", "attempt_timeout", "connect_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0 seconds, not {getattr(self, name)!r}")
        for name in ("backoff_base", "backoff_cap", "throttled_base", "throttled_cap"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 seconds or more, not {getattr(self, name)!r}")

    @classmethod
    def none(cls) -> Self:
        """Make a policy that sends every call once.

        Returns:
            The default timeouts with a single attempt.
        """
        return cls(attempts=1)

    def wait_seconds(self, retry_number: int, error: BaseException | None) -> float:
        """Draw the wait before a retry.

        Args:
            retry_number: 1 before the first retry.
            error: What the attempt before it met.

        Returns:
            Seconds, at least what the service asked for.
        """
        retry_after = error.retry_after if isinstance(error, CallError) else None
        throttled = isinstance(error, ThrottledError) or retry_after is not None
        base, cap = (self.throttled_base, self.throttled_cap) if throttled else (self.backoff_base, self.backoff_cap)
        # An exponent past any use would overflow a float.
        bound = min(cap, base * 2.0 ** min(retry_number - 1, 64))
        # On top of what the service asked for: all that it told the same would come back at once.
        return (retry_after or 0.0) + random.uniform(0.0, bound)  # noqa: S311 (spreads load, guards nothing)


async def retry(
    first_error: CallError,
    attempt: Callable[[], Awaitable[R]],
    policy: RetryPolicy,
    deadline: float,
    sleep: Callable[[float], Awaitable[None]],
) -> R:
    """Go on with a call whose first attempt has failed.

    Args:
        first_error: What the first attempt met.
        attempt: Sends the call once more.
        policy: How often, and with what waits.
        deadline: The event loop's time at which the call must have ended.
        sleep: Waits; `asyncio.sleep` but for tests.

    Returns:
        What the first successful attempt gave.

    Raises:
        CallError: The last attempt's error, with `attempts` counted and `maybe_applied` true where any attempt's was.
    """
    if not first_error.transient or policy.attempts == 1:
        first_error.attempts = 1
        raise first_error

    import tenacity  # noqa: PLC0415 (a program that meets no failure need not load it)

    loop = asyncio.get_running_loop()
    attempts = 1
    maybe_applied = False
    pending: CallError | None = first_error

    async def attempt_or_first_error() -> R:
        # The first call stands for the attempt already made, so that counts and waits begin where they should.
        nonlocal attempts, maybe_applied, pending
        if pending is not None:
            error, pending = pending, None
            maybe_applied = error.maybe_applied
            raise error
        attempts += 1
        try:
            return await attempt()
        except CallError as error:
            maybe_applied = maybe_applied or error.maybe_applied
            raise

    def wait(state: "RetryCallState") -> float:
        return policy.wait_seconds(state.attempt_number, state.outcome.exception() if state.outcome else None)

    def stop(state: "RetryCallState") -> bool:
        return state.attempt_number >= policy.attempts or loop.time() + state.upcoming_sleep >= deadline

    def warn(state: "RetryCallState") -> None:
        level = logging.WARNING if state.attempt_number == 1 else logging.DEBUG
        logger.log(
            level,
            "retrying in %.2f s after attempt %d of %d: %s",
            state.upcoming_sleep,
            state.attempt_number,
            policy.attempts,
            state.outcome.exception() if state.outcome else "",
        )

    # A new instance for each sequence: a shared one mixes concurrent calls up.
    sequence = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, CallError) and error.transient),
        wait=wait,
        stop=stop,
        before_sleep=warn,
        sleep=sleep,
        reraise=True,
    )
    try:
        return await sequence(attempt_or_first_error)
    except CallError as error:
        error.attempts = attempts
        error.maybe_applied = maybe_applied
        raise
