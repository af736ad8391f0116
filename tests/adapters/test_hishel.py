"""Storages of hishel over a store: what httpx and requests get through them, and what hishel asks of a storage."""

import contextlib
import logging
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from aiohttp import web

pytest.importorskip("hishel", reason="pip install 'aiokv[http-cache]'")

from hishel import Headers, Request, Response
from http_origin import Origin, contents_of, http_date

from aiokv import AsyncKVStore, clock
from aiokv.adapters.hishel import AsyncKVStorage, KVStorage
from aiokv.backends.memory import MemoryBackend
from aiokv.errors import UnavailableError
from aiokv.testing import MovableClock

KEY = "key-with-a-secret"


class Texts:
    """A store for code that does not await, in a dict; it fails while a test says so."""

    def __init__(self) -> None:
        self.texts: dict[str, tuple[str, float]] = {}
        self.fails = False

    def _pass(self) -> None:
        if self.fails:
            raise UnavailableError("down", verb="get", db_name="http", key="key")

    def get(self, key: str) -> str | None:
        self._pass()
        text, ends = self.texts.get(key, ("", 0.0))
        return text if clock.now() < ends else None

    def set(self, key: str, value: str, ttl: int | None = None) -> None:
        self._pass()
        assert ttl is not None
        assert 60 <= ttl <= 2_592_000
        self.texts[key] = (value, clock.now() + ttl)

    def delete(self, key: str) -> None:
        self._pass()
        self.texts.pop(key, None)


class Awaited:
    """The blocking storage with the methods of the other one, so that one set of tests tries both."""

    def __init__(self, storage: KVStorage) -> None:
        self._storage = storage

    async def create_entry(self, request: Request, response: Response, key: str, **limits: Any) -> Any:
        chunks = [chunk async for chunk in response.stream] if response.stream is not None else None  # type: ignore[union-attr]
        made = self._storage.create_entry(
            request, Response(response.status_code, response.headers, None if chunks is None else iter(chunks)), key, **limits
        )
        made.response.stream = as_async(made.response.stream)  # type: ignore[arg-type]
        return made

    async def get_entries(self, key: str) -> Any:
        found = self._storage.get_entries(key)
        for entry in found:
            entry.response.stream = as_async(entry.response.stream)  # type: ignore[arg-type]
        return found

    async def update_headers(self, entry_id: uuid.UUID, headers: Headers) -> None:
        self._storage.update_headers(entry_id, headers)

    async def remove_entry(self, entry_id: uuid.UUID) -> None:
        self._storage.remove_entry(entry_id)


async def as_async(chunks: Iterator[bytes]) -> AsyncGenerator[bytes]:
    for chunk in chunks:
        yield chunk


async def stream(*chunks: bytes) -> AsyncGenerator[bytes]:
    for chunk in chunks:
        yield chunk


def request(**headers: str) -> Request:
    return Request(
        "GET", "https://example.com/?token=1", Headers({name.replace("_", "-"): value for name, value in headers.items()})
    )


def response(*chunks: bytes, **headers: str | list[str]) -> Response:
    return Response(200, Headers({name.replace("_", "-"): value for name, value in headers.items()}), stream(*chunks))


async def read(entry: Any) -> bytes:
    return b"".join([chunk async for chunk in entry.response.stream])


async def bodies(storage: Any, key: str = KEY) -> list[bytes]:
    return [await read(entry) for entry in await storage.get_entries(key)]


@pytest.fixture(params=["async", "sync"])
def storage(request: pytest.FixtureRequest, store: AsyncKVStore) -> Any:
    """Both kinds."""
    return AsyncKVStorage(store) if request.param == "async" else Awaited(KVStorage(Texts()))


def made(kind: str, store: AsyncKVStore, **options: Any) -> Any:
    return AsyncKVStorage(store, **options) if kind == "async" else Awaited(KVStorage(Texts(), **options))


both = pytest.mark.parametrize("kind", ["async", "sync"])


@pytest.mark.parametrize("body", [b"", b"hello", bytes(range(256)), "é\N{GRINNING FACE}\n".encode(), b"\xff" * 100_000])
async def test_entry_is_there_once_its_body_has_been_read(storage: Any, body: bytes) -> None:
    entry = await storage.create_entry(request(), response(body[:3], body[3:], X_Two=["1", "2"]), KEY)
    assert await storage.get_entries(KEY) == []
    assert await read(entry) == body
    (found,) = await storage.get_entries(KEY)
    assert (found.id, found.request.method, found.request.url) == (entry.id, "GET", "https://example.com/?token=1")
    assert (found.response.status_code, found.response.headers.get_list("x-two")) == (200, ["1", "2"])
    assert await read(found) == body


async def test_body_that_is_not_read_to_its_end_is_not_stored(storage: Any) -> None:
    entry = await storage.create_entry(request(), response(b"a", b"b"), KEY)
    chunks = entry.response.stream
    assert await anext(chunks) == b"a"
    await chunks.aclose()
    assert await storage.get_entries(KEY) == []


async def test_body_that_breaks_off_is_not_stored(store: AsyncKVStore) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"a"
        raise ConnectionError

    storage = AsyncKVStorage(store)
    entry = await storage.create_entry(request(), Response(200, Headers({}), broken()), KEY)
    with pytest.raises(ConnectionError):
        await read(entry)
    assert await storage.get_entries(KEY) == []


@both
async def test_body_over_the_bound_is_given_and_not_stored(store: AsyncKVStore, kind: str) -> None:
    storage = made(kind, store, max_stream_size=10)
    entry = await storage.create_entry(request(), response(b"x" * 6, b"y" * 6), KEY)
    assert await read(entry) == b"x" * 6 + b"y" * 6
    assert await storage.get_entries(KEY) == []


async def test_body_over_a_values_limit_is_given_and_not_stored(store: AsyncKVStore) -> None:
    storage = AsyncKVStorage(store, max_stream_size=None)
    for body in (b"x" * 1_900_000, b"\xff" * 1_500_000, b"x" * 3_000_000):
        assert len(await read(await storage.create_entry(request(), response(body), KEY))) == len(body)
    assert await storage.get_entries(KEY) == []


async def test_entries_of_one_key_are_all_found(storage: Any) -> None:
    for language in (b"en", b"de"):
        await read(await storage.create_entry(request(Accept=language.decode()), response(language, Vary="Accept"), KEY))
    found = await storage.get_entries(KEY)
    assert [entry.request.headers["accept"] for entry in found] == ["en", "de"]
    assert await bodies(storage) == [b"en", b"de"]
    assert await storage.get_entries("another") == []


async def test_removed_entry_is_gone_and_the_others_stay(storage: Any) -> None:
    ids = []
    for body in (b"1", b"2"):
        entry = await storage.create_entry(request(), response(body), KEY)
        await read(entry)
        ids.append(entry.id)
    await storage.remove_entry(ids[0])
    await storage.remove_entry(uuid.uuid4())
    assert await bodies(storage) == [b"2"]


async def test_headers_can_be_replaced(storage: Any) -> None:
    entry = await storage.create_entry(request(), response(b"hello", ETag="1", X_Old="1"), KEY)
    await read(entry)
    await storage.update_headers(entry.id, Headers({"ETag": "2", "Set-Cookie": "secret"}))
    await storage.update_headers(uuid.uuid4(), Headers({}))
    (found,) = await storage.get_entries(KEY)
    assert dict(found.response.headers) == {"etag": "2", "vary": "host"}
    assert await read(found) == b"hello"


async def test_entry_whose_new_headers_depend_on_more_of_the_request_is_removed(storage: Any) -> None:
    entry = await storage.create_entry(request(Accept="a", Other="b"), response(b"hello", Vary="Accept"), KEY)
    await read(entry)
    await storage.update_headers(entry.id, Headers({"Vary": "Accept"}))
    assert await bodies(storage) == [b"hello"]
    await storage.update_headers(entry.id, Headers({"Vary": "Accept, Other"}))
    assert await bodies(storage) == []


@both
async def test_ttl_ends_an_entry_to_the_second(store: AsyncKVStore, moved: MovableClock, kind: str) -> None:
    storage = made(kind, store, default_ttl=100)
    await read(await storage.create_entry(request(), response(b"default"), KEY))
    await read(await storage.create_entry(request(), response(b"own"), KEY, ttl=5))
    moved.advance(4)
    assert await bodies(storage) == [b"default", b"own"]
    moved.advance(1)
    assert await bodies(storage) == [b"default"]
    moved.advance(95)
    assert await bodies(storage) == []


@both
async def test_ttl_counts_from_the_beginning_of_the_body(store: AsyncKVStore, moved: MovableClock, kind: str) -> None:
    storage = made(kind, store)
    entry = await storage.create_entry(request(), response(b"slow"), KEY, ttl=5)
    moved.advance(5)
    await read(entry)
    assert await bodies(storage) == []
    assert await store.count() == 0


@both
async def test_entry_without_limits_is_kept_for_30_days(store: AsyncKVStore, moved: MovableClock, kind: str) -> None:
    storage = made(kind, store)
    await read(await storage.create_entry(request(), response(b"hello"), KEY))
    moved.advance(29 * 86_400)
    assert await bodies(storage) == [b"hello"]
    moved.advance(86_400)
    assert await bodies(storage) == []


@both
async def test_tti_counts_from_the_last_read(store: AsyncKVStore, moved: MovableClock, kind: str) -> None:
    storage = made(kind, store, default_tti=100)
    await read(await storage.create_entry(request(), response(b"hello"), KEY, ttl=300))
    for _ in range(3):
        moved.advance(90)
        assert await bodies(storage) == [b"hello"]
    moved.advance(30)
    assert await bodies(storage) == []
    await read(await storage.create_entry(request(), response(b"again"), KEY))
    moved.advance(100)
    assert await bodies(storage) == []


@pytest.mark.parametrize("vary", ["Cookie", "Accept, Authorization", "*"])
async def test_response_that_depends_on_credentials_is_not_stored(storage: Any, vary: str) -> None:
    await read(await storage.create_entry(request(Cookie="secret", Authorization="secret"), response(b"x", Vary=vary), KEY))
    assert await storage.get_entries(KEY) == []


async def test_neither_keys_nor_values_hold_credentials(store: AsyncKVStore) -> None:
    storage = AsyncKVStorage(store)
    sent = request(Cookie="secret-1", Authorization="secret-2", X_Key="secret-3", Accept="shown")
    await read(await storage.create_entry(sent, response(b"x", Vary="Accept", Set_Cookie="secret-4"), KEY))
    contents = await contents_of(store)
    assert "shown" in contents
    assert "secret" not in contents


@pytest.mark.parametrize("text", ["", "[1]", "not ours", "{}"])
async def test_text_that_is_no_entry_counts_as_absent(store: AsyncKVStore, text: str) -> None:
    storage = AsyncKVStorage(store)
    for part in ("hishel-entry", "hishel-key"):
        await read(await storage.create_entry(request(), response(b"x"), KEY))
        assert await bodies(storage) == [b"x"]
        for key in [info.key async for info in store.keys(part)]:
            await store.set(key, text)
        assert await bodies(storage) == []


class Failing(MemoryBackend):
    """A memory that fails while a test says so."""

    fails = True

    async def get(self, db_name: str, key: str) -> str | None:
        if self.fails:
            raise UnavailableError("down", verb="get", db_name=db_name, key=key)
        return await super().get(db_name, key)

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        if self.fails:
            raise UnavailableError("down", verb="set", db_name=db_name, key=key)
        await super().set(db_name, key, value, ttl_seconds)


async def test_store_that_fails_is_logged_once_until_it_is_well(caplog: pytest.LogCaptureFixture) -> None:
    backend = Failing()
    async with AsyncKVStore("http", backend=backend) as store:
        storage = AsyncKVStorage(store)
        with caplog.at_level(logging.WARNING, "aiokv"):
            for _ in range(3):
                assert await read(await storage.create_entry(request(), response(b"x"), KEY)) == b"x"
                assert await storage.get_entries(KEY) == []
                await storage.update_headers(uuid.uuid4(), Headers({}))
            assert len(caplog.records) == 1
            backend.fails = False
            await bodies(storage)
            backend.fails = True
            await bodies(storage)
        assert len(caplog.records) == 2
    assert "secret" not in caplog.text


async def test_blocking_store_that_fails_fails_no_request() -> None:
    texts = Texts()
    texts.fails = True
    storage = Awaited(KVStorage(texts))
    assert await read(await storage.create_entry(request(), response(b"x"), KEY)) == b"x"
    assert await storage.get_entries(KEY) == []


async def test_wrong_kind_of_store_is_refused_with_the_right_one(store: AsyncKVStore) -> None:
    with pytest.raises(TypeError, match=r"KVStorage takes an aiokv\.KVStore"):
        AsyncKVStorage(Texts())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="AsyncKVStorage takes that"):
        KVStorage(store)  # type: ignore[arg-type]


async def test_httpx_is_served_from_the_store(store: AsyncKVStore, origin: Origin, moved: MovableClock) -> None:
    hishel_httpx = pytest.importorskip("hishel.httpx", reason="pip install httpx")
    origin.says("/", "hello", Cache_Control="max-age=10", ETag='"1"')
    async with hishel_httpx.AsyncCacheClient(storage=AsyncKVStorage(store), rfc=True) as client:

        async def get() -> tuple[str, bool, bool]:
            got = await client.get(origin.base + "/")
            status = got.extensions["caching"]
            return got.text, status["from_cache"], status["revalidated"]

        assert await get() == ("hello", False, False)
        assert await get() == ("hello", True, False)
        moved.advance(10)
        assert await get() == ("hello", True, True)
        assert await get() == ("hello", True, False)
        await client.post(origin.base + "/")
        assert await get() == ("hello", False, False)
    assert await store.count() > 0


async def test_compressed_body_reaches_httpx_decoded(store: AsyncKVStore, origin: Origin) -> None:
    hishel_httpx = pytest.importorskip("hishel.httpx", reason="pip install httpx")

    def answer(_: web.Request) -> web.Response:
        made = web.Response(text="hello" * 100, headers={"Cache-Control": "max-age=10", "Date": http_date()})
        made.enable_compression(web.ContentCoding.gzip)
        return made

    origin.answers["/"] = answer
    async with hishel_httpx.AsyncCacheClient(storage=AsyncKVStorage(store), rfc=True) as client:
        for _ in range(2):
            assert (await client.get(origin.base + "/")).text == "hello" * 100
    assert origin.hits == 1


def test_requests_is_served_from_a_blocking_store(tmp_path: Any) -> None:
    sync = pytest.importorskip("aiokv.sync", reason="KVStore is not there")
    hishel_requests = pytest.importorskip("hishel.requests", reason="pip install requests")
    requests = pytest.importorskip("requests")
    with blocking_origin() as (base, hits), sync.KVStore("http", url=f"sqlite:///{tmp_path}/kv.db") as store:
        with requests.Session() as session:
            session.mount("http://", hishel_requests.CacheAdapter(storage=KVStorage(store), rfc=True))
            for from_cache in ("false", "true"):
                got = session.get(base)
                assert (got.text, got.headers["X-Hishel-From-Cache"]) == ("hello", from_cache)
        assert len(hits) == 1


def test_requests_is_served_through_any_store_of_texts() -> None:
    hishel_requests = pytest.importorskip("hishel.requests", reason="pip install requests")
    requests = pytest.importorskip("requests")
    with blocking_origin() as (base, hits), requests.Session() as session:
        session.mount("http://", hishel_requests.CacheAdapter(storage=KVStorage(Texts()), rfc=True))
        assert [session.get(base).text for _ in range(2)] == ["hello"] * 2
        assert len(hits) == 1


@contextlib.contextmanager
def blocking_origin() -> Generator[tuple[str, list[str]]]:
    """Serve one text in a thread, for clients that block."""
    hits: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_response(200)
            self.send_header("Cache-Control", "max-age=100")
            self.send_header("Content-Length", "5")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", hits
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
