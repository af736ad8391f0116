"""Keys of a namespace: listed page by page, counted, and deleted."""

import asyncio
import gc
import pickle
from typing import Any

import pytest

from aiokv import AsyncKVStore, Event, KeyInfo, StorageError, UnsupportedError
from aiokv.backends.capabilities import Cleared, Page
from aiokv.backends.memory import MemoryBackend
from aiokv.errors import CallError


async def listed(store: AsyncKVStore, prefix: str = "") -> list[str]:
    infos = store.keys(prefix)
    return sorted([info.key async for info in infos])


class PagingBackend(MemoryBackend):
    """Answer pages of two keys; note which, and hold or fail those that a test names."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: list[str | None] = []
        self.gates: dict[int, asyncio.Event] = {}
        self.errors: dict[int, Exception] = {}
        self.cancelled = 0

    async def scan(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = 2) -> Page:  # noqa: ARG002
        self.pages.append(cursor)
        number = len(self.pages)
        try:
            if number in self.gates:
                await self.gates[number].wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if number in self.errors:
            raise self.errors[number]
        return await super().scan(db_name, prefix, cursor, 2)


@pytest.fixture
def backend() -> PagingBackend:
    return PagingBackend()


@pytest.fixture
async def store(backend: PagingBackend) -> AsyncKVStore:
    store = AsyncKVStore("db", backend=backend)
    await store.set_many({f"k{i}": "v" for i in range(7)})
    return store


async def test_keys_come_with_expiry_and_size(able: AsyncKVStore) -> None:
    await able.set("k", "größer", ttl=60)
    infos = able.keys()
    (info,) = [info async for info in infos]
    assert isinstance(info, KeyInfo)
    assert (info.key, info.value_bytes) == ("k", 8)
    await able.set("k", "größer", ttl=3_660)
    infos = able.keys()
    (later,) = [info async for info in infos]
    assert 3_590 < later.expires_at - info.expires_at < 3_610


@pytest.mark.parametrize("observed", [False, True])
async def test_each_key_comes_once_and_by_its_prefix_alone(url: str, *, observed: bool) -> None:
    events: list[Event] = []
    async with (
        AsyncKVStore("db", url=url, observer=events.append if observed else None) as store,
        AsyncKVStore("db2", url=url) as other,
    ):
        names = [f"user:{i}" for i in range(2_500)]
        await store.set_many(dict.fromkeys(names, "v"))
        odd = ["user%", "user_1", "user*", "user[1]", "ключ", "😀", "\uffff", ".", "\U0010ffffz"]
        await store.set_many(dict.fromkeys([f"x{name}" for name in odd], "v"))
        await other.set("user:1", "v")
        assert await listed(store) == sorted([*names, *(f"x{name}" for name in odd)])
        assert await listed(store, "user:12") == sorted(name for name in names if name.startswith("user:12"))
        for name in odd:
            assert await listed(store, f"x{name}") == [f"x{name}"]
        assert await listed(store, "y") == []
        assert (await store.count(), await store.count("user:12"), await store.count("y")) == (2_509, 111, 0)
        assert await store.clear("user:1") == 1_111
        assert (await store.count(), await store.count("user:1"), await other.count()) == (1_398, 0, 1)
        assert await store.clear() == 1_398
        assert (await listed(store), await store.clear(), await listed(other)) == ([], 0, ["user:1"])


async def test_keys_that_are_written_while_they_are_listed_disturb_no_other(able: AsyncKVStore) -> None:
    names = [f"k{i:04}" for i in range(2_200)]
    await able.set_many(dict.fromkeys(names, "v"))
    seen: list[str] = []
    infos = able.keys()
    async for info in infos:
        seen.append(info.key)
        if len(seen) % 100 == 0:
            await able.set(f"new{len(seen)}", "v")
            await able.set(names[0], "again")
            await able.delete(names[-1])
    stayed = [key for key in seen if not key.startswith("new") and key != names[-1]]
    assert sorted(stayed) == names[:-1]


async def test_one_page_is_read_ahead_and_no_more(store: AsyncKVStore, backend: PagingBackend) -> None:
    seen = []
    infos = store.keys()
    async for info in infos:
        seen.append(info.key)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(backend.pages) == min((len(seen) - 1) // 2 + 2, 4)
    assert sorted(seen) == [f"k{i}" for i in range(7)]


async def test_first_key_comes_before_the_second_page(store: AsyncKVStore, backend: PagingBackend) -> None:
    backend.gates[2] = asyncio.Event()
    infos = store.keys()
    async with asyncio.timeout(10):
        assert isinstance(await anext(infos), KeyInfo)
    await asyncio.sleep(0)
    await infos.aclose()
    assert backend.cancelled == 1


@pytest.mark.parametrize("page", [1, 2, 3])
async def test_page_that_fails_ends_the_listing_behind_the_keys_before_it(
    store: AsyncKVStore, backend: PagingBackend, page: int
) -> None:
    backend.errors[page] = StorageError("broken")
    seen = []

    async def read() -> None:
        infos = store.keys()
        async for info in infos:
            seen.append(info.key)  # noqa: PERF401 (what came before the error counts)

    with pytest.raises(StorageError):
        await read()
    assert len(seen) == 2 * (page - 1)


async def test_listing_that_is_left_leaves_nothing_behind(store: AsyncKVStore, backend: PagingBackend) -> None:
    backend.errors[2] = StorageError("nobody reads this page")
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    infos = store.keys()
    async for _ in infos:
        await asyncio.sleep(0)
        break
    del infos
    gc.collect()
    for _ in range(1_000):
        if len(asyncio.all_tasks()) == 1:
            break
        await asyncio.sleep(0)
    gc.collect()
    assert (asyncio.all_tasks(), complaints) == ({asyncio.current_task()}, [])


async def test_clearing_goes_on_until_a_step_finds_less_than_it_may_delete(able: AsyncKVStore) -> None:
    await able.set_many({f"k{i}": "v" for i in range(3_000)})
    assert await able.clear() == 3_000
    assert await able.count() == 0


@pytest.mark.parametrize("new", ["after {}", "before {}"])
async def test_clearing_ends_beside_a_writer_that_is_faster(able: AsyncKVStore, new: str) -> None:
    await able.set_many({f"k{i}": "v" for i in range(3_000)})
    async with asyncio.timeout(15):
        clearing = asyncio.create_task(able.clear())
        written = 0
        while not clearing.done():
            await able.set_many({new.format(written + i): "v" for i in range(1_000)})
            written += 1_000
            # Memory takes it at once.
            await asyncio.sleep(0)
        deleted = await clearing
    assert deleted >= 3_000
    assert await listed(able, "k") == []


@pytest.mark.parametrize(("failing_step", "maybe_applied"), [(1, False), (2, True)])
async def test_clearing_that_fails_says_whether_entries_may_be_gone(*, failing_step: int, maybe_applied: bool) -> None:
    class Failing(MemoryBackend):
        steps = 0

        async def clear(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = 1_000) -> Cleared:
            self.steps += 1
            if self.steps == failing_step:
                raise StorageError("broken")
            return await super().clear(db_name, prefix, cursor, limit)

    store = AsyncKVStore("db", backend=Failing())
    await store.set_many({f"k{i}": "v" for i in range(1_500)})
    with pytest.raises(CallError) as caught:
        await store.clear()
    assert caught.value.maybe_applied is maybe_applied


async def test_expired_keys_are_neither_listed_nor_counted(kv_clock: Any) -> None:
    store = AsyncKVStore("db", backend=MemoryBackend())
    await store.set("short", "v", ttl=60)
    await store.set("long", "v", ttl=3_600)
    kv_clock.advance(60)
    assert (await listed(store), await store.count()) == (["long"], 1)


@pytest.mark.parametrize(
    ("prefix", "kind", "words"),
    [
        (None, TypeError, "prefix must be str, not NoneType"),
        (b"k", TypeError, "prefix must be str, not bytes"),
        (["k"], TypeError, "prefix must be str, not list"),
        ("a\0", ValueError, "contains NUL"),
        ("a\ud800", ValueError, "lone surrogate"),
        ("x" * 8_001, ValueError, "too long for a request line"),
    ],
)
async def test_prefix_that_is_refused_is_refused_before_anything_is_sent(
    store: AsyncKVStore, backend: PagingBackend, prefix: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        store.keys(prefix)
    with pytest.raises(kind, match=words):
        await store.count(prefix)
    with pytest.raises(kind, match=words):
        await store.clear(prefix)
    assert (backend.pages, await store.count()) == ([], 7)


@pytest.mark.parametrize("prefix", [".", "..", "/", "?a=b&c", "%41", "a b"])
async def test_prefix_of_any_other_text_names_what_begins_with_it(able: AsyncKVStore, prefix: str) -> None:
    await able.set_many({f"{prefix}x": "v", f"x{prefix}": "v", "A": "v"})
    assert await listed(able, prefix) == [f"{prefix}x"]
    assert (await able.count(prefix), await able.clear(prefix), await able.count()) == (1, 1, 2)


async def first_key(store: AsyncKVStore) -> KeyInfo:
    return await anext(store.keys())


@pytest.mark.parametrize("call", [first_key, AsyncKVStore.count, AsyncKVStore.clear])
async def test_store_that_cannot_list_says_so_and_names_those_that_can(unable: AsyncKVStore, call: Any) -> None:
    await unable.set("k", "v")
    with pytest.raises(
        UnsupportedError, match=r"the store at backend://DictBackend cannot list its keys; .*sqlite:///, memory:// and redis://"
    ) as caught:
        await call(unable)
    assert (caught.value.maybe_applied, caught.value.transient) == (False, False)
    assert await unable.get("k") == "v"


async def test_service_of_fal_is_not_asked_for_its_keys() -> None:
    store = AsyncKVStore("db", credentials="id:secret")
    for refused in (store.count(), store.clear(), anext(store.keys()), anext(store.watch()), store.claim("k").__aenter__()):
        with pytest.raises(UnsupportedError, match=r"the store at https://kv\.fal\.media cannot"):
            await refused
    await store.aclose()


async def test_derived_and_pickled_stores_list_too(url: str, able: AsyncKVStore) -> None:
    await able.set("k", "v")
    events: list[Event] = []
    assert await listed(able.with_options(observer=events.append)) == ["k"]
    assert len(events) == 2
    if not url.startswith("memory"):
        copied = pickle.loads(pickle.dumps(able))
        assert await listed(copied) == ["k"]
        await copied.aclose()


def test_one_store_lists_in_several_loops(tmp_path: Any) -> None:
    store = AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db")

    async def use() -> tuple[list[str], int]:
        await store.set("k", "v")
        return await listed(store), await store.count()

    assert [asyncio.run(use()) for _ in range(3)] == [(["k"], 1)] * 3
