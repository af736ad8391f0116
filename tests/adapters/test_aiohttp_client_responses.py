"""What a user gets from a session with the middleware is what it gets without: bodies, headers, errors, connections."""

import asyncio
import gzip
import zlib
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from http_origin import Client, Origin, client_of, http_date

from aiokv import AsyncKVStore
from aiokv.adapters.aiohttp_client import caching, outcome_of
from aiokv.testing import MovableClock

FRESH = {"Cache-Control": "max-age=100"}
ODD_BYTES = bytes(range(256)) * 3 + b"\0\n\xff"


def fresh(body: bytes, **headers: str) -> web.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.Response(body=body, headers={**FRESH, "Date": http_date(), **named})


async def idle_connections(session: aiohttp.ClientSession) -> tuple[int, int]:
    """Return how many connections are in use, and how many wait to be used."""
    connector: Any = session.connector
    await asyncio.sleep(0)
    return len(connector._acquired), sum(len(conns) for conns in connector._conns.values())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"x" * 1_400_000,
        b"\xff" * 1_400_000,
        ODD_BYTES,
        "\N{GRINNING FACE}é\u2028".encode(),
        b"\xef\xbb\xbfBOM",
        b"\xed\xa0\x80",
        b"a\r\n\x00b" * 1000,
    ],
    ids=["empty", "ascii", "large", "large bytes", "bytes", "emoji", "bom", "surrogate", "control"],
)
async def test_body_is_the_same_bytes(client: Client, body: bytes) -> None:
    client.origin.answers["/"] = lambda _: fresh(body, Content_Type="application/octet-stream")
    for outcome in ("miss", "hit"):
        async with client.session.get(client.origin.base) as response:
            assert (outcome_of(response), await response.read()) == (outcome, body)


async def test_every_way_to_read_gives_the_same(client: Client) -> None:
    body = b'{"name": "\xc3\xa9"}\n[1]\n'
    client.origin.answers["/"] = lambda _: fresh(body, Content_Type="application/json; charset=utf-8")

    async def read_all() -> list[Any]:
        seen: list[Any] = []
        session, url = client.session, client.origin.base
        async with session.get(url) as response:
            seen += [await response.text(), await response.text(), response.get_encoding(), response.charset]
        async with session.get(url) as response:
            seen.append([chunk async for chunk in response.content.iter_chunked(5)])
        async with session.get(url) as response:
            seen.append(b"".join([chunk async for chunk in response.content.iter_any()]))
        async with session.get(url) as response:
            seen.append([line async for line in response.content])
        async with session.get(url) as response:
            seen += [await response.content.readexactly(3), await response.content.read(), response.content.at_eof()]
        async with session.get(url) as response:
            seen.append(b"".join([chunk async for chunk, _ in response.content.iter_chunks()]))
        return seen

    await client.get("/")
    cached = await read_all()
    assert client.origin.hits == 1
    async with aiohttp.ClientSession() as plain:
        client.session, cache_session = plain, client.session
        assert await read_all() == cached
        client.session = cache_session


async def test_json_and_its_content_type_are_checked_as_ever(client: Client) -> None:
    client.origin.answers["/json"] = lambda _: web.json_response({"a": 1}, headers={**FRESH, "Date": http_date()})
    client.origin.answers["/text"] = lambda _: fresh(b"{}", Content_Type="text/plain")
    for _ in range(2):
        async with client.session.get(client.origin.base + "/json") as response:
            assert await response.json() == {"a": 1}
        async with client.session.get(client.origin.base + "/text") as response:
            with pytest.raises(aiohttp.ContentTypeError):
                await response.json()


async def test_hit_shows_what_the_miss_showed(client: Client) -> None:
    def answer(_: web.Request) -> web.Response:
        response = fresh(b"hello", Link='<https://a.example>; rel="next"', Content_Disposition='attachment; filename="a.txt"')
        response.headers.add("X-Two", "1")
        response.headers.add("X-Two", "2")
        response.set_status(203, "Some Reason")
        return response

    client.origin.answers["/p/ä b"] = answer
    seen: list[Any] = []
    for _ in range(2):
        async with client.session.get(client.origin.base + "/p/ä b?q=1#part", headers={"X-Mine": "1"}) as response:
            assert isinstance(response, aiohttp.ClientResponse)
            seen.append(
                [
                    response.status,
                    response.reason,
                    response.ok,
                    response.method,
                    response.url,
                    response.real_url,
                    response.host,
                    response.version,
                    response.history,
                    response.request_info,
                    response.links,
                    response.content_disposition,
                    response.content_type,
                    response.content_length,
                    [pair for pair in response.headers.items() if pair[0] != "Age"],
                    [pair for pair in response.raw_headers if pair[0] != b"Age"],
                    await response.text(),
                    response.closed,
                ]
            )
    assert seen[0] == seen[1]
    assert client.origin.hits == 1
    assert "<ClientResponse(" in repr(response)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_compressed_body_is_decoded_once_and_stored_so(store: AsyncKVStore, origin: Origin, coding: str) -> None:
    packed = gzip.compress(b"hello" * 100) if coding == "gzip" else zlib.compress(b"hello" * 100)
    origin.answers["/"] = lambda _: fresh(packed, Content_Encoding=coding)
    async with caching(store) as cache:
        async with aiohttp.ClientSession(middlewares=[cache]) as session:
            for outcome in ("miss", "hit"):
                async with session.get(origin.base) as response:
                    assert (outcome_of(response), await response.read()) == (outcome, b"hello" * 100)
                    assert response.headers["Content-Encoding"] == coding
        async with aiohttp.ClientSession(middlewares=[cache], auto_decompress=False) as raw:
            for outcome in ("miss", "hit"):
                async with raw.get(origin.base) as response:
                    assert (outcome_of(response), await response.read()) == (outcome, packed)


async def test_body_over_the_bound_streams_and_is_not_stored(store: AsyncKVStore, origin: Origin) -> None:
    total = 30_000_000
    sent = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={**FRESH, "Date": http_date()})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for _ in range(total // 100_000):
            await response.write(b"x" * 100_000)
            sent += 100_000
        return response

    origin.answers["/"] = answer
    async with client_of(store, origin, max_body_bytes=50_000) as client:
        async with client.session.get(origin.base, read_bufsize=1024) as response:
            # The rest waits for its reader.
            assert sent < total
            size = 0
            async for chunk in response.content.iter_chunked(4096):
                size += len(chunk)
        assert (size, outcome_of(response), await store.count()) == (total, "miss", 0)
        assert client.cache.info().too_large == 1
        assert await idle_connections(client.session) == (0, 1)


async def test_body_whose_length_is_over_the_bound_is_not_read_ahead(store: AsyncKVStore, origin: Origin) -> None:
    origin.answers["/"] = lambda _: fresh(b"x" * 60_000)
    async with client_of(store, origin, max_body_bytes=50_000) as client:
        for _ in range(2):
            response, text = await client.response("/")
            assert (outcome_of(response), len(text)) == ("miss", 60_000)
        assert await store.count() == 0


async def test_response_whose_length_is_over_the_bound_is_handed_out_before_its_body(
    store: AsyncKVStore, origin: Origin
) -> None:
    goes_on = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={**FRESH, "Content-Length": "60000"})
        await response.prepare(request)
        await goes_on.wait()
        await response.write(b"x" * 60_000)
        return response

    origin.answers["/"] = answer
    async with client_of(store, origin, max_body_bytes=50_000) as client, asyncio.timeout(10):
        response = await client.session.get(origin.base)
        goes_on.set()
        assert len(await response.read()) == 60_000


async def test_large_body_is_dropped_with_its_connection_where_it_is_not_read(store: AsyncKVStore, origin: Origin) -> None:
    origin.answers["/"] = lambda _: fresh(b"x" * 5_000_000)
    async with client_of(store, origin, max_body_bytes=50_000) as client:
        async with client.session.get(origin.base) as response:
            assert response.status == 200
        assert await idle_connections(client.session) == (0, 0)
        with pytest.raises(aiohttp.ClientConnectionError):
            await response.read()


async def test_body_that_breaks_off_is_an_error_and_not_stored(client: Client, store: AsyncKVStore) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={**FRESH, "Date": http_date(), "Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.close()
        return response

    client.origin.answers["/"] = answer
    async with client.session.get(client.origin.base) as response:
        assert await response.content.read(4) == b"half"
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.content.read()
    assert (await store.count(), client.cache.info().too_large) == (0, 0)
    client.origin.answers["/"] = lambda _: fresh(b"whole")
    assert await client.get("/") == ("miss", "whole")
    assert await client.get("/") == ("hit", "whole")


async def test_stream_of_events_is_handed_out_as_it_comes(client: Client) -> None:
    goes_on = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={**FRESH, "Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await goes_on.wait()
        return response

    client.origin.answers["/"] = answer
    async with asyncio.timeout(10), client.session.get(client.origin.base) as response:
        assert await response.content.readline() == b"data: 1\n"
        goes_on.set()


@pytest.mark.parametrize("read", [True, False])
async def test_connections_go_back_to_the_pool(client: Client, moved: MovableClock, *, read: bool) -> None:
    client.origin.says("/", Cache_Control="max-age=10, stale-if-error=100", ETag='"1"')
    for outcome in ("miss", "hit", "revalidated"):
        if outcome == "revalidated":
            moved.advance(10)
        async with client.session.get(client.origin.base) as response:
            assert outcome_of(response) == outcome
            if read:
                await response.read()
        assert await idle_connections(client.session) == (0, 1)
    client.origin.says("/", "broken", status=503)
    moved.advance(10)
    assert (await client.get("/"))[0] == "stale"
    assert (await idle_connections(client.session))[0] == 0


async def test_response_that_nobody_releases_leaves_no_connection_behind(client: Client) -> None:
    client.origin.says("/", Cache_Control="max-age=10")
    for _ in range(2):
        response = await client.session.get(client.origin.base)
        assert await idle_connections(client.session) == (0, 1)
        del response


async def test_released_hit_cannot_be_read(client: Client) -> None:
    client.origin.says("/", Cache_Control="max-age=10")
    for _ in range(2):
        response = await client.session.get(client.origin.base)
        response.release()
        with pytest.raises(aiohttp.ClientConnectionError):
            await response.read()


async def test_redirects_are_followed_from_the_store(client: Client) -> None:
    client.origin.answers["/old"] = lambda _: web.Response(
        status=301, headers={**FRESH, "Location": "/new", "Date": http_date()}
    )
    client.origin.says("/new", "here", Cache_Control="max-age=100")
    for _ in range(2):
        response, text = await client.response("/old")
        assert (text, response.url.path, [one.status for one in response.history]) == ("here", "/new", [301])
    assert client.origin.hits == 2
    assert outcome_of(response.history[0]) == "hit"


async def test_raise_for_status_raises_for_a_hit(client: Client) -> None:
    client.origin.says("/", "gone", status=410, Cache_Control="max-age=100", X_Why="moved")
    errors = []
    for _ in range(2):
        with pytest.raises(aiohttp.ClientResponseError) as caught:
            await client.session.get(client.origin.base, raise_for_status=True)
        errors.append((caught.value.status, caught.value.message, caught.value.headers["X-Why"], caught.value.request_info))
    assert errors[0] == errors[1]
    assert client.origin.hits == 1
    with pytest.raises(aiohttp.ClientResponseError):
        (await client.session.get(client.origin.base)).raise_for_status()


async def test_tracing_sees_hits(store: AsyncKVStore, origin: Origin) -> None:
    seen: list[str] = []
    trace = aiohttp.TraceConfig()

    def note(name: str) -> Any:
        async def noted(*_: object) -> None:
            seen.append(name)

        return noted

    trace.on_request_start.append(note("start"))
    trace.on_request_end.append(note("end"))
    trace.on_response_chunk_received.append(note("chunk"))
    trace.on_connection_create_end.append(note("connection"))
    origin.says("/", Cache_Control="max-age=100")
    async with caching(store) as cache, aiohttp.ClientSession(middlewares=[cache], trace_configs=[trace]) as session:
        for _ in range(2):
            async with session.get(origin.base) as response:
                await response.read()
    assert seen == ["start", "connection", "end", "chunk", "start", "end", "chunk"]


async def test_class_of_responses_is_the_sessions(store: AsyncKVStore, origin: Origin) -> None:
    class Mine(aiohttp.ClientResponse):
        pass

    origin.says("/", Cache_Control="max-age=100")
    async with caching(store) as cache, aiohttp.ClientSession(middlewares=[cache], response_class=Mine) as session:
        for outcome in ("miss", "hit"):
            async with session.get(origin.base) as response:
                assert (type(response), outcome_of(response)) == (Mine, outcome)


async def test_other_middlewares_see_only_what_goes_to_the_origin(store: AsyncKVStore, origin: Origin) -> None:
    sent: list[str] = []

    async def outer(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        request.headers["X-Outer"] = "1"
        return await handler(request)

    async def inner(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        sent.append(request.headers["X-Outer"])
        return await handler(request)

    origin.says("/", Cache_Control="max-age=100", Vary="X-Outer")
    async with caching(store) as cache, aiohttp.ClientSession(middlewares=[outer, cache, inner]) as session:
        for _ in range(2):
            await session.get(origin.base)
    assert sent == ["1"]


async def test_web_socket_is_let_through(client: Client) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(await socket.receive_str())
        return socket

    client.origin.answers["/"] = echo
    async with client.session.ws_connect(client.origin.base) as socket:
        await socket.send_str("hello")
        assert await socket.receive_str() == "hello"


async def test_address_without_a_path_is_that_of_its_root(client: Client) -> None:
    client.origin.says("/", Cache_Control="max-age=100")
    await client.session.get(client.origin.base)
    assert (await client.get("/"))[0] == "hit"


async def test_response_of_a_session_without_caching_has_no_outcome(origin: Origin) -> None:
    async with aiohttp.ClientSession() as session, session.get(origin.base) as response:
        assert outcome_of(response) is None
