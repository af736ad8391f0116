"""An answer that is read as it comes, for as long as it lasts."""

import asyncio
from collections.abc import Callable, Mapping

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from aiokv.backends.http.aiohttp_errors import map_error
from aiokv.errors import StoreClosedError


class Stream:
    """An answer whose body is read as it comes.

    Args:
        response: The answer.
        closed: Return whether its session is closed.

    Attributes:
        status: Its status.
        headers: Its headers.
    """

    def __init__(self, response: aiohttp.ClientResponse, closed: Callable[[], bool]) -> None:
        self._response = response
        self._closed = closed
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    async def read(self, seconds: float) -> bytes:
        """Wait for the next bytes.

        Args:
            seconds: How long at most.

        Returns:
            The bytes; none at the end.

        Raises:
            CallTimeoutError: Nothing came in time.
            TransportError: The connection broke.
            ResponseError: The body is not HTTP.
            StoreClosedError: The session was closed meanwhile.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self._response.content.readany()
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            if self._closed():
                raise StoreClosedError("the store was closed meanwhile") from error
            raise map_error(error, 0.0, write=False) from error

    def close(self) -> None:
        """Close the connection."""
        self._response.close()
