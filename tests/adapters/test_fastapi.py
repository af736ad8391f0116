"""A cache of responses: FastAPI apps over uvicorn, and ASGI applications that say what they send."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import pytest
from asgi_origin import Headers, Origin, ask
from helpers import still_clock

from aiokv import AsyncKVStore
from aiokv.adapters.fastapi import ResponseCache, _check_that_routes_handle_requests, cached_route


@pytest.fixture
async def store(tmp_path: Path) -> AsyncGenerator[AsyncKVStore]:
    async with AsyncKVStore("responses", url=f"sqlite:///{tmp_path}/kv.db") as store:
        yield store


async def test_second_request_is_served_with_its_age(store: AsyncKVStore) -> None:
    origin = Origin([("Content-Type", "text/plain"), ("Date", "today")], bodies=[b"3 ", "°C".encode()])
    cache = ResponseCache(origin, store=store, ttl=100)
    with still_clock() as clock:
        first = await ask(cache)
        clock.advance(99)
        second = await ask(cache)
        clock.advance(1)
        third = await ask(cache)
    assert [one.body for one in (first, second, third)] == ["3 °C".encode()] * 3
    assert [one.headers["x-call"] for one in (first, second, third)] == ["1", "1", "2"]
    assert ("age" not in first.headers, second.headers["age"], "age" not in third.headers) == (True, "99", True)
    assert (first.headers["cache-control"], second.headers["content-type"]) == ("max-age=100", "text/plain")
    assert first.headers["etag"] == second.headers["etag"]
    assert first.headers["etag"].startswith('W/"')


@pytest.mark.parametrize("body", [b"", b"\xff\0", bytes(range(256)), b"t\n"])
async def test_any_body_comes_back(store: AsyncKVStore, body: bytes) -> None:
    cache = ResponseCache(Origin(bodies=[body]), store=store)
    assert [(await ask(cache)).body for _ in range(2)] == [body] * 2


SHARED = [
    ([], 200),
    ([("Cache-Control", "public, max-age=5")], 200),
    ([("Cache-Control", "max-age=0, s-maxage=5")], 200),
    ([("Cache-Control", 'max-age="5"')], 404),
    ([("Vary", "Accept-Language")], 200),
    ([("Cache-Control", "max-age=9"), ("Age", "4")], 200),
]
NOT_SHARED = [
    ([("Cache-Control", "no-store")], 200),
    ([("Cache-Control", "max-age=60, PRIVATE")], 200),
    ([("Cache-Control", "max-age=60"), ("Cache-Control", "no-cache")], 200),
    ([("Cache-Control", "max-age=0")], 200),
    ([("Cache-Control", "max-age=9"), ("Age", "9")], 200),
    ([("Set-Cookie", "a=b")], 200),
    ([("Vary", "*")], 200),
    ([("Vary", "Accept-Language, Accept")], 200),
    ([("Content-Length", "2000")], 200),
    ([], 404),
    ([], 500),
    ([("Cache-Control", "max-age=60")], 500),
    ([("Cache-Control", "max-age=60")], 206),
]


@pytest.mark.parametrize(("headers", "status"), SHARED)
async def test_response_that_may_be_shared_is(store: AsyncKVStore, headers: Headers, status: int) -> None:
    origin = Origin(headers, status)
    cache = ResponseCache(origin, store=store, ttl=5, vary=["Accept-Language"])
    with still_clock() as clock:
        answers = [await ask(cache) for _ in range(2)]
        clock.advance(5)
        answers.append(await ask(cache))
    assert [one.headers["x-call"] for one in answers] == ["1", "1", "2"]
    assert {one.status for one in answers} == {status}


@pytest.mark.parametrize(("headers", "status"), NOT_SHARED)
async def test_response_that_must_not_be_shared_comes_as_it_is(store: AsyncKVStore, headers: Headers, status: int) -> None:
    origin = Origin(headers, status, [b"some", b"thing"])
    cache = ResponseCache(origin, store=store, vary=["accept-language"], max_body_bytes=1000)
    answers = [await ask(cache) for _ in range(2)]
    assert [(one.status, one.body, one.headers["x-call"]) for one in answers] == [
        (status, b"something", "1"),
        (status, b"something", "2"),
    ]
    assert "etag" not in answers[0].headers
    assert await store.count() == 0


@pytest.mark.parametrize("headers", [[("Authorization", "secret")], [("Cookie", "a=b")], [("Range", "bytes=0-1")]], ids=str)
async def test_personal_and_partial_requests_go_to_the_application(store: AsyncKVStore, headers: Headers) -> None:
    origin = Origin()
    cache = ResponseCache(origin, store=store)
    await ask(cache)
    assert [(await ask(cache, headers=headers)).headers["x-call"] for _ in range(2)] == ["2", "3"]
    assert dict(headers).items() <= origin.requests[-1].items()


@pytest.mark.parametrize("method", ["HEAD", "POST", "DELETE", "OPTIONS"])
async def test_other_methods_go_to_the_application(store: AsyncKVStore, method: str) -> None:
    cache = ResponseCache(Origin(), store=store)
    assert [(await ask(cache, method=method)).headers["x-call"] for _ in range(2)] == ["1", "2"]
    assert await store.count() == 0


async def test_each_user_has_responses_of_its_own_where_that_is_asked_for(store: AsyncKVStore) -> None:
    cache = ResponseCache(Origin(), store=store, vary=["Authorization"])
    users = [[("authorization", "one secret")], [("authorization", "other secret")], []]
    calls = [(await ask(cache, headers=user)).headers["x-call"] for user in users * 2]
    assert calls == ["1", "2", "3", "1", "2", "3"]
    listing = store.keys()
    async for info in listing:
        assert "secret" not in info.key + str(await store.get(info.key))


async def test_ignored_cookies_never_reach_the_application(store: AsyncKVStore) -> None:
    origin = Origin()
    cache = ResponseCache(origin, store=store, ignore=["cookie"])
    calls = [(await ask(cache, headers=[("Cookie", f"a={number}")])).headers["x-call"] for number in range(2)]
    assert calls == ["1", "1"]
    assert "cookie" not in {name.lower() for name in origin.requests[0]}


@pytest.mark.parametrize(
    "path", ["/a", "/a?", "/a?x=1", "/a?x=2", "/b", "/a/"], ids=["path", "no query", "query", "other", "other path", "slash"]
)
async def test_urls_are_apart(store: AsyncKVStore, path: str) -> None:
    cache = ResponseCache(Origin(), store=store)
    await ask(cache, "/a")
    expected = "1" if path in {"/a", "/a?"} else "2"
    assert (await ask(cache, path)).headers["x-call"] == expected


async def test_chosen_headers_are_apart_and_named_in_vary(store: AsyncKVStore) -> None:
    cache = ResponseCache(Origin([("Vary", "Origin")]), store=store, vary=["Accept-Language", "Origin"])
    answers = [await ask(cache, headers=[("Accept-Language", language)]) for language in ("en", "de", "en")]
    assert [one.headers["x-call"] for one in answers] == ["1", "2", "1"]
    assert [value.decode() for name, value in answers[2].messages[0]["headers"] if name == b"vary"] == [
        "Origin",
        "accept-language",
    ]


@pytest.mark.parametrize(
    ("offered", "status"),
    [('"v1"', 304), ('W/"v1"', 304), ('"v0", "v1"', 304), ("*", 304), ('"v0"', 200), ("v1", 200), ("", 200)],
)
async def test_client_that_has_the_response_gets_304(store: AsyncKVStore, offered: str, status: int) -> None:
    origin = Origin([("ETag", '"v1"'), ("Content-Type", "text/plain"), ("Content-Length", "4")])
    cache = ResponseCache(origin, store=store)
    for is_stored in (False, True):
        answer = await ask(cache, headers=[("If-None-Match", offered), ("If-Modified-Since", "now")])
        assert (answer.status, answer.body, answer.headers["etag"]) == (status, b"" if status == 304 else b"body", '"v1"')
        assert ("content-type" in answer.headers, "content-length" in answer.headers) == (status == 200, status == 200)
        assert ("age" in answer.headers) is is_stored
    # The application made a whole response, whatever this client had.
    assert [{"if-none-match", "if-modified-since"} & {name.lower() for name in one} for one in origin.requests] == [set()]


async def test_equal_requests_at_once_make_one_call(store: AsyncKVStore) -> None:
    origin = Origin()
    origin.gate = asyncio.Event()
    cache = ResponseCache(origin, store=store)
    asked = [asyncio.create_task(ask(cache)) for _ in range(20)]
    await asyncio.sleep(0.05)
    origin.gate.set()
    answers = await asyncio.gather(*asked)
    assert (len(origin.requests), {one.body for one in answers}) == (1, {b"body"})


async def test_those_who_waited_for_what_is_not_theirs_get_their_own(store: AsyncKVStore) -> None:
    origin = Origin([("Set-Cookie", "session=1")])
    origin.gate = asyncio.Event()
    cache = ResponseCache(origin, store=store)
    asked = [asyncio.create_task(ask(cache)) for _ in range(5)]
    await asyncio.sleep(0.05)
    origin.gate.set()
    answers = await asyncio.gather(*asked)
    assert sorted(one.headers["x-call"] for one in answers) == ["1", "2", "3", "4", "5"]


async def test_long_body_is_passed_on_as_it_comes(store: AsyncKVStore) -> None:
    origin = Origin(bodies=[b"x" * 600, b"y" * 600, b"z" * 600])
    answer = await ask(ResponseCache(origin, store=store, max_body_bytes=1000))
    assert [len(one["body"]) for one in answer.messages[1:]] == [1200, 600]
    assert await store.count() == 0
    exact = ResponseCache(Origin(bodies=[b"x" * 500, b"y" * 500]), store=store, max_body_bytes=1000)
    assert [(await ask(exact, "/exact")).headers["x-call"] for _ in range(2)] == ["1", "1"]


async def test_body_beyond_the_store_is_served_and_not_stored(store: AsyncKVStore) -> None:
    cache = ResponseCache(Origin(bodies=[b"\xff" * 1_900_000]), store=store, max_body_bytes=2_000_000)
    assert [((await ask(cache)).headers["x-call"], await store.count()) for _ in range(2)] == [("1", 0), ("2", 0)]


async def test_response_goes_out_before_what_follows_it(store: AsyncKVStore) -> None:
    order: list[str] = []
    origin = Origin()

    sent = asyncio.Event()

    async def background() -> None:
        async with asyncio.timeout(10):
            await sent.wait()
        order.append("background")

    origin.after = background
    cache = ResponseCache(origin, store=store)

    async def send(message: Any) -> None:
        order.append(message["type"])
        if message["type"] == "http.response.body":
            sent.set()

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    await cache(scope, None, send)  # type: ignore[arg-type]
    assert order == ["http.response.start", "http.response.body", "background"]
    await cache(scope, None, send)  # type: ignore[arg-type]
    assert order[3:] == ["http.response.start", "http.response.body"]


async def test_failing_application_fails_each_caller_and_is_asked_again(store: AsyncKVStore) -> None:
    calls = 0

    async def app(*_: object) -> None:
        nonlocal calls
        calls += 1
        raise ZeroDivisionError

    cache = ResponseCache(app, store=store)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await ask(cache)
    assert calls == 2


async def test_caller_that_leaves_alone_cancels_the_application(store: AsyncKVStore) -> None:
    origin = Origin()
    origin.gate = asyncio.Event()
    cache = ResponseCache(origin, store=store)
    first, second = asyncio.create_task(ask(cache)), asyncio.create_task(ask(cache))
    await asyncio.sleep(0.05)
    first.cancel()
    await asyncio.wait([first])
    origin.gate.set()
    assert ((await second).body, len(origin.requests)) == (b"body", 1)
    origin.gate.clear()
    third = asyncio.create_task(ask(cache, "/other"))
    await asyncio.sleep(0.05)
    third.cancel()
    await asyncio.wait([third])
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "aiokv response"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_stale_response_is_served_while_it_is_made_anew(store: AsyncKVStore) -> None:
    origin = Origin()
    cache = ResponseCache(origin, store=store, ttl=10, stale_while_revalidate=60)
    with still_clock() as clock:
        await ask(cache)
        clock.advance(20)
        stale = await ask(cache)
        assert (stale.headers["x-call"], stale.headers["age"]) == ("1", "20")
        await until(lambda: cache.responses.info().computations == 2)
        await asyncio.sleep(0.05)
        assert (await ask(cache)).headers["x-call"] == "2"


async def test_response_made_behind_a_caller_that_must_not_be_shared_is_dropped(
    store: AsyncKVStore, caplog: pytest.LogCaptureFixture
) -> None:
    origin = Origin()
    cache = ResponseCache(origin, store=store, ttl=10, stale_while_revalidate=60)
    with still_clock() as clock:
        await ask(cache)
        clock.advance(20)
        origin.headers = [("Set-Cookie", "a=b")]
        stale = await ask(cache)
        await until(lambda: len(origin.requests) == 2)
        await asyncio.sleep(0.05)
    assert (stale.headers["x-call"], len(stale.messages), "set-cookie" in stale.headers) == ("1", 2, False)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "aiokv response"]


async def test_failing_store_means_that_the_application_is_called() -> None:
    origin = Origin()
    cache = ResponseCache(origin, store=AsyncKVStore("db", url="sqlite:////nowhere/at/all/kv.db"))
    assert [(await ask(cache)).body for _ in range(2)] == [b"body"] * 2
    assert len(origin.requests) == 2


async def test_another_version_begins_anew(store: AsyncKVStore) -> None:
    calls = [(await ask(ResponseCache(Origin(bodies=[v.encode()]), store=store, version=v))).body for v in ("1", "2")]
    assert calls == [b"1", b"2"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ttl": 0}, ValueError, "ttl must be from 1"),
        ({"ttl": "60"}, TypeError, "ttl must be seconds"),
        ({"vary": "accept"}, TypeError, "vary must be a list"),
        ({"ignore": ["accept"]}, ValueError, "not 'accept'"),
        ({"max_body_bytes": -1}, ValueError, "max_body_bytes must be"),
        ({"store": {}}, TypeError, "store must be an AsyncKVStore"),
    ],
    ids=lambda given: str(given) if isinstance(given, dict) else "",
)
def test_options_are_checked_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ResponseCache(Origin(), **options)
    pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'aiokv[fastapi]'")
    with pytest.raises(error, match=message):
        cached_route(**options)


@asynccontextmanager
async def serving(app: Any) -> AsyncGenerator[str]:
    """Serve an app by uvicorn in this process; give its URL."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"))
    running = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running


def fastapi_app(store: AsyncKVStore, calls: list[str], **options: Any) -> Any:
    fastapi = pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'aiokv[fastapi]'")
    responses = pytest.importorskip("fastapi.responses")
    anyio = pytest.importorskip("anyio")
    closed: list[str] = []

    async def session() -> AsyncGenerator[list[str]]:
        # It refuses to be left in another task than that in which it was entered.
        with anyio.CancelScope():
            yield closed
        closed.append("closed")

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncGenerator[None]:
        async with store:
            yield

    app = fastapi.FastAPI(lifespan=lifespan)
    router = fastapi.APIRouter(route_class=cached_route(store, ttl=60, **options))

    @router.get("/forecast/{city}")
    async def forecast(city: str, held: Annotated[Any, fastapi.Depends(session)]) -> dict[str, Any]:
        calls.append(city)
        return {"city": city, "closed": len(held)}

    @router.get("/stream")
    async def stream() -> Any:
        async def chunks() -> AsyncGenerator[bytes]:
            calls.append("stream")
            for number in range(3):
                yield str(number).encode()

        return responses.StreamingResponse(chunks(), media_type="text/plain")

    @router.get("/missing")
    async def missing() -> None:
        calls.append("missing")
        raise fastapi.HTTPException(404)

    @router.post("/forecast/{city}")
    async def post(city: str) -> str:
        calls.append(f"post {city}")
        return city

    @app.get("/plain")
    async def plain() -> str:
        calls.append("plain")
        return "plain"

    app.include_router(router, prefix="/v1")
    return app


async def test_routes_of_a_fastapi_app_are_cached_over_uvicorn(store: AsyncKVStore) -> None:
    calls: list[str] = []
    async with (
        serving(fastapi_app(store, calls)) as url,
        aiohttp.ClientSession(url, cookie_jar=aiohttp.DummyCookieJar()) as session,
    ):

        async def get(path: str, **headers: str) -> tuple[int, str, Any]:
            async with session.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()}) as answer:
                return answer.status, await answer.text(), answer.headers

        first, second = await get("/v1/forecast/oslo"), await get("/v1/forecast/oslo")
        assert first[:2] == second[:2] == (200, '{"city":"oslo","closed":0}')
        assert (second[2]["Age"], second[2]["Cache-Control"], second[2]["Content-Type"]) == (
            "0",
            "max-age=60",
            "application/json",
        )
        assert len(second[2].getall("Date")) == 1
        unchanged = await get("/v1/forecast/oslo", If_None_Match=second[2]["ETag"])
        assert unchanged[:2] == (304, "")
        assert (await get("/v1/forecast/rom"))[1] == '{"city":"rom","closed":1}'
        assert [(await get("/v1/stream"))[1] for _ in range(2)] == ["012"] * 2
        assert [(await get("/v1/missing"))[0] for _ in range(2)] == [404] * 2
        assert (await get("/v1/forecast/oslo", Authorization="Bearer x"))[1] == '{"city":"oslo","closed":2}'
        async with session.post("/v1/forecast/oslo") as posted:
            assert posted.status == 200
        assert [(await get("/plain"))[1] for _ in range(2)] == ['"plain"'] * 2
        await asyncio.gather(*(get("/v1/forecast/bergen") for _ in range(10)))
    assert calls == ["oslo", "rom", "stream", "missing", "missing", "oslo", "post oslo", "plain", "plain", "bergen"]


async def test_two_workers_share_responses(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/kv.db"
    calls: list[str] = []
    answers = []
    for _ in range(2):
        app = fastapi_app(AsyncKVStore("responses", url=url), calls)
        # The host is a part of the key, and over sockets each worker here would have a port of its own.
        answers.append(await ask(app, "/v1/forecast/oslo"))
    assert [one.status for one in answers] == [200, 200]
    assert (calls, "age" in answers[1].headers) == (["oslo"], True)


async def test_route_of_a_router_in_a_router_is_made_anew_behind_its_caller(store: AsyncKVStore) -> None:
    fastapi = pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'aiokv[fastapi]'")
    inner = fastapi.APIRouter(route_class=cached_route(store, ttl=10, stale_while_revalidate=60, ignore=["cookie"]))
    outer, app = fastapi.APIRouter(), fastapi.FastAPI()
    assert inner.route_class.cache.responses.info().computations == 0
    cookies: list[str | None] = []

    async def depend(request: fastapi.Request) -> None:
        cookies.append(request.headers.get("cookie"))

    @inner.get("/news/{page}")
    async def news(page: int) -> int:
        return page * len(cookies)

    @inner.post("/post")
    async def post() -> int:
        return len(cookies)

    outer.include_router(inner, prefix="/inner")
    app.include_router(outer, prefix="/outer", dependencies=[fastapi.Depends(depend)])
    path = "/outer/inner/news/7"
    with still_clock() as clock:
        assert [(await ask(app, path, [("Cookie", "a=b")])).body for _ in range(2)] == [b"7", b"7"]
        clock.advance(20)
        assert (await ask(app, path)).body == b"7"
        await until(lambda: len(cookies) == 2)
        await asyncio.sleep(0.05)
        assert (await ask(app, path)).body == b"14"
    assert cookies == [None, None]
    assert inner.route_class.cache.responses.info().computations == 2
    assert [(await ask(app, "/outer/inner/post", method=method)).status for method in ("GET", "POST")] == [405, 200]


def test_a_fastapi_that_does_not_ask_the_class_of_a_route_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    routing = pytest.importorskip("fastapi.routing", reason="fastapi is not installed: pip install 'aiokv[fastapi]'")

    def initialize(route: Any, *args: Any, **kwargs: Any) -> None:
        initialize_route(route, *args, **kwargs)
        route.handle = route.app

    initialize_route = routing.APIRoute.__init__
    _check_that_routes_handle_requests.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(routing.APIRoute, "__init__", initialize)
        with pytest.raises(RuntimeError, match="use the middleware ResponseCache"):
            cached_route()
    cached_route()


async def test_middleware_over_a_whole_app_serves_it_too(store: AsyncKVStore) -> None:
    fastapi = pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'aiokv[fastapi]'")
    gzip = pytest.importorskip("fastapi.middleware.gzip")
    app = fastapi.FastAPI()
    calls: list[str] = []

    @app.get("/")
    def index(response: fastapi.Response) -> str:
        calls.append("index")
        response.headers["Cache-Control"] = "public, max-age=120"
        return "x" * 5000

    app.add_middleware(ResponseCache, store=store)
    app.add_middleware(gzip.GZipMiddleware)
    async with serving(app) as url, aiohttp.ClientSession(url) as session:
        for _ in range(2):
            async with session.get("/") as answer:
                assert (await answer.json(), answer.headers["Cache-Control"]) == ("x" * 5000, "public, max-age=120")
                assert answer.headers["Content-Encoding"] == "gzip"
    assert calls == ["index"]
