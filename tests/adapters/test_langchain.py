"""A store of bytes for LangChain, beyond what LangChain's own suites look at."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from helpers import still_clock

from aiokv import AsyncKVStore, UnsupportedError, ValueTooLargeError

pytest.importorskip("langchain_core", reason="langchain-core is not installed: pip install 'aiokv[langchain]'")
from aiokv.adapters.langchain import KVByteStore
from aiokv.background import run


@pytest.fixture
async def kv(tmp_path: Path) -> AsyncGenerator[AsyncKVStore]:
    async with AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db") as kv:
        yield kv
        await asyncio.to_thread(run, kv.aclose)


async def test_blocking_and_async_callers_share_values(kv: AsyncKVStore) -> None:
    store = KVByteStore(kv)
    await store.amset([("a", b"1")])
    # A blocking call in a thread that has a running loop works, too.
    store.mset([("b", b"2")])
    assert store.mget(["a", "b"]) == await store.amget(["a", "b"]) == [b"1", b"2"]


def test_many_threads_use_one_store(tmp_path: Path) -> None:
    kv = AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db")
    store = KVByteStore(kv)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            store.mset([(f"k{number}", str(number).encode())])
            assert store.mget([f"k{number}"]) == [str(number).encode()]
        except BaseException as error:  # noqa: BLE001 (shown below)
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(list(store.yield_keys(prefix="k"))) == 8
    run(kv.aclose)


@pytest.mark.parametrize("ttl", [5, None])
async def test_values_end_after_the_ttl_of_the_store(kv: AsyncKVStore, ttl: float | None) -> None:
    store = KVByteStore(kv, ttl=ttl)
    with still_clock() as clock:
        await store.amset([("k", b"v")])
        clock.advance(5)
        assert await store.amget(["k"]) == [None if ttl else b"v"]
        listing = store.ayield_keys()
        assert [key async for key in listing] == ([] if ttl else ["k"])


async def test_keys_come_in_pages_and_a_listing_may_be_left(kv: AsyncKVStore) -> None:
    store = KVByteStore(kv)
    await store.amset([(f"k{number:03}", b"v") for number in range(250)])
    assert sorted(store.yield_keys()) == [f"k{number:03}" for number in range(250)]
    listing = store.yield_keys(prefix="k1")
    assert next(listing).startswith("k1")
    listing.close()


async def test_embeddings_are_computed_once_for_equal_texts(kv: AsyncKVStore) -> None:
    embeddings = pytest.importorskip("langchain_core.embeddings.fake", reason="it comes with langchain-core")
    cached = pytest.importorskip(
        "langchain_classic.embeddings.cache", reason="langchain-classic is not installed: pip install 'aiokv[suites]'"
    )
    calls: list[str] = []

    class Counting(embeddings.DeterministicFakeEmbedding):  # type: ignore[misc, name-defined]
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            calls.extend(texts)
            return [self.embed_query(text) for text in texts]

        async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
            return self.embed_documents(texts)

    cache = cached.CacheBackedEmbeddings.from_bytes_store(
        Counting(size=8), KVByteStore(kv), namespace="m", key_encoder="sha256"
    )
    first = await cache.aembed_documents(["a", "b"])
    assert await asyncio.to_thread(cache.embed_documents, ["b", "a", "c"]) == [
        first[1],
        first[0],
        *cache.embed_documents(["c"]),
    ]
    assert calls == ["a", "b", "c"]


async def test_what_is_no_bytes_is_refused_and_nothing_stored(kv: AsyncKVStore) -> None:
    store = KVByteStore(kv)
    values: list[Any] = [("a", b"v"), ("b", "text")]
    with pytest.raises(TypeError, match="values must be bytes, not str"):
        await store.amset(values)
    with pytest.raises(ValueTooLargeError):
        await store.amset([("a", b"v"), ("b", b"\xff" * 1_500_000)])
    assert await store.amget(["a", "b"]) == [None, None]
    with pytest.raises(ValueError, match="ttl must be more than 0"):
        KVByteStore(kv, ttl=0)


def test_store_that_cannot_list_says_so() -> None:
    class OnlyFour:
        async def get(self, db_name: str, key: str) -> str | None: ...

        async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None: ...

        async def delete(self, db_name: str, key: str) -> None: ...

        async def aclose(self) -> None: ...

    store = KVByteStore(AsyncKVStore("db", backend=OnlyFour()))
    assert store.mget(["k"]) == [None]
    with pytest.raises(UnsupportedError):
        next(store.yield_keys())
