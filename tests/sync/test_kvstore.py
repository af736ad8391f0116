"""`KVStore` does for blocking code what `AsyncKVStore` does for code that awaits."""

import asyncio
import inspect
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from caching_under_test import in_child
from helpers import wait_until

from aiokv import (
    AsyncKVStore,
    BatchError,
    CallEnded,
    CallError,
    Changed,
    ConnectError,
    DecodeError,
    Event,
    HttpOptions,
    KVStore,
    Lost,
    RetryPolicy,
    UnsupportedError,
)
from aiokv.changes import Changes
from aiokv.claiming import Claim
from aiokv.sync import BlockingChanges, BlockingClaim
from aiokv.testing import ResetAfter
from aiokv.testing.background import FlakyKV


@pytest.fixture(params=["memory", "sqlite", "http"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the address of an empty store."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/kv.db"
    return str(request.getfixturevalue("kv_server").url)


@pytest.fixture
def store(url: str) -> Generator[KVStore]:
    with KVStore("db", url=url) as opened:
        yield opened


def test_value_is_set_read_and_deleted(store: KVStore) -> None:
    assert store.get("k") is None
    store.set("k", "v", ttl=60)
    assert store.get("k") == "v"
    store.set("k", "w", timedelta(minutes=2))
    assert store.get("k") == "w"
    store.delete("k")
    store.delete("k")
    assert store.get("k") is None


def test_json_is_set_and_read(store: KVStore) -> None:
    store.set_json("k", {"a": [1, None]}, ttl=60)
    assert store.get_json("k") == {"a": [1, None]}
    assert store.get_json("absent", default=7) == 7
    store.set("text", "not JSON")
    with pytest.raises(DecodeError):
        store.get_json("text")


def test_many_are_set_read_and_deleted(store: KVStore) -> None:
    store.set_many({"a": "1", "b": "2"}, ttl=60)
    assert store.get_many(["b", "c", "a"]) == {"b": "2", "c": None, "a": "1"}
    store.delete_many(["a", "c"])
    assert store.get_many(["a", "b"]) == {"a": None, "b": "2"}


def test_keys_and_values_are_read_in_the_callers_thread_and_may_be_made_by_the_store(store: KVStore) -> None:
    threads: list[threading.Thread] = []

    class Made(Mapping[str, str]):
        def __iter__(self) -> Iterator[str]:
            threads.append(threading.current_thread())
            return iter(["a", "b"])

        def __len__(self) -> int:
            return 2

        def __getitem__(self, key: str) -> str:
            return f"{key}{store.get(key)}"

    store.set_many(Made())
    assert store.get_many(map(attrgetter("key"), store.keys())) == {"a": "aNone", "b": "bNone"}
    store.delete_many(map(attrgetter("key"), store.keys()))
    assert (store.count(), threads) == (0, [threading.current_thread()])


@pytest.mark.parametrize("call", ["get_many", "delete_many", "set_many"])
@pytest.mark.parametrize("given", ["abc", b"abc", 5, None, [1]])
def test_what_is_no_iterable_of_keys_is_the_error_of_the_async_store(call: str, given: object) -> None:
    store = KVStore("db", url=f"memory://{uuid.uuid4().hex}")
    with pytest.raises(TypeError) as caught:
        getattr(store, call)(given)
    with pytest.raises(TypeError) as of_async:
        asyncio.run(getattr(store.async_store, call)(given))
    assert str(caught.value) == str(of_async.value)


def test_keys_are_listed_counted_and_cleared(store: KVStore) -> None:
    store.set_many({f"n:{number:04}": "v" for number in range(2_200)} | {"other": "v"})
    assert sorted(info.key for info in store.keys("n:")) == [f"n:{number:04}" for number in range(2_200)]
    assert store.count() == 2_201
    assert store.clear("n:") == 2_200
    assert [info.key for info in store.keys("")] == ["other"]


def test_listing_that_is_left_can_be_begun_again(store: KVStore) -> None:
    store.set_many({f"{number}": "v" for number in range(1_500)})
    for _ in range(3):
        for info in store.keys(""):
            assert info.value_bytes in {1, None}
            break
    assert len(list(store.keys())) == 1_500


def test_claim_is_held_by_one_block_at_a_time(store: KVStore) -> None:
    with store.claim("job", seconds=30) as claim:
        assert claim.is_held
        assert 0 < claim.seconds_left <= 30
        with store.claim("job") as other:
            assert not other.is_held
    assert not claim.is_held
    with store.claim("job", timedelta(seconds=5)) as again:
        assert again.is_held


def test_claim_is_released_where_its_block_fails(store: KVStore) -> None:
    with pytest.raises(ZeroDivisionError), store.claim("job"):
        _ = 1 / 0
    with store.claim("job") as claim:
        assert claim.is_held


def test_claim_is_renewed_while_its_block_runs(store: KVStore) -> None:
    with store.claim("job", seconds=3) as claim:
        first = claim._claim._ends_at
        wait_until(lambda: claim._claim._ends_at > first)
        assert claim.is_held


def test_changes_come_in_their_order(store: KVStore) -> None:
    with store.watch() as changes:
        assert next(changes) == Lost()
        store.set("a", "1")
        store.delete("a")
        assert [next(changes), next(changes)] == [Changed("a"), Changed("a", is_delete=True)]
    assert list(changes) == []


@pytest.mark.parametrize("closed", ["store", "watch"])
def test_watch_that_another_thread_reads_ends_when_it_is_closed(store: KVStore, closed: str) -> None:
    changes = store.watch()
    seen: list[Changed | Lost] = []

    def read() -> None:
        for change in changes:
            seen.append(change)  # noqa: PERF402 (seen while the loop goes on)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    wait_until(lambda: bool(seen) and changes._changes._watch is not None and changes._changes._watch._waiter is not None)
    (store if closed == "store" else changes).close()
    thread.join(10)
    assert not thread.is_alive()
    assert seen == [Lost()]


def test_closed_store_opens_anew(store: KVStore) -> None:
    store.set("k", "v")
    store.close()
    store.close()
    assert store.get("k") == "v"


def test_what_a_store_cannot_do_is_said() -> None:
    class Smallest:
        async def get(self, _db_name: str, _key: str) -> str | None:
            return None

        async def set(self, _db_name: str, _key: str, _value: str, _ttl_seconds: int) -> None: ...

        async def delete(self, _db_name: str, _key: str) -> None: ...

        async def aclose(self) -> None: ...

    store = KVStore("db", backend=Smallest())
    with pytest.raises(UnsupportedError):
        list(store.keys())
    with pytest.raises(UnsupportedError):
        next(store.watch())
    with pytest.raises(UnsupportedError), store.claim("k"):
        pass


@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.get(""),
        lambda store: store.set("k", "v", ttl=59),
        lambda store: store.keys("\0"),
        lambda store: store.claim("k", seconds=0),
        lambda store: store.get_many(["a", ""]),
    ],
)
def test_bad_argument_is_an_ordinary_error_at_once(act: Callable[[KVStore], object]) -> None:
    with pytest.raises(ValueError, match=r"key|prefix|ttl|seconds"):
        act(KVStore("db", url="http://127.0.0.1:1"))


def test_failed_call_raises_the_error_of_the_async_store() -> None:
    store = KVStore("db", url="http://127.0.0.1:1").with_options(timeout=0.2)
    with pytest.raises(ConnectError) as caught:
        store.get("k")
    assert (caught.value.verb, caught.value.key) == ("get", "k")
    with pytest.raises(BatchError):
        store.get_many(["a", "b"])


def test_broken_connection_is_retried(flaky_kv: FlakyKV) -> None:
    store = KVStore(flaky_kv.store.db_name, url=flaky_kv.proxy.url, retry=RetryPolicy(attempt_timeout=1.0))
    store.set("k", "v")
    asked = len(flaky_kv.proxy.requests)
    flaky_kv.proxy.faults = [ResetAfter()]
    assert store.get("k") == "v"
    assert len(flaky_kv.proxy.requests) - asked >= 2
    store.close()


def test_options_of_a_derived_store_are_its_own(url: str) -> None:
    events: list[Event] = []
    store = KVStore("db", url=url)
    observed = store.with_options(observer=events.append)
    assert type(observed) is KVStore
    store.set("k", "v")
    assert events == []
    assert observed.get("k") == "v"
    assert any(isinstance(event, CallEnded) for event in events)
    store.close()


def test_pickled_store_means_the_same_values(store: KVStore) -> None:
    store.set("k", "v")
    copied = pickle.loads(pickle.dumps(store))
    assert copied.target == store.target
    assert copied.get("k") == "v"
    copied.close()


def test_description_of_a_store_hides_its_credentials() -> None:
    store = KVStore("db", url="https://kv.example", credentials="id:secret")
    assert repr(store) == "KVStore('db', url='https://kv.example', credentials='***')"
    assert (store.db_name, store.url) == ("db", "https://kv.example")


async def test_store_works_in_a_running_loop_and_beside_its_async_self(store: KVStore) -> None:
    store.set("k", "v")
    assert store.get("k") == "v"
    assert await store.async_store.get("k") == "v"
    assert store.async_store.target is store.target
    await store.async_store.aclose()


def test_many_threads_share_one_store_and_its_connections(kv_server: Any) -> None:
    threads, rounds = 32, 15
    with KVStore("db", url=kv_server.url) as store:

        def hammer(thread: int) -> int:
            for number in range(rounds):
                key = f"{thread}:{number % 5}"
                store.set(key, f"{thread} {number}")
                assert store.get(key) == f"{thread} {number}"
                if number % 7 == 0:
                    store.delete(key)
                    assert store.get(key) is None
            return store.count(f"{thread}:")

        with ThreadPoolExecutor(threads) as pool:
            counts = list(pool.map(hammer, range(threads)))
        left = {number % 5 for number in range(rounds)} - {
            (rounds - 5 + at) % 5 for at in range(5) if (rounds - 5 + at) % 7 == 0
        }
        assert counts == [len(left)] * threads


def test_threads_take_no_more_connections_than_the_pool_has(flaky_kv: FlakyKV) -> None:
    http = HttpOptions(pool_size=4, batching=False)
    with KVStore("db", url=flaky_kv.proxy.url, http=http) as store, ThreadPoolExecutor(32) as pool:
        assert list(pool.map(lambda number: store.get(str(number)), range(200))) == [None] * 200
        requests = flaky_kv.proxy.requests
        assert len(requests) >= 200
        assert len({request.connection for request in requests}) <= 4


def test_threads_that_open_and_close_one_store_get_answers_or_the_error_of_a_closed_one(kv_server: Any) -> None:
    store = KVStore("db", url=kv_server.url)
    store.set("k", "v")
    ends_at = time.monotonic() + 0.5

    def use(thread: int) -> set[str]:
        seen = set()
        while time.monotonic() < ends_at:
            try:
                seen.add(str(store.get("k")))
            except CallError as error:
                seen.add(type(error).__name__)
            if thread == 0:
                store.close()
        return seen

    with ThreadPoolExecutor(8) as pool:
        seen = set().union(*pool.map(use, range(8)))
    assert "v" in seen
    assert seen <= {"v", "StoreClosedError"}
    assert store.get("k") == "v"
    store.close()


def test_forked_child_uses_the_store_and_leaves_what_is_its_parents(url: str) -> None:
    if url.startswith("memory"):
        pytest.skip("memory is not shared between processes")
    with KVStore("db", url=url) as store, store.claim("job") as claim, store.watch() as changes:
        store.set_many({f"{number}": "v" for number in range(1_500)})
        listing = store.keys()
        assert next(changes) == Lost()
        assert next(listing).key

        def use() -> None:
            assert store.get("1") == "v"
            store.set("of the child", "v")
            for act in (lambda: next(changes), lambda: list(listing), claim.__enter__):
                with pytest.raises(RuntimeError, match="forked process"):
                    act()
            assert not claim.is_held
            claim.__exit__()
            changes.close()
            with store.claim("job") as other:
                assert not other.is_held
            with store.watch() as own:
                assert next(own) == Lost()
            store.close()

        assert in_child(use) == 0
        assert store.get("of the child") == "v"
        assert claim.is_held
        assert len(list(listing)) >= 1_499
        with store.claim("job") as other:
            assert not other.is_held


# What a store calls when it is closed.
NOT_FOR_PROGRAMS = {"end_here", "end_renewal_here"}
SYNC_NAMES = {"aclose": "close", "__aenter__": "__enter__", "__aexit__": "__exit__"}


@pytest.mark.parametrize(
    ("of_async", "of_sync", "added"),
    [
        (AsyncKVStore, KVStore, {"async_store"}),
        (Changes, BlockingChanges, set()),
        (Claim, BlockingClaim, set()),
    ],
)
def test_blocking_and_async_class_have_the_same_methods(of_async: type, of_sync: type, added: set[str]) -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    expected = {SYNC_NAMES.get(name, name) for name in public(of_async) - NOT_FOR_PROGRAMS}
    assert public(of_sync) == expected | added
    for name in public(of_async) - NOT_FOR_PROGRAMS:
        method, own = getattr(of_async, name), getattr(of_sync, SYNC_NAMES.get(name, name))
        if inspect.isfunction(method):
            wanted, had = (
                [(parameter.name, parameter.kind, parameter.default, parameter.annotation) for parameter in parameters]
                for parameters in (inspect.signature(one).parameters.values() for one in (method, own))
            )
            assert had == wanted, name


def test_blocking_and_async_store_are_made_with_the_same_arguments() -> None:
    assert inspect.signature(KVStore).parameters == inspect.signature(AsyncKVStore).parameters


def test_blocking_methods_return_what_the_async_ones_await() -> None:
    for name in ("get", "set", "delete", "get_json", "set_json", "get_many", "set_many", "delete_many", "count", "clear"):
        returned = [inspect.signature(getattr(kind, name)).return_annotation for kind in (AsyncKVStore, KVStore)]
        assert returned[0] == returned[1], name
