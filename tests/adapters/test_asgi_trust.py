"""A cache of responses serves nobody what is another's, and nothing stale that must not be."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from asgi_origin import Headers, Origin, ask
from helpers import still_clock

from aiokv import AsyncKVStore
from aiokv.adapters.fastapi import ResponseCache, cached_route

App = Callable[[Any, Any, Any], Awaitable[None]]


async def call_of(app: App, headers: Headers = (), path: str = "/") -> str:
    """Return the number of the origin's call that made a response."""
    return (await ask(app, path, headers)).headers["x-call"]


async def test_values_of_other_headers_are_not_taken_for_those_of_the_chosen_ones(store: AsyncKVStore) -> None:
    origin = Origin()
    caches = [ResponseCache(origin, store=store, vary=vary) for vary in (["x-lang"], ["x-tenant"])]
    assert [await call_of(cache, [("X-Lang", "de")]) for cache in caches] == ["1", "2"]
    assert await call_of(caches[1], [("X-Tenant", "de")]) == "3"


async def test_order_and_case_of_chosen_headers_do_not_matter(store: AsyncKVStore) -> None:
    origin = Origin()
    caches = [ResponseCache(origin, store=store, vary=vary) for vary in (["X-User", "x-lang"], ["X-Lang", "x-user"])]
    assert await call_of(caches[0], [("X-User", "de"), ("X-Lang", "en")]) == "1"
    assert await call_of(caches[1], [("X-User", "en"), ("X-Lang", "de")]) == "2"
    assert await call_of(caches[1], [("X-User", "de"), ("X-Lang", "en")]) == "1"


async def test_header_that_comes_twice_counts_whole(store: AsyncKVStore) -> None:
    cache = ResponseCache(Origin([("ETag", '"v1"')]), store=store)
    answer = await ask(cache, headers=[("If-None-Match", '"v1"'), ("If-None-Match", '"v0"')])
    assert answer.status == 304
    assert await call_of(cache, [("Host", "other.example")]) == "2"


def seen_by_endpoint(store: AsyncKVStore, look: Callable[[Any], Any], **options: Any) -> App:
    """Return a FastAPI app whose cached endpoint says what it sees of a request."""
    fastapi = pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'aiokv[fastapi]'")
    router = fastapi.APIRouter(route_class=cached_route(store, **options))

    async def endpoint(request: Any) -> Any:
        return look(request)

    endpoint.__annotations__["request"] = fastapi.Request
    router.get("/")(endpoint)
    app: Any = fastapi.FastAPI()
    app.include_router(router)
    return app  # type: ignore[no-any-return]


async def test_names_may_come_from_an_iterator(store: AsyncKVStore) -> None:
    app = seen_by_endpoint(store, lambda request: request.headers["x-user"], vary=iter(["x-user"]))
    assert [(await ask(app, headers=[("x-user", user)])).body for user in "ab"] == [b'"a"', b'"b"']


class User:
    def __init__(self, name: str) -> None:
        self.name = name
        self.is_authenticated = bool(name)


def inside(app: App, header: str = "cookie", make: Callable[[str], dict[str, Any]] | None = None) -> App:
    """Put a middleware around an app that makes a user or a session of a header."""

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        name = dict(scope["headers"]).get(header.encode(), b"").decode()
        made = {"session": {"user": name} if name else {}} if make is None else make(name)
        await app({**scope, **made}, receive, send)

    return middleware


@pytest.mark.parametrize("what", ["session", "user", "auth"])
async def test_what_a_middleware_makes_of_an_ignored_header_is_hidden(store: AsyncKVStore, what: str) -> None:
    app = seen_by_endpoint(store, lambda request: what in request.scope, ignore=["cookie"])
    outside = inside(app, make=lambda name: {what: User(name)})
    assert (await ask(outside, headers=[("cookie", "alice")])).body == b"false"


async def test_endpoint_that_wants_the_session_of_an_ignored_cookie_fails(store: AsyncKVStore) -> None:
    seen = seen_by_endpoint(store, lambda request: request.session["user"], ignore=["cookie"])
    with pytest.raises(AssertionError, match="SessionMiddleware must be installed"):
        await ask(inside(seen), headers=[("cookie", "alice")])


async def test_session_that_the_endpoint_has_begun_is_for_its_client_alone(store: AsyncKVStore) -> None:
    tokens = iter(["one", "two"])
    app = inside(seen_by_endpoint(store, lambda request: request.session.setdefault("csrf", next(tokens))))
    answers = [await ask(app) for _ in range(2)]
    assert [(one.body, "cache-control" in one.headers) for one in answers] == [(b'"one"', False), (b'"two"', False)]
    assert await store.count() == 0


async def test_session_that_changes_while_the_body_is_sent_is_for_its_client_alone(store: AsyncKVStore) -> None:
    calls = 0

    async def app(scope: Any, _: Any, send: Any) -> None:
        nonlocal calls
        calls += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        scope["session"].setdefault("seen", []).append(calls)
        await send({"type": "http.response.body", "body": str(calls).encode()})

    cache = inside(ResponseCache(app, store=store))
    assert [(await ask(cache)).body for _ in range(2)] == [b"1", b"2"]


async def test_session_that_nobody_has_touched_keeps_nothing_from_the_cache(store: AsyncKVStore) -> None:
    app = inside(ResponseCache(Origin(), store=store))
    assert [await call_of(app) for _ in range(2)] == ["1", "1"]


MADE: list[Callable[[str], dict[str, Any]]] = [
    lambda name: {"user": User(name)},
    lambda name: {"user": name or None},
    lambda name: {"session": {"user": name} if name else {}},
]


@pytest.mark.parametrize("make", MADE)
async def test_user_of_a_middleware_outside_gets_responses_of_the_endpoint(
    store: AsyncKVStore, make: Callable[[str], dict[str, Any]]
) -> None:
    app = inside(ResponseCache(Origin(), store=store, vary=["cookie"]), "x-api-key", make)
    users: list[Headers] = [[], [("x-api-key", "alice")], [("x-api-key", "bob")], []]
    assert [await call_of(app, user) for user in users] == ["1", "2", "3", "1"]


@pytest.mark.parametrize("make", MADE)
async def test_user_whose_header_is_chosen_has_responses_of_its_own(
    store: AsyncKVStore, make: Callable[[str], dict[str, Any]]
) -> None:
    app = inside(ResponseCache(Origin(), store=store, vary=["cookie"]), "cookie", make)
    users: list[Headers] = [[("cookie", "alice")], [("cookie", "bob")]]
    assert [await call_of(app, user) for user in users * 2] == ["1", "2", "1", "2"]


async def until_idle() -> None:
    async with asyncio.timeout(5):
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("headers", "status"),
    [([], 404), ([("Cache-Control", "no-store")], 200), ([("Cache-Control", "private")], 200), ([("Set-Cookie", "a=b")], 200)],
)
async def test_remake_that_must_not_be_stored_ends_the_old_response(store: AsyncKVStore, headers: Headers, status: int) -> None:
    origin = Origin()
    cache = ResponseCache(origin, store=store, ttl=10, stale_while_revalidate=600)
    with still_clock() as clock:
        await ask(cache)
        clock.advance(20)
        origin.headers, origin.status = list(headers), status
        assert await call_of(cache) == "1"
        await until_idle()
        assert await store.count() == 0
        answer = await ask(cache)
    assert (answer.status, answer.headers["x-call"]) == (status, "3")


async def test_remake_that_fails_is_not_tried_for_each_request(store: AsyncKVStore) -> None:
    origin = Origin()
    cache = ResponseCache(origin, store=store, ttl=10, stale_while_revalidate=600)
    with still_clock() as clock:
        await ask(cache)
        clock.advance(20)
        origin.status = 503
        for _ in range(4):
            assert await call_of(cache) == "1"
            await until_idle()
    assert len(origin.requests) == 2


async def test_caller_that_joins_a_remake_that_fails_gets_the_answer_of_the_application(store: AsyncKVStore) -> None:
    origin = Origin()
    cache = ResponseCache(origin, store=store, ttl=10, stale_while_revalidate=60)
    with still_clock() as clock:
        await ask(cache)
        clock.advance(20)
        origin.status, origin.gate = 503, asyncio.Event()
        assert await call_of(cache) == "1"
        await asyncio.sleep(0.05)
        # The older response may not be served any more, and the remake is still under way.
        clock.advance(60)
        late = asyncio.create_task(ask(cache))
        await asyncio.sleep(0.05)
        origin.gate.set()
        assert (await late).status == 503


async def test_session_that_a_middleware_inside_opens_and_nobody_uses_is_no_users(store: AsyncKVStore) -> None:
    origin = Origin()

    async def with_session(scope: Any, receive: Any, send: Any) -> None:
        scope["session"] = {}
        await origin(scope, receive, send)

    cache = ResponseCache(with_session, store=store)
    assert [await call_of(cache) for _ in range(2)] == ["1", "1"]


async def test_caller_that_leaves_does_not_fail_those_who_wait_for_its_response(store: AsyncKVStore) -> None:
    origin = Origin(status=503)
    origin.gate = asyncio.Event()
    cache = ResponseCache(origin, store=store, stale_while_revalidate=600)
    leader, other = asyncio.create_task(ask(cache)), asyncio.create_task(ask(cache))
    await asyncio.sleep(0.05)
    leader.cancel()
    await asyncio.wait([leader])
    origin.gate.set()
    assert (await other).status == 503


@pytest.mark.parametrize(
    "control", ["must-revalidate", "proxy-revalidate", "s-maxage=10", "stale-while-revalidate=0", "stale-while-revalidate=5"]
)
async def test_response_that_forbids_it_is_not_served_stale(store: AsyncKVStore, control: str) -> None:
    origin = Origin([("Cache-Control", f"max-age=10, {control}")])
    cache = ResponseCache(origin, store=store, stale_while_revalidate=600)
    with still_clock() as clock:
        await ask(cache)
        clock.advance(20)
        origin.gate = asyncio.Event()
        asked = [asyncio.create_task(call_of(cache)) for _ in range(5)]
        await asyncio.sleep(0.05)
        origin.gate.set()
        assert await asyncio.gather(*asked) == ["2"] * 5
        clock.advance(9)
        assert await call_of(cache) == "2"
        clock.advance(20)
        origin.headers = [("Cache-Control", "no-store")]
        assert await call_of(cache) == "3"
        await until_idle()
        assert await store.count() == 0
    assert len(origin.requests) == 3


async def test_response_is_served_stale_within_the_window_that_it_names(store: AsyncKVStore) -> None:
    origin = Origin([("Cache-Control", "max-age=10, stale-while-revalidate=100")])
    cache = ResponseCache(origin, store=store, stale_while_revalidate=600)
    with still_clock() as clock:
        await ask(cache)
        clock.advance(20)
        assert await call_of(cache) == "1"
        await until_idle()


@pytest.mark.parametrize("age", ["100", "9223372036854775808", "1000000000000000000000000", "9" * 5000])
async def test_response_that_is_too_old_on_arrival_is_not_stored(store: AsyncKVStore, age: str) -> None:
    cache = ResponseCache(Origin([("Cache-Control", "max-age=60"), ("Age", age)]), store=store)
    assert [await call_of(cache) for _ in range(2)] == ["1", "2"]
