"""What one user's request may change for the others, and what is no longer what the origin has."""

import asyncio
import gzip

import aiohttp
import pytest
from aiohttp import ClientTimeout, web
from http_origin import Client, Origin, client_of, contents_of, http_date
from multidict import CIMultiDict

from aiokv import AsyncKVStore
from aiokv.adapters.aiohttp_client import outcome_of
from aiokv.testing import MovableClock


def confirms(origin: Origin, control: str, **headers: str) -> None:
    """Answer every request by a 304."""
    named = {"ETag": '"1"', "Cache-Control": control, "Date": http_date(), **headers}
    origin.answers["/"] = lambda _: web.Response(status=304, headers=named)


async def test_confirmation_to_a_user_alone_does_not_reach_the_others(
    client: Client, store: AsyncKVStore, moved: MovableClock
) -> None:
    client.origin.says("/", Cache_Control="max-age=5", ETag='"1"')
    await client.get("/")
    moved.advance(6)
    confirms(client.origin, "max-age=600", **{"X-Account": "alice"})
    response, text = await client.response("/", Authorization="alice")
    assert (outcome_of(response), text, response.headers["X-Account"]) == ("revalidated", "hello", "alice")
    assert "alice" not in await contents_of(store)
    client.origin.says("/", Cache_Control="max-age=600", ETag='"1"')
    response, _ = await client.response("/")
    assert (outcome_of(response), "X-Account" in response.headers) == ("revalidated", False)


@pytest.mark.parametrize("control", ["private, max-age=600", "no-store"])
async def test_confirmation_that_must_not_be_stored_drops_what_is(
    client: Client, store: AsyncKVStore, moved: MovableClock, control: str
) -> None:
    client.origin.says("/", Cache_Control="max-age=5", ETag='"1"')
    await client.get("/")
    moved.advance(6)
    confirms(client.origin, control)
    assert await client.get("/") == ("revalidated", "hello")
    assert await store.count() == 0


async def test_confirmation_that_is_for_all_counts_for_all(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Cache_Control="public, max-age=5", ETag='"1"')
    await client.get("/", Authorization="alice")
    moved.advance(6)
    assert (await client.get("/", Authorization="alice"))[0] == "revalidated"
    assert (await client.get("/"))[0] == "hit"


async def test_private_cache_keeps_a_private_confirmation(store: AsyncKVStore, origin: Origin, moved: MovableClock) -> None:
    async with client_of(store, origin, shared=False) as client:
        origin.says("/", Cache_Control="private, max-age=5", ETag='"1"')
        await client.get("/", Authorization="alice")
        moved.advance(6)
        assert (await client.get("/", Authorization="alice"))[0] == "revalidated"
        assert (await client.get("/", Authorization="alice"))[0] == "hit"


@pytest.mark.parametrize("name", ["Cookie", "Authorization", "Host"])
async def test_header_that_comes_twice_counts_whole(store: AsyncKVStore, origin: Origin, name: str) -> None:
    origin.answers["/"] = lambda request: web.Response(
        text=request.headers.getall(name)[-1], headers={"Cache-Control": "private, max-age=100"}
    )
    async with client_of(store, origin, shared=False) as client:
        seen = []
        for user in ("alice", "bob", "alice"):
            headers = CIMultiDict([(name, "all"), (name, user)])
            async with client.session.get(origin.base, headers=headers) as response:
                seen.append((await response.text(), outcome_of(response)))
    assert seen == [("alice", "miss"), ("bob", "miss"), ("alice", "hit")]


@pytest.mark.parametrize("how", ["timeout", "reset", "cancelled"])
async def test_change_without_an_answer_deletes_what_is_stored(client: Client, how: str) -> None:
    arrived = asyncio.Event()
    client.origin.says("/", "old", Cache_Control="max-age=600")
    await client.get("/")

    async def never(request: web.Request) -> web.Response:
        client.origin.says("/", "new", Cache_Control="max-age=600")
        arrived.set()
        if how == "reset":
            assert request.transport is not None
            request.transport.abort()
        await asyncio.sleep(0.5)
        return web.Response()

    client.origin.answers["/"] = never
    timeout = ClientTimeout(total=0.1 if how == "timeout" else None)
    change = asyncio.create_task(client.session._request("POST", client.origin.base + "/", timeout=timeout))
    await arrived.wait()
    if how == "cancelled":
        change.cancel()
    with pytest.raises((aiohttp.ClientError, TimeoutError, asyncio.CancelledError)):
        await change
    assert await client.get("/") == ("miss", "new")
    assert client.cache.info().invalidated == 1


async def test_safe_request_without_an_answer_deletes_nothing(client: Client) -> None:
    client.origin.says("/", Cache_Control="max-age=600")
    await client.get("/")

    async def never(_: web.Request) -> web.Response:
        await asyncio.sleep(0.3)
        return web.Response()

    client.origin.answers["/"] = never
    with pytest.raises(TimeoutError):
        await client.session.options(client.origin.base + "/", timeout=ClientTimeout(total=0.05))
    assert await client.get("/") == ("hit", "hello")


@pytest.mark.parametrize("how", ["max-age", "expires"])
async def test_date_ahead_of_our_clock_makes_nothing_fresher(client: Client, moved: MovableClock, how: str) -> None:
    lifetime = {"Cache_Control": "max-age=50"} if how == "max-age" else {"Expires": http_date(650)}
    client.origin.says("/", Date=http_date(600), **lifetime)
    await client.get("/")
    moved.advance(40)
    response, _ = await client.response("/")
    assert (outcome_of(response), int(response.headers["Age"])) == ("hit", pytest.approx(40, abs=1))
    moved.advance(11)
    assert (await client.get("/"))[0] == "miss"


@pytest.mark.parametrize("outcome", ["hit", "miss"])
async def test_coded_body_whose_end_nothing_tells_is_not_stored(client: Client, outcome: str) -> None:
    is_whole = outcome == "hit"
    coded = gzip.compress(b"line\n" * 100_000)
    length = b"Content-Length: %d\r\n" % len(coded) if is_whole else b""
    sent = coded if is_whole else coded[: len(coded) // 2]

    def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nCache-Control: max-age=100\r\nContent-Encoding: gzip\r\n"
        request.transport.write(head + length + b"\r\n" + sent)
        request.transport.close()
        return web.Response()

    client.origin.answers["/"] = answer
    await client.get("/")
    assert (await client.get("/"))[0] == outcome


@pytest.mark.parametrize("control", ["max-age=1, proxy-revalidate", "s-maxage=1"])
@pytest.mark.parametrize("window", ["stale-if-error", "stale-while-revalidate"])
async def test_shared_cache_serves_nothing_stale_that_forbids_it(
    store: AsyncKVStore, origin: Origin, moved: MovableClock, control: str, window: str
) -> None:
    origin.says("/", Cache_Control=f"{control}, {window}=100")
    async with client_of(store, origin) as client:
        await client.get("/")
        moved.advance(5)
        origin.says("/", "down", status=503)
        assert await client.get("/") == ("miss", "down")


@pytest.mark.parametrize("lifetime", ["max-age=0, ", ""])
async def test_response_that_is_never_fresh_is_served_stale_where_it_says_so(
    client: Client, moved: MovableClock, lifetime: str
) -> None:
    client.origin.says("/", Cache_Control=f"{lifetime}stale-while-revalidate=60")
    client.origin.says("/e", Cache_Control=f"{lifetime}stale-if-error=60")
    assert [(await client.get(path))[0] for path in ("/", "/e")] == ["miss", "miss"]
    moved.advance(59)
    client.origin.says("/e", "down", status=503)
    assert [(await client.get(path))[0] for path in ("/", "/e")] == ["stale", "stale"]
    moved.advance(1)
    assert await client.get("/e") == ("miss", "down")


@pytest.mark.parametrize("age", ["100", "9223372036854775808", "9" * 4000, f"{0:04000d}100"])
async def test_response_that_is_too_old_on_arrival_is_not_served_again(client: Client, age: str) -> None:
    client.origin.says("/", Cache_Control="max-age=60", Age=age)
    assert [(await client.get("/"))[0] for _ in range(2)] == ["miss", "miss"]


@pytest.mark.parametrize("kind", ["text/event-stream", "multipart/x-mixed-replace; boundary=x"])
async def test_body_without_an_end_comes_as_it_is_sent(client: Client, kind: str) -> None:
    opened = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Cache-Control": "max-age=60", "Content-Type": kind})
        await response.prepare(request)
        await response.write(b"first")
        await opened.wait()
        return response

    client.origin.answers["/"] = endless
    async with asyncio.timeout(10), client.session.get(client.origin.base) as response:
        assert await response.content.readany() == b"first"
        opened.set()


async def test_private_cache_serves_stale_what_concerns_shared_ones(
    store: AsyncKVStore, origin: Origin, moved: MovableClock
) -> None:
    origin.says("/", Cache_Control="max-age=1, proxy-revalidate, stale-if-error=100")
    async with client_of(store, origin, shared=False) as client:
        await client.get("/")
        moved.advance(5)
        origin.says("/", "down", status=503)
        assert await client.get("/") == ("stale", "hello")


@pytest.mark.parametrize(("status", "control"), [(404, "max-age=0"), (410, "no-store"), (200, "no-store")])
async def test_refresh_that_finds_something_else_drops_the_old(
    client: Client, store: AsyncKVStore, moved: MovableClock, status: int, control: str
) -> None:
    client.origin.says("/", Cache_Control="max-age=1, stale-if-error=100")
    await client.get("/")
    moved.advance(5)
    client.origin.says("/", "gone", status=status, Cache_Control=control)
    assert await client.get("/") == ("miss", "gone")
    assert "hello" not in await contents_of(store)
    client.origin.says("/", "down", status=503)
    assert await client.get("/") == ("miss", "down")


@pytest.mark.parametrize(
    ("old", "new"), [("hello", "hell"), ("hello", "hello!"), ("r1[200", "r1[42"), ("r1[200", "r1[1000"), ("r1[200", "r1[-1")]
)
async def test_stored_text_that_contradicts_itself_is_a_miss(client: Client, store: AsyncKVStore, old: str, new: str) -> None:
    client.origin.says("/", Cache_Control="max-age=100")
    await client.get("/")
    (key,) = [info.key async for info in store.keys("")]
    text = await store.get(key)
    assert text is not None
    await store.set(key, text.replace(old, new))
    assert await client.get("/") == ("miss", "hello")
    assert (client.cache.info().undecodable, await client.get("/")) == (1, ("hit", "hello"))


async def test_head_without_a_body_is_whole(client: Client) -> None:
    client.origin.says("/", Cache_Control="max-age=100")
    assert [(await client.get("/", "HEAD"))[0] for _ in range(2)] == ["miss", "hit"]
