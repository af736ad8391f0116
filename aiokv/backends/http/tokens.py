"""Tokens: credentials are exchanged for a short-lived token, which is renewed ahead of its expiry."""

import asyncio
import copy
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from aiokv import clock as process_clock
from aiokv.backends.base import is_patient
from aiokv.backends.http.transport import Answer
from aiokv.bounded_json import parse_object
from aiokv.errors import AioKVError, CallError, CallTimeoutError, ResponseError, StoreClosedError
from aiokv.wire import parse_http_date

logger = logging.getLogger("aiokv")

_MAX_RENEWAL_MARGIN_SECONDS = 3600.0
_BACKGROUND_RETRY_SECONDS = 10.0
_ASSUMED_LIFETIME_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Token:
    """A short-lived token.

    Args:
        header: The Authorization header of the calls; `repr` does not show it.
        lifetime_seconds: How long it had to live when it was received.
        source: Where the credentials were found that it was exchanged for.
        secrets: What no message may repeat of these; `repr` does not show it.
    """

    header: str = field(repr=False)
    lifetime_seconds: float
    source: str = "credentials"
    secrets: tuple[str, ...] = field(default=(), repr=False)


def parse_token(answer: Answer, source: str = "credentials", secrets: tuple[str, ...] = ()) -> Token:
    """Parse a token endpoint's answer.

    Args:
        answer: Its answer with status 200.
        source: Where the credentials were found that were exchanged.
        secrets: What no message may repeat of these.

    Returns:
        The token; its life is measured on the server's own clock where the answer has a Date header.

    Raises:
        ResponseError: The answer holds no usable token.
    """
    try:
        body = parse_object(answer.body) or {}
        token_type, token = body["token_type"], body["token"]
        header = f"{token_type} {token}"
        expires_at = datetime.fromisoformat(body["expires_at"])
        usable = isinstance(token_type, str) and isinstance(token, str) and token_type and token
        if not (usable and header.isascii() and header.isprintable()) or expires_at.tzinfo is None:
            raise ValueError  # noqa: TRY301 (one message for all faults)
    except (KeyError, TypeError, ValueError):
        # Not chained: the cause may hold the token.
        header, expires_at = "", datetime.fromtimestamp(process_clock.now(), UTC)
    if not header:
        raise ResponseError("the token endpoint's answer has no usable token, token_type and expires_at (ISO 8601, zone)")
    return Token(header, (expires_at - _server_time(answer)).total_seconds(), source, secrets)


def _server_time(answer: Answer) -> datetime:
    return parse_http_date(answer.headers.get("Date", "")) or datetime.fromtimestamp(process_clock.now(), UTC)


Exchange = Callable[[], Awaitable[Token]]


class TokenSource:
    """One token for all calls of a session, renewed ahead of its expiry and once for all calls that wait.

    A token is renewed in the background once less than a fifth of its life, at most an hour, is left.

    Args:
        clock: Returns a monotonic time in seconds; None takes `aiokv.clock.monotonic`, looked up at each use.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock
        self._header: str | None = None
        self._expires_at = 0.0
        self._renew_at = float("-inf")
        self._renewal: asyncio.Task[None] | None = None
        self.source = "credentials"
        """Where the credentials of the present token were found."""
        self.secrets: tuple[str, ...] = ()
        """What no message may repeat of these."""

    def current(self, exchange: Exchange) -> str | None:
        """Return the header for a call now; start a renewal in the background where it is due.

        Args:
            exchange: Fetches a token, with its own retries.

        Returns:
            The header, or None where no living token is at hand.
        """
        now = process_clock.monotonic() if self._clock is None else self._clock()
        if now < self._renew_at:
            return self._header
        if self._header is None or now >= self._expires_at:
            return None
        self._join_renewal(exchange)
        return self._header

    async def wait_for_token(self, exchange: Exchange, refused: str | None = None) -> str:
        """Wait for a token.

        Args:
            exchange: Fetches it, with its own retries.
            refused: The header that the service has just refused, or None where none was sent.

        Returns:
            The header of a living token other than `refused`, or of the one that the exchange has just fetched.

        Raises:
            CallError: The exchange failed.
            CredentialsError: There are no credentials to exchange.
        """
        header = self.current(exchange)
        if header is not None and header != refused:
            return header
        joined = self._renewal is not None and not self._renewal.done()
        renewal = self._join_renewal(exchange)
        try:
            # Shielded: a cancelled caller leaves the renewal to the others.
            await asyncio.shield(renewal)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not renewal.cancelled() or (task is not None and task.cancelling()):
                raise
            raise StoreClosedError("the store was closed while its token was fetched") from None
        except CallError as error:
            if joined and isinstance(error, CallTimeoutError):
                # Another call began it, perhaps long ago, and its time ran out; this call has time of its own.
                return await self.wait_for_token(exchange, refused)
            # Each waiting call fills in its own facts.
            raise copy.copy(error) from error
        if self._header is None:
            raise ResponseError("the token endpoint's answer holds no token")
        return self._header

    async def aclose(self) -> None:
        """Cancel a renewal that is under way."""
        if self._renewal is not None and not self._renewal.done():
            self._renewal.cancel()
            await asyncio.wait([self._renewal])

    def _join_renewal(self, exchange: Exchange) -> "asyncio.Task[None]":
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.create_task(self._renew(exchange), name="aiokv token renewal")
            self._renewal.add_done_callback(_mark_retrieved)
        return self._renewal

    async def _renew(self, exchange: Exchange) -> None:
        # For all calls, whichever began it.
        is_patient.set(True)
        try:
            token = await exchange()
        except Exception as error:
            # While the old token lives, calls go on with it, and the next renewal waits a little.
            now = process_clock.monotonic() if self._clock is None else self._clock()
            self._renew_at = min(now + _BACKGROUND_RETRY_SECONDS, self._expires_at)
            if now < self._expires_at:
                # Logged, since perhaps no call waits for it.
                reason = error if isinstance(error, AioKVError) else type(error).__name__
                logger.warning("token renewal failed, calls go on with the old token: %s", reason)
            raise
        # A token that is dead on arrival means that two clocks disagree: it is used until it is refused.
        lifetime = token.lifetime_seconds if token.lifetime_seconds > 0 else _ASSUMED_LIFETIME_SECONDS
        now = process_clock.monotonic() if self._clock is None else self._clock()
        self._header = token.header
        self.source = token.source
        self.secrets = token.secrets
        self._expires_at = now + lifetime
        self._renew_at = self._expires_at - min(lifetime / 5, _MAX_RENEWAL_MARGIN_SECONDS)
        logger.debug("fetched a token for %.0f s", lifetime)


def _mark_retrieved(renewal: "asyncio.Task[None]") -> None:
    # A failed renewal that no call waited for must not be reported as an exception never retrieved.
    if not renewal.cancelled():
        renewal.exception()
