"""A cache of responses where requests, responses and stored texts are odd."""

import asyncio
import random
from typing import Any

import pytest
from asgi_origin import Headers, Origin, ask
from helpers import still_clock

from aiokv import AsyncKVStore
from aiokv.adapters._asgi_responses import Rules, read_response
from aiokv.adapters.fastapi import ResponseCache


async def calls_of(cache: ResponseCache, *requests: tuple[str, Headers]) -> list[str]:
    return [(await ask(cache, path, headers)).headers["x-call"] for path, headers in requests]


async def test_encoded_slash_is_another_path(store: AsyncKVStore) -> None:
    cache = ResponseCache(Origin(), store=store)
    assert await calls_of(cache, *[(path, []) for path in ("/a/b", "/a%2Fb", "/a%3Fb", "/a?b", "/a/b", "/a%2Fb")]) == [
        *["1", "2", "3", "4"],
        *["1", "2"],
    ]


async def test_server_without_raw_paths_is_served(store: AsyncKVStore) -> None:
    cache = ResponseCache(Origin(), store=store)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    for path in ("/é", "/é", "/a%2Fb", "/a/b"):
        await cache({"type": "http", "method": "GET", "path": path, "raw_path": None, "headers": []}, receive, send)
    calls = [value for one in sent for name, value in one.get("headers", ()) if name == b"x-call"]
    assert calls == [b"1", b"1", b"2", b"3"]


@pytest.mark.parametrize("header", [("Content-Length", "5"), ("Transfer-Encoding", "chunked")])
async def test_get_with_a_body_goes_to_the_application_with_it(store: AsyncKVStore, header: tuple[str, str]) -> None:
    cache = ResponseCache(Origin(bodies=[b"got "]), store=store)
    answers = [await ask(cache, headers=[header], body=body) for body in (b"alice", b"bobby")]
    assert [one.body for one in answers] == [b"got alice", b"got bobby"]
    assert await store.count() == 0
    assert await calls_of(cache, ("/", [("Content-Length", "0")]), ("/", [])) == ["3", "3"]


async def test_no_get_or_head_shows_an_ignored_header(store: AsyncKVStore) -> None:
    origin = Origin()
    cache = ResponseCache(origin, store=store, ignore=["cookie"])
    for headers in ([], [("Range", "bytes=0-1")], [("Authorization", "x")], [("Content-Length", "4")]):
        await ask(cache, headers=[("Cookie", "a=b"), *headers])
    await ask(cache, headers=[("Cookie", "a=b")], method="HEAD")
    assert (len(origin.requests), ["cookie" for one in origin.requests if "Cookie" in one]) == (5, [])
    await ask(cache, headers=[("Cookie", "a=b")], method="POST")
    assert origin.requests[-1]["Cookie"] == "a=b"


async def test_ignored_header_stays_away_from_those_who_waited_for_a_response_of_another(store: AsyncKVStore) -> None:
    origin = Origin([("Cache-Control", "no-store")])
    origin.gate = asyncio.Event()
    cache = ResponseCache(origin, store=store, ignore=["cookie"])
    asked = [asyncio.create_task(ask(cache, headers=[("Cookie", f"a={number}")])) for number in range(3)]
    await asyncio.sleep(0.05)
    origin.gate.set()
    await asyncio.gather(*asked)
    assert [{name.lower() for name in one} & {"cookie"} for one in origin.requests] == [set()] * 3


PAST, FUTURE = "Thu, 01 Jan 1970 00:00:00 GMT", "Thu, 01 Jan 1970 00:01:00 GMT"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ([("Expires", "0")], None),
        ([("Expires", PAST)], None),
        ([("Expires", FUTURE), ("Date", PAST)], 60),
        ([("Expires", FUTURE)], None),
        ([("Expires", PAST), ("Cache-Control", "max-age=7")], 7),
        ([("Expires", PAST), ("Cache-Control", "public")], None),
        ([("Pragma", "no-cache")], None),
        ([("Cache-Control", "max-age=-1")], None),
        ([("Cache-Control", "max-age=0.5")], None),
        ([("Cache-Control", "max-age=60, s-maxage=x")], None),
        ([("Cache-Control", "max-age=3, max-age=100")], 3),
        ([("Cache-Control", "max-age=" + "9" * 5000)], 10**15 - 1),
        ([("Content-Type", "Text/Event-Stream; charset=utf-8")], None),
        ([("Content-Length", "4")], 100),
        ([("Content-Length", "5")], None),
        ([("Content-Length", "x")], None),
        ([], 100),
    ],
    ids=str,
)
def test_lifetime_is_the_one_that_the_response_says(headers: Headers, seconds: float | None) -> None:
    given = [(name.lower().encode(), value.encode()) for name, value in headers]
    assert Rules(100, (), 1000).fresh_seconds(200, given, 4, is_whole=True) == seconds


@pytest.mark.parametrize("headers", [[("Expires", "0")], [("Content-Length", "5")], [("Pragma", "no-cache")]], ids=str)
async def test_response_that_says_expired_or_is_cut_comes_as_it_is(store: AsyncKVStore, headers: Headers) -> None:
    cache = ResponseCache(Origin(headers), store=store)
    answers = [await ask(cache) for _ in range(2)]
    assert [(one.body, one.headers["x-call"]) for one in answers] == [(b"body", "1"), (b"body", "2")]
    assert dict(headers).items() <= {name.title(): value for name, value in answers[0].headers.items()}.items()
    assert (await store.count(), "etag" in answers[0].headers) == (0, False)


class Ticker:
    """An application whose response has no end until its client leaves."""

    def __init__(self, content_type: str, *headers: tuple[bytes, bytes]) -> None:
        self.headers = [(b"content-type", content_type.encode()), *headers]
        self.ended = asyncio.Event()
        self.listens = True

    async def __call__(self, _: Any, receive: Any, send: Any) -> None:
        await receive()
        leaving = asyncio.ensure_future(receive() if self.listens else asyncio.Event().wait())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.headers})
            while not leaving.done():
                await send({"type": "http.response.body", "body": b"tick", "more_body": True})
                await asyncio.sleep(0.005)
            assert leaving.result() == {"type": "http.disconnect"}
        finally:
            leaving.cancel()
            self.ended.set()


@pytest.mark.parametrize(
    "origin",
    [
        ("text/event-stream",),
        ("multipart/x-mixed-replace; boundary=x",),
        ("text/plain", (b"cache-control", b"no-store")),
    ],
    ids=str,
)
async def test_endless_response_streams_at_once_and_ends_with_its_client(store: AsyncKVStore, origin: Any) -> None:
    ticker = Ticker(*origin)
    cache = ResponseCache(ticker, store=store)
    ticks, left = asyncio.Event(), asyncio.Event()
    requests = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Any:
        if requests:
            return requests.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            ticks.set()

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asked = asyncio.create_task(cache(scope, receive, send))
    async with asyncio.timeout(5):
        await ticks.wait()
        left.set()
        await asked
        await ticker.ended.wait()
    assert await store.count() == 0


@pytest.mark.parametrize("listens", [True, False])
async def test_endless_response_made_behind_a_caller_ends(store: AsyncKVStore, *, listens: bool) -> None:
    origin: Any = Origin()
    ticker = Ticker("text/event-stream")
    ticker.listens = listens

    async def switch(*given: Any) -> None:
        await origin(*given)

    cache = ResponseCache(switch, store=store, ttl=10, stale_while_revalidate=60)
    with still_clock() as clock:
        await ask(cache)
        clock.advance(20)
        origin = ticker
        assert (await ask(cache)).headers["age"] == "20"
        async with asyncio.timeout(5):
            await ticker.ended.wait()


async def test_text_with_any_one_character_changed_is_damaged() -> None:
    text = Rules(100, (), 1000).write(200, [(b"x-a", b"1")], b"some body", 100)
    assert read_response(text) is not None
    chosen = random.Random(0)
    for index in range(len(text)):
        other = chosen.choice([one for one in '{}[]",:0x\n\ud800é' if one != text[index]])
        assert read_response(text[:index] + other + text[index + 1 :]) is None
        assert read_response(text[:index]) is None
    for old, new in (("200", "true"), ("200", "999"), ("etag", "eta"), ("t", "b")):
        assert read_response(text.replace(old, new)) is None


async def test_damaged_value_is_a_miss_that_is_made_anew(store: AsyncKVStore) -> None:
    cache = ResponseCache(Origin(), store=store)
    await ask(cache)
    listing = store.keys()
    (key,) = [info.key async for info in listing]
    whole = await store.get(key)
    assert whole is not None
    await store.set(key, whole.replace(":200", ":true").replace("200,", "true,"), ttl=60)
    assert await calls_of(cache, *[("/", [])] * 4) == ["2", "3", "3", "3"]
