"""A store for Litestar: its interface's promises, and an app that uses it."""

import asyncio
import itertools
from collections.abc import AsyncGenerator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers import still_clock
from slow_backend import SlowBackend

from aiokv import MAX_TTL_SECONDS, AsyncKVStore

pytest.importorskip("litestar", reason="litestar is not installed: pip install 'aiokv[litestar]'")

from litestar import Litestar, Request, get
from litestar.config.response_cache import ResponseCacheConfig
from litestar.middleware.session.server_side import ServerSideSessionConfig
from litestar.stores.base import NamespacedStore
from litestar.stores.registry import StoreRegistry
from litestar.testing import AsyncTestClient

from aiokv.adapters.litestar import KVLitestarStore

ODD_KEYS = ["..", "", "a" * 3000, "GET/path?q=é&b=1", "a:b", "a\0"]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncGenerator[KVLitestarStore]:
    store = KVLitestarStore(AsyncKVStore("litestar", url=f"sqlite:///{tmp_path}/kv.db"))
    async with store:
        yield store


@pytest.mark.parametrize("value", [b"", b"\xff\0bytes", "3 °C", b"text"])
async def test_value_comes_back_as_bytes(store: KVLitestarStore, value: str | bytes) -> None:
    await store.set("k", value)
    assert await store.get("k") == (value.encode() if isinstance(value, str) else value)


@pytest.mark.parametrize("key", ODD_KEYS)
async def test_any_key_is_set_found_and_deleted(store: KVLitestarStore, key: str) -> None:
    assert not await store.exists(key)
    await store.set(key, b"v")
    assert await store.exists(key)
    assert await store.get(key) == b"v"
    await store.delete(key)
    await store.delete(key)
    assert await store.get(key) is None


@pytest.mark.parametrize("expires_in", [10, timedelta(seconds=10)])
async def test_value_of_ten_seconds_ends_after_ten(store: KVLitestarStore, expires_in: int | timedelta) -> None:
    with still_clock() as clock:
        await store.set("k", b"v", expires_in)
        assert await store.expires_in("k") == 10
        clock.advance(9)
        assert await store.get("k") == b"v"
        clock.advance(1)
        assert [await store.get("k"), await store.exists("k"), await store.expires_in("k")] == [None, False, None]


@pytest.mark.parametrize("expires_in", [None, 0, timedelta(0)])
async def test_value_without_expiry_says_so_and_lives_thirty_days(store: KVLitestarStore, expires_in: Any) -> None:
    with still_clock() as clock:
        await store.set("k", b"v", expires_in)
        assert await store.expires_in("k") == -1
        # There is nothing to renew.
        assert await store.get("k", renew_for=1) == b"v"
        clock.advance(MAX_TTL_SECONDS - 60)
        assert await store.get("k") == b"v"


@pytest.mark.parametrize("renew_for", [100, timedelta(seconds=100)])
async def test_renewed_value_lives_from_then_on(store: KVLitestarStore, renew_for: int | timedelta) -> None:
    with still_clock() as clock:
        await store.set("k", b"v", 10)
        clock.advance(9)
        assert await store.get("k", renew_for=renew_for) == b"v"
        clock.advance(99)
        assert await store.get("k") == b"v"
        clock.advance(1)
        assert await store.get("k", renew_for=renew_for) is None


@pytest.mark.parametrize("is_deleted", [True, False])
async def test_renewal_by_another_object_undoes_no_write(*, is_deleted: bool) -> None:
    backend = SlowBackend()
    one, other = (KVLitestarStore(AsyncKVStore("db", backend=backend)).with_namespace("sessions") for _ in range(2))
    await one.set("k", b"old", 10)
    renewing = asyncio.create_task(one.get("k", renew_for=100))
    await backend.reading.wait()
    await (other.delete("k") if is_deleted else other.set("k", b"new", 10))
    assert await renewing == b"old"
    assert await one.get("k") == (None if is_deleted else b"new")


async def test_namespaces_are_apart_and_go_with_their_parent(store: KVLitestarStore) -> None:
    assert isinstance(store, NamespacedStore)
    names = ["a", "a:b", "a/b", ""]
    stores = [store, *map(store.with_namespace, names), store.with_namespace("a").with_namespace("b")]
    for number, (one, key) in enumerate(itertools.product(stores, ["k", "b:k", "/b:k"])):
        await one.set(key, str(number))
    read = [await one.get(key) for one, key in itertools.product(stores, ["k", "b:k", "/b:k"])]
    assert read == [str(number).encode() for number in range(len(read))]
    await store.with_namespace("a").delete_all()
    gone = [await one.get("k") is None for one in stores]
    assert gone == [False, True, False, False, False, True]
    await store.delete_all()
    assert [await one.get("k") for one in stores] == [None] * 6


async def test_app_keeps_sessions_and_responses_in_it(tmp_path: Path) -> None:
    calls = 0

    @get("/cached", cache=60, sync_to_thread=False)
    def cached() -> dict[str, int]:
        nonlocal calls
        calls += 1
        return {"calls": calls}

    @get("/visits", sync_to_thread=False)
    def visits(request: Request[Any, Any, Any]) -> int:
        request.session["visits"] = request.session.get("visits", 0) + 1
        return int(request.session["visits"])

    kv = AsyncKVStore("app", url=f"sqlite:///{tmp_path}/kv.db")
    root = KVLitestarStore(kv)
    app = Litestar(
        [cached, visits],
        middleware=[ServerSideSessionConfig(renew_on_access=True).middleware],
        response_cache_config=ResponseCacheConfig(),
        stores=StoreRegistry({"root": root}, default_factory=root.with_namespace),
    )
    async with AsyncTestClient(app) as client:
        assert [(await client.get("/cached")).json() for _ in range(2)] == [{"calls": 1}] * 2
        assert [(await client.get("/visits")).json() for _ in range(3)] == [1, 2, 3]
        listing = kv.keys()
        assert sorted([info.key.partition(":")[0] async for info in listing]) == ["/response_cache", "/sessions"]
