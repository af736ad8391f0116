"""`aiohttp.ClientResponse` objects that come from a cache, and bodies that are read before their user asks for them."""

import asyncio
import copy
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple, cast

from aiohttp import ClientRequest, ClientResponse, HttpVersion11, StreamReader, hdrs
from aiohttp.abc import AbstractStreamWriter
from aiohttp.base_protocol import BaseProtocol
from multidict import CIMultiDict, CIMultiDictProxy

from aiokv.adapters._http_entries import StoredResponse
from aiokv.adapters._http_flights import Flight

Outcome = Literal["hit", "stale", "revalidated", "shared", "miss", "bypass"]
"""How a response came about; see `outcome_of`."""

_OUTCOME: Final = "aiokv_outcome"
_BUFFER_BYTES: Final = 65_536


class ResponseCacheInfo(NamedTuple):
    """What a `ResponseCache` has done in this process.

    Args:
        hits: Responses from the store, without the origin.
        stale: Likewise, but no longer fresh: `stale-while-revalidate` or `stale-if-error` allowed it.
        revalidated: Responses from the store that the origin has confirmed.
        shared: Responses that another request of the same moment has fetched.
        misses: Responses from the origin.
        bypassed: Responses that caching does not concern, such as those to `POST`.
        stored: Responses that were given to the store.
        too_large: Responses that were not stored because of their size.
        invalidated: Requests that changed something, so that what was stored of their URL was deleted.
        undecodable: Stored texts that were no responses, and counted as absent.
        store_errors: How often the store failed, was late, or was not asked since it had failed before.
        refresh_errors: Refreshes behind a stale response that failed.
    """

    hits: int = 0
    stale: int = 0
    revalidated: int = 0
    shared: int = 0
    misses: int = 0
    bypassed: int = 0
    stored: int = 0
    too_large: int = 0
    invalidated: int = 0
    undecodable: int = 0
    store_errors: int = 0
    refresh_errors: int = 0


COUNTS: Final[dict[Outcome, str]] = {
    "hit": "hits",
    "stale": "stale",
    "revalidated": "revalidated",
    "shared": "shared",
    "miss": "misses",
    "bypass": "bypassed",
}
"""What is counted of each."""


class _Nothing:
    """The writer of a request that was not sent."""

    output_size: Final = 0


class _NoConnection(BaseProtocol):
    """What a reader without a connection pauses and resumes."""

    __slots__ = ()

    @property
    def connected(self) -> bool:
        """Return True: what is to come does not come from here."""
        return True

    def pause_reading(self) -> None:
        """Do nothing."""

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 (the base class's)
        """Do nothing."""


class BodyReader(StreamReader):
    """A body of which a part was read ahead; the rest comes from the origin as it is asked for.

    Args:
        body: What was read.
        rest: What is still to be read, or None where that was all.
    """

    __slots__ = ("_rest",)

    def __init__(self, body: bytes, rest: StreamReader | None = None) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(_NoConnection(loop), _BUFFER_BYTES, loop=loop)
        self._rest = rest
        self.feed_data(body)
        if rest is None:
            self.feed_eof()

    async def _wait(self, func_name: str) -> None:
        if self._rest is None:
            await super()._wait(func_name)
            return
        try:
            chunk = await self._rest.readany()
        except Exception as error:
            self.set_exception(error)
            raise
        if chunk:
            self.feed_data(chunk)
        if self._rest.at_eof():
            self.feed_eof()


def copy_request(request: ClientRequest) -> ClientRequest:
    """Return a request whose headers can be changed; the caller's own goes with its response.

    Args:
        request: The caller's.
    """
    copied = copy.copy(request)
    copied.headers = request.headers.copy()
    return copied


def conditional_request(request: ClientRequest, wanted: Mapping[str, str]) -> ClientRequest:
    """Return a request with conditions.

    Args:
        request: The caller's.
        wanted: Headers among which the conditions are.
    """
    conditional = copy_request(request)
    for name in (hdrs.IF_NONE_MATCH, hdrs.IF_MODIFIED_SINCE):
        if name in wanted:
            conditional.headers[name] = wanted[name]
    return conditional


def can_be_whole(response: ClientResponse) -> bool:
    """Return whether the end of a body can be told from a connection that broke off.

    Args:
        response: A response that nobody has read from.
    """
    # They may never end.
    if response.content_type in {"text/event-stream", "multipart/x-mixed-replace"}:
        return False
    # aiohttp does not say that a coding has been cut off, so the length must, or the chunks.
    headers = response.headers
    is_framed = hdrs.CONTENT_LENGTH in headers or hdrs.TRANSFER_ENCODING in headers
    return is_framed or hdrs.CONTENT_ENCODING not in headers or response.method == hdrs.METH_HEAD


async def read_up_to(response: ClientResponse, max_bytes: int, flight: Flight | None) -> bytes | None:
    """Read a whole body, and leave it to be read again.

    Args:
        response: A response that nobody has read from.
        max_bytes: How much is read at most.
        flight: Those who wait for the response.

    Returns:
        The body, or None where it is larger or breaks off: the response then still gives all of it, or its error.
    """
    if response.content_length is not None and response.content_length > max_bytes:
        return None
    source = response.content
    chunks: list[bytes] = []
    size = 0
    try:
        while chunk := await source.readany():
            if flight is not None:
                flight.touch()
            chunks.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                response.content = BodyReader(b"".join(chunks), source)
                return None
    except asyncio.CancelledError:
        response.close()
        raise
    except Exception:  # noqa: BLE001 (the reader raises it again)
        response.content = BodyReader(b"".join(chunks), source)
        return None
    body = b"".join(chunks)
    response.content = BodyReader(body)
    return body


def build(request: ClientRequest, stored: StoredResponse, age: str, outcome: Outcome) -> ClientResponse:
    """Return a response to a request that comes from the cache.

    Args:
        request: The request.
        stored: What is stored.
        age: Its age in seconds.
        outcome: How it came about.
    """
    response = request.response_class(
        request.method,
        request.original_url,
        writer=None,
        continue100=None,
        timer=cast("Any", None),
        request_info=request.request_info,
        traces=request._traces,  # noqa: SLF001 (a request hands its own to its response)
        loop=request.loop,
        session=request.session,
        stream_writer=cast("AbstractStreamWriter", _Nothing),
    )
    headers = CIMultiDict(stored.headers)
    headers["Age"] = age
    response.version = HttpVersion11
    response.status = stored.status
    response.reason = stored.reason
    response._headers = CIMultiDictProxy(headers)  # noqa: SLF001 (as `start` does)
    response._raw_headers = tuple(  # noqa: SLF001 (likewise)
        [(name.encode(), value.encode(errors="surrogateescape")) for name, value in headers.items()]
    )
    response.content = BodyReader(stored.body)
    return mark(response, outcome)


def gateway_timeout(request: ClientRequest) -> ClientResponse:
    """Return the answer to a request that takes nothing but a stored response, where there is none.

    Args:
        request: The request.
    """
    return build(request, StoredResponse(504, "Gateway Timeout", (), b"", {}, True, 0.0, 0), "0", "miss")


def mark(response: ClientResponse, outcome: Outcome) -> ClientResponse:
    """Note how a response came about; return it.

    Args:
        response: The response.
        outcome: What is noted.
    """
    setattr(response, _OUTCOME, outcome)
    return response


def outcome_of(response: ClientResponse) -> Outcome | None:
    """Return how a response came about.

    Args:
        response: A response of a session with `caching`.

    Returns:
        `"hit"`: from the store, the origin was not asked. `"stale"`: likewise, but no longer fresh, as the response allows.
        `"revalidated"`: from the store, and the origin has confirmed it. `"shared"`: another request of the same moment has
        fetched it. `"miss"`: from the origin. `"bypass"`: from the origin, and caching does not concern it. None: of a session
        without `caching`.
    """
    return cast("Outcome | None", getattr(response, _OUTCOME, None))
