"""Requests of one moment that wait for one answer of the origin, and whose failure is whose."""

import asyncio
import contextlib
import copy
from asyncio import AbstractEventLoop
from typing import Any, Final, NamedTuple

from aiohttp import ClientError, ClientHandlerType, ClientRequest, ClientTimeout

from aiokv.adapters._http_entries import StoredResponse

FAILURES: Final = (ClientError, OSError, TimeoutError)
"""What a request to the origin may fail with."""


class Retry:
    """The outcome of a flight that says nothing to those who wait, as where its request was cancelled."""


class Means(NamedTuple):
    """By what a request reaches the origin, apart from its URL: two with equal ones would fail alike.

    Args:
        session: Its session, and so its connector.
        proxy: The proxy and its credentials.
    """

    session: Any
    proxy: Any


class Failure(NamedTuple):
    """An error of the origin.

    Args:
        error: The error.
        means: Those of the request that has met it.
        timeout: Likewise.
    """

    error: BaseException
    means: Means
    timeout: ClientTimeout | None


Landed = StoredResponse | Failure | type[Retry] | None


class Flight:
    """A request to the origin that others may wait for.

    Args:
        place: The running loop, and the key of the response.
        primary: The key of the URL.
        request: The request.
        handler: What sends it.
    """

    __slots__ = ("landed", "means", "place", "primary", "timeout", "touched")

    def __init__(
        self, place: tuple[AbstractEventLoop, str], primary: str, request: ClientRequest, handler: ClientHandlerType
    ) -> None:
        self.place = place
        self.primary = primary
        self.means = _means_of(request)
        self.timeout = _timeout_of(handler)
        self.touched = place[0].time()
        self.landed: asyncio.Future[Landed] = place[0].create_future()

    def touch(self) -> None:
        """Note that a part of the answer has come."""
        self.touched = self.place[0].time()

    def land(self, landed: Landed) -> None:
        """Let those who wait go on."""
        if not self.landed.done():
            self.landed.set_result(landed)

    def fail(self, error: BaseException) -> None:
        """Let those who wait go on, by an error; a bare `TimeoutError` is the time of this request alone."""
        if type(error) is not TimeoutError:
            # Each of them takes a copy: nobody else's traceback is to be in it.
            with contextlib.suppress(Exception):
                copied = copy.copy(error)
                if type(copied) is type(error) and type(copy.copy(copied)) is type(error):
                    self.land(Failure(copied, self.means, self.timeout))
        self.land(Retry)

    async def wait(self, request: ClientRequest, handler: ClientHandlerType) -> Landed:
        """Wait for the answer, as long as the request's own `sock_read` allows.

        Args:
            request: A request that waits.
            handler: What would send it.

        Returns:
            The answer. None where the request has to go on by itself.

        Raises:
            BaseException: The error of the flight, where the request would have met it, too.
        """
        timeout = _timeout_of(handler)
        seconds = (timeout or request.session.timeout).sock_read
        is_like = timeout is not None and timeout == self.timeout
        if is_like or not seconds:
            # The flight itself ends by that time. Each of those who wait can be cancelled alone.
            landed = await asyncio.shield(self.landed)
        else:
            loop, began = self.place[0], self.place[0].time()
            while not self.landed.done() and (left := max(began, self.touched) + seconds - loop.time()) > 0:
                await asyncio.wait([self.landed], timeout=left)
            landed = self.landed.result() if self.landed.done() else None
        if not isinstance(landed, Failure):
            return landed
        if landed.means != _means_of(request) or (isinstance(landed.error, TimeoutError) and not is_like):
            return Retry
        raise copy.copy(landed.error)


def _means_of(request: ClientRequest) -> Means:
    return Means(request.session, (request.proxy, request.proxy_auth))


def _timeout_of(handler: ClientHandlerType) -> ClientTimeout | None:
    """Return the timeouts of a request, or None where they cannot be seen, as behind another middleware."""
    # No request shows its own; aiohttp's innermost handler has them in its closure.
    names = getattr(getattr(handler, "__code__", None), "co_freevars", ())
    with contextlib.suppress(ValueError, AttributeError, TypeError, IndexError):
        found = handler.__closure__[names.index("real_timeout")].cell_contents  # type: ignore[index]
        return found if isinstance(found, ClientTimeout) else None
    return None
