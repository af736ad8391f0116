"""Storages of hishel never serve what another host has sent, what was to be deleted, or what contradicts itself."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

pytest.importorskip("hishel", reason="pip install 'aiokv[http-cache]'")

from hishel import Headers, Request, Response
from http_origin import Origin, http_date

from aiokv import AsyncKVStore
from aiokv.adapters.hishel import AsyncKVStorage, KVStorage
from aiokv.backends.memory import MemoryBackend
from aiokv.errors import UnavailableError
from aiokv.testing import MovableClock

hishel_httpx = pytest.importorskip("hishel.httpx", reason="pip install httpx")

Get = Callable[..., Awaitable[tuple[str, bool]]]


class Failing(MemoryBackend):
    """A memory of which some calls fail while a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: set[str] = set()

    def _pass(self, verb: str) -> None:
        if verb in self.fails:
            raise UnavailableError("down", verb=verb, db_name="http", key="key")

    async def get(self, db_name: str, key: str) -> str | None:
        self._pass("get")
        return await super().get(db_name, key)

    async def delete(self, db_name: str, key: str) -> None:
        self._pass("delete")
        await super().delete(db_name, key)


def getter(client: Any, origin: Origin) -> Get:
    async def get(method: str = "GET", **headers: str) -> tuple[str, bool]:
        got = await client.request(method, origin.base + "/", headers=headers)
        return got.text, bool(got.extensions.get("caching", {}).get("from_cache"))

    return get


async def test_another_host_at_the_same_address_has_responses_of_its_own(store: AsyncKVStore, origin: Origin) -> None:
    origin.answers["/"] = lambda request: web.Response(
        text=request.host, headers={"Cache-Control": "max-age=100", "Date": http_date()}
    )
    async with hishel_httpx.AsyncCacheClient(storage=AsyncKVStorage(store), rfc=True) as client:
        get = getter(client, origin)
        assert await get(Host="a.example") == ("a.example", False)
        assert await get(Host="b.example") == ("b.example", False)
        assert await get(Host="a.example") == ("a.example", True)
        assert (await get())[1] is False


async def test_response_to_a_url_with_a_password_is_not_stored(store: AsyncKVStore, origin: Origin) -> None:
    origin.says("/", Cache_Control="public, max-age=100")
    async with hishel_httpx.AsyncCacheClient(storage=AsyncKVStorage(store), rfc=True) as client:
        for _ in range(2):
            got = await client.get(origin.base.replace("//", "//joe:secret@") + "/")
            assert (got.text, got.extensions["caching"]["from_cache"]) == ("hello", False)
        assert await store.count() == 0
        for is_stored in (False, True):
            got = await client.get(f"{origin.base}/?mail=a@b")
            assert got.extensions["caching"]["from_cache"] is is_stored


async def test_requests_with_keys_of_their_own_are_apart(store: AsyncKVStore, origin: Origin) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=await request.text(), headers={"Cache-Control": "max-age=100", "Date": http_date()})

    origin.answers["/"] = answer
    async with hishel_httpx.AsyncCacheClient(storage=AsyncKVStorage(store), rfc=True) as client:
        for body in ("one", "two", "one"):
            got = await client.request("GET", origin.base, content=body, extensions={"caching": {"key": f"key of {body}"}})
            assert got.text == body
    assert got.extensions["caching"]["from_cache"] is True


@pytest.mark.parametrize("verb", ["delete", "get"])
async def test_change_while_the_store_fails_does_not_bring_the_old_back(
    origin: Origin, caplog: pytest.LogCaptureFixture, verb: str
) -> None:
    backend = Failing()
    origin.says("/", "old", Cache_Control="max-age=600")
    async with (
        AsyncKVStore("http", backend=backend) as store,
        hishel_httpx.AsyncCacheClient(storage=AsyncKVStorage(store), rfc=True) as client,
    ):
        get = getter(client, origin)
        await get()
        assert await get() == ("old", True)
        origin.says("/", "new", Cache_Control="max-age=600")
        backend.fails = {verb}
        with caplog.at_level(logging.WARNING, "aiokv"):
            await get("POST")
            # While it fails, and once it is well.
            assert await get() == ("new", False)
        backend.fails = set()
        assert (await get())[0] == "new"
        assert await get() == ("new", True)
    assert len([record for record in caplog.records if record.name == "aiokv"]) == 1


async def test_delete_that_failed_is_made_up_for(origin: Origin) -> None:
    backend = Failing()
    origin.says("/", "old", Cache_Control="max-age=600")
    async with (
        AsyncKVStore("http", backend=backend) as store,
        hishel_httpx.AsyncCacheClient(storage=AsyncKVStorage(store), rfc=True) as client,
    ):
        get = getter(client, origin)
        await get()
        backend.fails = {"delete"}
        await get("POST")
        backend.fails = set()
        origin.says("/", "new", Cache_Control="max-age=600")
        assert await get() == ("new", False)
        assert await get() == ("new", True)
        texts = [await store.get(info.key) for info in [info async for info in store.keys("hishel-entry")]]
        assert ["old" in (text or "") for text in texts] == [False]


def test_blocking_storage_remembers_what_it_could_not_delete() -> None:
    texts: dict[str, str] = {}
    is_down = False

    class Texts:
        def get(self, key: str) -> str | None:
            return texts.get(key)

        def set(self, key: str, value: str, ttl: int | None = None) -> None:
            del ttl
            texts[key] = value

        def delete(self, key: str) -> None:
            if is_down:
                raise ConnectionError
            texts.pop(key, None)

    storage = KVStorage(Texts())
    entry = storage.create_entry(Request("GET", "https://example.com/"), Response(200, Headers({}), iter([b"x"])), "key")
    assert list(entry.response.stream) == [b"x"]  # type: ignore[arg-type]
    is_down = True
    storage.remove_entry(entry.id)
    assert storage.get_entries("key") == []
    is_down = False
    assert storage.get_entries("key") == []


async def test_date_ahead_of_our_clock_makes_nothing_fresher(store: AsyncKVStore, origin: Origin, moved: MovableClock) -> None:
    origin.says("/", Cache_Control="max-age=50", Date=http_date(600))
    async with hishel_httpx.AsyncCacheClient(storage=AsyncKVStorage(store), rfc=True) as client:
        get = getter(client, origin)
        await get()
        moved.advance(40)
        assert (await get())[1] is True
        moved.advance(11)
        assert (await get())[1] is False


@pytest.mark.parametrize("control", ["private, max-age=600", "no-store"])
async def test_confirmation_that_must_not_be_stored_drops_what_is(
    store: AsyncKVStore, origin: Origin, moved: MovableClock, control: str
) -> None:
    origin.says("/", Cache_Control="max-age=5", ETag='"1"')
    async with hishel_httpx.AsyncCacheClient(storage=AsyncKVStorage(store), rfc=True) as client:
        get = getter(client, origin)
        await get()
        moved.advance(6)
        headers = {"ETag": '"1"', "Cache-Control": control, "X-Account": "alice", "Date": http_date()}
        origin.answers["/"] = lambda _: web.Response(status=304, headers=headers)
        await get(Authorization="alice")
        texts = [await store.get(info.key) for info in [info async for info in store.keys("")]]
        assert not any("alice" in (text or "") for text in texts)
        origin.says("/", "new", Cache_Control="max-age=5")
        assert await get() == ("new", False)


@pytest.mark.parametrize(("old", "new"), [("hello", "hell"), (",200,", ",42,"), (",200,", ",1000,")])
async def test_stored_text_that_contradicts_itself_is_a_miss(store: AsyncKVStore, origin: Origin, old: str, new: str) -> None:
    origin.says("/", "hello", Cache_Control="max-age=100")
    async with hishel_httpx.AsyncCacheClient(storage=AsyncKVStorage(store), rfc=True) as client:
        get = getter(client, origin)
        await get()
        (key,) = [info.key async for info in store.keys("hishel-entry")]
        text = await store.get(key)
        assert text is not None
        assert old in text
        await store.set(key, text.replace(old, new))
        assert await get() == ("hello", False)
