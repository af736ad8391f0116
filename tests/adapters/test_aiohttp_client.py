"""The middleware follows RFC 9111 and RFC 5861: what is stored, served, validated, served stale and deleted."""

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from http_origin import Client, Origin, client_of, contents_of, http_date

from aiokv import AsyncKVStore
from aiokv.adapters.aiohttp_client import caching, outcome_of
from aiokv.testing import MovableClock


async def test_fresh_response_comes_from_the_store_until_max_age(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Cache_Control="max-age=100")
    assert await client.get("/") == ("miss", "hello")
    moved.advance(99)
    assert await client.get("/") == ("hit", "hello")
    moved.advance(1)
    assert await client.get("/") == ("miss", "hello")
    assert client.origin.hits == 2


async def test_age_below_a_minute_is_kept_to_the_second(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Cache_Control="max-age=2")
    await client.get("/")
    moved.advance(1)
    assert (await client.get("/"))[0] == "hit"
    moved.advance(1)
    assert (await client.get("/"))[0] == "miss"


async def test_hit_shows_its_age(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Cache_Control="max-age=100")
    response, _ = await client.response("/")
    assert "Age" not in response.headers
    moved.advance(42)
    response, _ = await client.response("/")
    assert response.headers["Age"] == "42"


async def test_age_on_arrival_counts(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Cache_Control="max-age=100", Age="60")
    await client.get("/")
    moved.advance(39)
    response, _ = await client.response("/")
    assert (outcome_of(response), response.headers.getall("Age")) == ("hit", ["99"])
    moved.advance(1)
    assert (await client.get("/"))[0] == "miss"


async def test_expires_counts_from_date(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Expires=http_date(50), Age="10")
    await client.get("/")
    moved.advance(39)
    assert (await client.get("/"))[0] == "hit"
    moved.advance(1)
    assert (await client.get("/"))[0] == "miss"


async def test_response_without_date_ages_from_its_arrival(client: Client, moved: MovableClock) -> None:
    def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nCache-Control: max-age=100\r\nContent-Length: 2\r\n\r\n"
        request.transport.write(head + b"hi")
        request.transport.close()
        return web.Response()

    client.origin.answers["/"] = answer
    assert await client.get("/") == ("miss", "hi")
    moved.advance(99)
    assert await client.get("/") == ("hit", "hi")
    moved.advance(1)
    client.origin.says("/", "new")
    assert await client.get("/") == ("miss", "new")


async def test_last_modified_alone_makes_a_tenth_of_its_age_fresh(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Last_Modified=http_date(-1000))
    await client.get("/")
    moved.advance(99)
    assert (await client.get("/"))[0] == "hit"


async def test_response_without_freshness_or_validator_is_not_stored(client: Client, store: AsyncKVStore) -> None:
    client.origin.says("/")
    assert [await client.get("/"), await client.get("/")] == [("miss", "hello")] * 2
    assert await store.count() == 0


@pytest.mark.parametrize("control", ["no-store", "max-age=100, no-store", "private, max-age=100"])
async def test_response_that_must_not_be_stored_is_not(client: Client, store: AsyncKVStore, control: str) -> None:
    client.origin.says("/", Cache_Control=control, ETag='"1"')
    assert [(await client.get("/"))[0], (await client.get("/"))[0]] == ["miss", "miss"]
    assert await store.count() == 0


async def test_request_with_no_store_leaves_nothing_in_the_store(client: Client, store: AsyncKVStore) -> None:
    client.origin.says("/", Cache_Control="max-age=100")
    assert (await client.get("/", Cache_Control="no-store"))[0] == "miss"
    assert await store.count() == 0


async def test_private_cache_stores_what_is_private(store: AsyncKVStore, origin: Origin) -> None:
    origin.says("/", Cache_Control="private, max-age=100")
    async with client_of(store, origin, shared=False) as client:
        assert [(await client.get("/"))[0], (await client.get("/"))[0]] == ["miss", "hit"]


async def test_s_maxage_counts_for_a_shared_cache_alone(store: AsyncKVStore, origin: Origin, moved: MovableClock) -> None:
    origin.says("/", Cache_Control="max-age=10, s-maxage=100")
    async with client_of(store, origin) as shared, client_of(store, origin, shared=False) as private:
        await shared.get("/")
        await private.get("/")
        moved.advance(50)
        assert ((await shared.get("/"))[0], (await private.get("/"))[0]) == ("hit", "miss")


@pytest.mark.parametrize("shared", [True, False])
async def test_answers_to_credentials_reach_nobody_else(store: AsyncKVStore, origin: Origin, *, shared: bool) -> None:
    origin.answers["/"] = lambda request: web.Response(
        text=request.headers.get("Authorization", "") + request.headers.get("Cookie", ""),
        headers={"Cache-Control": "private, max-age=100", "Date": http_date()},
    )
    async with client_of(store, origin, shared=shared) as client:
        for name in ("Authorization", "Cookie"):
            for user in ("ann", "bob", "ann"):
                assert (await client.get("/", **{name: user}))[1] == user
        assert (await client.get("/"))[1] == ""


async def test_shared_cache_keeps_answers_to_credentials_only_where_the_origin_says_so(client: Client) -> None:
    client.origin.says("/mine", Cache_Control="max-age=100")
    client.origin.says("/public", Cache_Control="max-age=100, public")
    for path, second in (("/mine", "miss"), ("/public", "hit")):
        await client.get(path, Authorization="Bearer ann")
        assert (await client.get(path, Authorization="Bearer ann"))[0] == second


async def test_stale_response_is_validated_by_its_etag(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Cache_Control="max-age=10", ETag='"1"')
    await client.get("/")
    moved.advance(10)
    client.origin.says("/", "changed without a new ETag", Cache_Control="max-age=10", ETag='"1"')
    assert await client.get("/") == ("revalidated", "hello")
    assert client.origin.requests[1][2]["if-none-match"] == '"1"'
    moved.advance(9)
    assert await client.get("/") == ("hit", "hello")
    moved.advance(1)
    client.origin.says("/", "new", Cache_Control="max-age=10", ETag='"2"')
    assert await client.get("/") == ("miss", "new")
    assert await client.get("/") == ("hit", "new")


async def test_stale_response_is_validated_by_its_last_modified(client: Client, moved: MovableClock) -> None:
    modified = http_date(-1000)
    client.origin.says("/", Cache_Control="max-age=10", Last_Modified=modified)
    await client.get("/")
    moved.advance(10)
    assert await client.get("/") == ("revalidated", "hello")
    assert client.origin.requests[1][2]["if-modified-since"] == modified


async def test_request_of_the_caller_does_not_show_the_conditions(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Cache_Control="max-age=10", ETag='"1"')
    await client.get("/")
    moved.advance(10)
    response, _ = await client.response("/")
    assert outcome_of(response) == "revalidated"
    assert "If-None-Match" not in response.request_info.headers


async def test_304_updates_headers_and_age(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Cache_Control="max-age=10", ETag='"1"', X_Version="1", X_Old="kept", Age="4")
    await client.get("/")
    moved.advance(10)
    client.origin.says("/", Cache_Control="max-age=20", ETag='"1"', X_Version="2")
    await client.get("/")
    moved.advance(19)
    response, _ = await client.response("/")
    shown = {name: response.headers.getall(name) for name in ("X-Version", "X-Old", "Cache-Control", "Age")}
    assert outcome_of(response) == "hit"
    assert shown == {"X-Version": ["2"], "X-Old": ["kept"], "Cache-Control": ["max-age=20"], "Age": ["19"]}


async def test_304_without_expires_leaves_the_stored_one_as_it_was(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Expires=http_date(50), ETag='"1"', Age="10")
    await client.get("/")
    moved.advance(42)
    client.origin.says("/", ETag='"1"')
    assert (await client.get("/"))[0] == "revalidated"
    moved.advance(7)
    assert (await client.get("/"))[0] == "hit"
    moved.advance(1)
    assert (await client.get("/"))[0] == "revalidated"


async def test_304_that_confirms_another_response_leads_to_a_whole_one(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Cache_Control="max-age=10", ETag='"1"')
    await client.get("/")
    moved.advance(10)

    def answer(request: web.Request) -> web.Response:
        if "If-None-Match" in request.headers:
            return web.Response(status=304, headers={"ETag": '"2"', "Date": http_date()})
        return web.Response(text="new", headers={"ETag": '"2"', "Date": http_date(), "Cache-Control": "max-age=10"})

    client.origin.answers["/"] = answer
    assert await client.get("/") == ("miss", "new")
    assert client.origin.hits == 3


@pytest.mark.parametrize("control", ["no-cache", "max-age=0", "max-age=0, must-revalidate"])
async def test_response_that_must_be_validated_is_each_time(client: Client, control: str) -> None:
    client.origin.says("/", Cache_Control=control, ETag='"1"')
    assert [(await client.get("/"))[0] for _ in range(3)] == ["miss", "revalidated", "revalidated"]


async def test_request_with_no_cache_asks_the_origin(client: Client) -> None:
    client.origin.says("/", Cache_Control="max-age=100", ETag='"1"')
    await client.get("/")
    assert (await client.get("/", Cache_Control="no-cache"))[0] == "revalidated"


async def test_only_if_cached_never_asks_the_origin(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Cache_Control="max-age=10, stale-while-revalidate=10", ETag='"1"')
    response, text = await client.response("/", Cache_Control="only-if-cached")
    assert (response.status, response.reason, text, client.origin.hits) == (504, "Gateway Timeout", "", 0)
    await client.get("/")
    assert await client.get("/", Cache_Control="only-if-cached") == ("hit", "hello")
    moved.advance(15)
    assert await client.get("/", Cache_Control="only-if-cached") == ("stale", "hello")
    moved.advance(15)
    response, _ = await client.response("/", Cache_Control="only-if-cached")
    assert (response.status, client.origin.hits) == (504, 1)


async def test_each_variant_is_stored(client: Client) -> None:
    client.origin.answers["/"] = lambda request: web.Response(
        text=request.headers.get("Accept-Language", "none"),
        headers={"Vary": "accept-language, X-Other", "Cache-Control": "max-age=100", "Date": http_date()},
    )
    languages = ("en", "de", "fr")
    for language in languages:
        assert await client.get("/", Accept_Language=language) == ("miss", language)
    for language in languages:
        assert await client.get("/", Accept_Language=language) == ("hit", language)
    assert await client.get("/") == ("miss", "none")
    assert await client.get("/") == ("hit", "none")
    assert await client.get("/", Accept_Language="en", X_Other="1") == ("miss", "en")


async def test_last_modified_of_one_variant_does_not_validate_another(client: Client) -> None:
    modified = http_date(-1000)

    def answer(request: web.Request) -> web.Response:
        headers = {"Vary": "Accept-Language", "Last-Modified": modified, "Cache-Control": "max-age=100", "Date": http_date()}
        if request.headers.get("If-Modified-Since") == modified:
            return web.Response(status=304, headers=headers)
        return web.Response(text=request.headers["Accept-Language"], headers=headers)

    client.origin.answers["/"] = answer
    assert await client.get("/", Accept_Language="en") == ("miss", "en")
    assert await client.get("/", Accept_Language="de") == ("miss", "de")


async def test_vary_star_is_not_stored(client: Client, store: AsyncKVStore) -> None:
    client.origin.says("/", Cache_Control="max-age=100", Vary="*")
    assert [(await client.get("/"))[0], (await client.get("/"))[0]] == ["miss", "miss"]
    assert await store.count() == 0


async def test_vary_that_changes_is_followed(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", "a", Cache_Control="max-age=10", Vary="A")
    assert [await client.get("/", A="1") for _ in range(2)] == [("miss", "a"), ("hit", "a")]
    client.origin.says("/", "b", Cache_Control="max-age=10", Vary="B")
    moved.advance(10)
    assert [await client.get("/", B="1") for _ in range(2)] == [("miss", "b"), ("hit", "b")]
    assert await client.get("/", A="2", B="1") == ("hit", "b")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_unsafe_request_that_succeeds_deletes_what_is_stored(client: Client, method: str) -> None:
    client.origin.says("/", Cache_Control="max-age=100", Vary="A")
    client.origin.says("/plain", Cache_Control="max-age=100")
    for path in ("/", "/plain"):
        await client.get(path, A="1")
        await client.get(path, "HEAD", A="1")
        assert (await client.get(path, method))[0] == "bypass"
        assert (await client.get(path, A="1"))[0] == "miss"
        assert (await client.get(path, "HEAD", A="1"))[0] == "miss"
    assert client.cache.info().invalidated == 2


async def test_unsafe_request_that_fails_deletes_nothing(client: Client) -> None:
    client.origin.says("/", Cache_Control="max-age=100")
    await client.get("/")
    client.origin.says("/", "refused", status=403)
    await client.get("/", "POST")
    assert (await client.get("/"))[0] == "hit"


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE"])
async def test_safe_request_of_another_method_deletes_nothing(client: Client, method: str) -> None:
    client.origin.says("/", Cache_Control="max-age=100")
    await client.get("/")
    await client.get("/", method)
    assert (await client.get("/"))[0] == "hit"


async def test_head_is_stored_apart_from_get(client: Client) -> None:
    client.origin.says("/", Cache_Control="max-age=100")
    assert [await client.get("/", "HEAD") for _ in range(2)] == [("miss", ""), ("hit", "")]
    assert await client.get("/") == ("miss", "hello")
    assert await client.get("/", "HEAD") == ("hit", "")


async def test_part_of_a_body_is_neither_stored_nor_cut_from_what_is(client: Client) -> None:
    def answer(request: web.Request) -> web.Response:
        is_part = "Range" in request.headers
        headers = {"Cache-Control": "max-age=100", "Date": http_date(), **({"Content-Range": "bytes 0-1/5"} if is_part else {})}
        return web.Response(text="he" if is_part else "hello", status=206 if is_part else 200, headers=headers)

    client.origin.answers["/"] = answer
    assert await client.get("/", Range="bytes=0-1") == ("miss", "he")
    assert await client.get("/") == ("miss", "hello")
    assert await client.get("/", Range="bytes=0-1") == ("miss", "he")
    assert await client.get("/") == ("hit", "hello")


async def test_stale_while_revalidate_serves_first_and_refreshes_behind(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", "old", Cache_Control="max-age=10, stale-while-revalidate=30", ETag='"1"')
    await client.get("/")
    moved.advance(39)
    refreshed = asyncio.Event()
    client.origin.says("/", "new", Cache_Control="max-age=10, stale-while-revalidate=30", ETag='"2"')
    inner = client.origin.answers["/"]

    def answer(request: web.Request) -> web.StreamResponse:
        refreshed.set()
        return inner(request)  # type: ignore[operator,return-value]

    client.origin.answers["/"] = answer
    response, text = await client.response("/")
    assert (outcome_of(response), text, response.headers["Age"]) == ("stale", "old", "39")
    async with asyncio.timeout(10):
        await refreshed.wait()
        while await client.get("/") != ("hit", "new"):
            await asyncio.sleep(0.01)
    assert client.origin.hits == 2
    moved.advance(40)
    assert (await client.get("/"))[0] == "revalidated"


async def test_refresh_that_fails_is_counted(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", "old", Cache_Control="max-age=10, stale-while-revalidate=30")
    await client.get("/")
    moved.advance(20)

    def drop(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    client.origin.answers["/"] = drop
    assert await client.get("/") == ("stale", "old")
    async with asyncio.timeout(10):
        while not client.cache.info().refresh_errors:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_stale_if_error_stands_in_for_server_errors(client: Client, moved: MovableClock, status: int) -> None:
    client.origin.says("/", Cache_Control="max-age=10, stale-if-error=30")
    await client.get("/")
    client.origin.says("/", "broken", status=status)
    moved.advance(39)
    assert await client.get("/") == ("stale", "hello")
    moved.advance(1)
    response, _ = await client.response("/")
    assert (response.status, outcome_of(response)) == (status, "miss")


@pytest.mark.parametrize("who", ["response", "request"])
async def test_stale_if_error_stands_in_for_a_lost_connection(client: Client, moved: MovableClock, who: str) -> None:
    allowed = {"response": (", stale-if-error=30", {}), "request": ("", {"Cache_Control": "stale-if-error=30"})}[who]
    client.origin.says("/", Cache_Control="max-age=10" + allowed[0], ETag='"1"')
    await client.get("/")
    moved.advance(20)

    def drop(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    client.origin.answers["/"] = drop
    assert await client.get("/", **allowed[1]) == ("stale", "hello")
    if who == "request":
        with pytest.raises(aiohttp.ClientError):
            await client.get("/")


@pytest.mark.parametrize("forbids", ["must-revalidate", "no-cache"])
async def test_response_that_forbids_it_is_never_served_stale(client: Client, moved: MovableClock, forbids: str) -> None:
    client.origin.says("/", Cache_Control=f"max-age=10, stale-if-error=30, stale-while-revalidate=30, {forbids}")
    await client.get("/")
    client.origin.says("/", "broken", status=503)
    moved.advance(20)
    assert await client.get("/") == ("miss", "broken")


async def test_cookies_are_not_stored(client: Client, store: AsyncKVStore) -> None:
    client.origin.says("/", Cache_Control="max-age=100", Set_Cookie="session=secret-of-ann; Path=/")
    response, _ = await client.response("/")
    assert response.cookies["session"].value == "secret-of-ann"
    response, _ = await client.response("/")
    assert (outcome_of(response), "Set-Cookie" in response.headers, len(response.cookies)) == ("hit", False, 0)
    assert "secret-of-ann" not in await contents_of(store)


@pytest.mark.parametrize("shared", [True, False])
async def test_neither_keys_nor_values_hold_secrets(store: AsyncKVStore, origin: Origin, *, shared: bool) -> None:
    origin.says("/", Cache_Control="max-age=100, public", Vary="Authorization, Cookie, X-Key", Set_Cookie="a=secret-5")
    async with client_of(store, origin, shared=shared) as client:
        sent = {"Authorization": "secret-1", "Cookie": "b=secret-2", "X_Key": "secret-3"}
        assert [(await client.get("/?token=secret-4", **sent))[0] for _ in range(2)] == ["miss", "hit"]
    assert await store.count() == 2
    assert "secret" not in await contents_of(store)


async def test_what_a_connection_header_names_is_not_stored(client: Client) -> None:
    client.origin.says("/", Cache_Control="max-age=100", Connection="X-Hop, keep-alive", X_Hop="1", X_End="2")
    await client.get("/")
    response, _ = await client.response("/")
    assert ("X-Hop" in response.headers, response.headers["X-End"]) == (False, "2")


async def test_errors_are_stored_where_the_origin_says_so(client: Client) -> None:
    client.origin.says("/gone", "gone", status=410, Cache_Control="max-age=100")
    assert [await client.get("/gone") for _ in range(2)] == [("miss", "gone"), ("hit", "gone")]


async def test_request_with_a_body_is_never_answered_from_the_store(client: Client) -> None:
    client.origin.says("/", Cache_Control="max-age=100")
    for _ in range(2):
        async with client.session.get(client.origin.base, data=b"query") as response:
            assert outcome_of(response) == "bypass"
    assert client.origin.hits == 2


async def test_counts_tell_what_has_happened(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", Cache_Control="max-age=10, stale-if-error=10", ETag='"1"')
    await client.get("/")
    await client.get("/")
    moved.advance(10)
    await client.get("/")
    moved.advance(10)
    client.origin.says("/", status=503)
    await client.get("/")
    await client.get("/", "POST")
    assert client.cache.info()._asdict() == {
        **dict.fromkeys(client.cache.info()._fields, 0),
        "hits": 1,
        "stale": 1,
        "revalidated": 1,
        "misses": 1,
        "bypassed": 1,
        "stored": 2,
    }


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"store": "http"}, TypeError, "store must be an AsyncKVStore, not str"),
        ({"max_body_bytes": -1}, ValueError, "max_body_bytes must be from 0"),
        ({"max_body_bytes": 2_000_000}, ValueError, "1,900,000"),
        ({"max_body_bytes": 1.5}, TypeError, "max_body_bytes must be int"),
        ({"revalidate_seconds": 31 * 86_400}, ValueError, "30 days"),
        ({"revalidate_seconds": True}, TypeError, "revalidate_seconds must be int"),
        ({"store_timeout": 0}, ValueError, "store_timeout must be above 0"),
        ({"store_timeout": "1"}, TypeError, "store_timeout must be a number"),
    ],
)
async def test_arguments_that_make_no_sense_are_refused(
    store: AsyncKVStore, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        caching(**{"store": store, **arguments})
