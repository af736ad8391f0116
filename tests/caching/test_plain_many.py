"""Cached plain functions of many ids."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from caching_under_test import WatchedBackend, watched_store
from plain_under_test import begin, results, wait_until

from aiokv import AsyncKVStore, BatchError, NearCache, PlainCachedManyFunction, StorageError, cache_bypass, kv_cached_many

kv = AsyncKVStore("db", url="memory://plain-many")


class Users:
    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.threads: set[int] = set()

    def __cache_key__(self) -> str:
        return "users"

    @kv_cached_many(60, store=kv, prefix="names", ignore="self")
    def names(self, ids: list[int], locale: str = "en") -> dict[int, str]:
        self.asked.append(ids)
        self.threads.add(threading.get_ident())
        return {id_: f"{locale} {id_}" for id_ in ids if id_ >= 0}

    @kv_cached_many(60, store=kv)
    @classmethod
    def of_class(cls, ids: list[int]) -> dict[int, str]:
        return {id_: f"{cls.__name__} {id_}" for id_ in ids}

    @staticmethod
    @kv_cached_many(60, store=kv)
    def static(ids: list[int]) -> dict[int, int]:
        return dict.fromkeys(ids, 1)


class Special(Users):
    pass


@pytest.fixture
def users() -> Users:
    made = Users()
    made.names.invalidate(range(-5, 10))
    return made


def test_function_is_called_here_with_the_ids_that_are_not_stored(users: Users) -> None:
    assert users.names([2, 1, 2]) == {2: "en 2", 1: "en 1"}
    assert users.names(ids=[3, 1, -1]) == {3: "en 3", 1: "en 1"}
    assert users.names([-1]) == users.names([]) == {}
    assert users.asked == [[2, 1], [3, -1], [-1]]
    assert users.threads == {threading.get_ident()}
    assert users.names([1], "no") == {1: "no 1"}


def test_results_are_managed_by_id(users: Users) -> None:
    users.names([1, 2])
    assert {id_: peeked.value for id_, peeked in users.names.peek([1, 2, 3]).items()} == {1: "en 1", 2: "en 2"}
    users.names.prime({3: "primed"})
    users.names.invalidate([1])
    assert users.names([1, 2, 3]) == {1: "en 1", 2: "en 2", 3: "primed"}
    assert users.names.refresh([3]) == {3: "en 3"}
    assert users.asked == [[1, 2], [1], [3]]
    assert users.names.info().computations >= 4
    users.names.close()


def test_methods_of_every_kind_are_cached() -> None:
    assert (Users.of_class([1]), Special.of_class([1])) == ({1: "Users 1"}, {1: "Special 1"})
    assert Users.static([1]) == Users().static([1]) == {1: 1}
    assert isinstance(Users().names, PlainCachedManyFunction)


def test_near_hits_and_bypass() -> None:
    asked: list[list[int]] = []

    @kv_cached_many(60, store=kv, key=lambda id_: id_, near=NearCache(60), batch_size=2, prefix="near")
    def numbers(ids: list[int]) -> dict[int, int]:
        asked.append(ids)
        return dict.fromkeys(ids, len(asked))

    assert numbers([1, 2, 3]) == {1: 1, 2: 1, 3: 2}
    assert numbers([3, 1]) == {3: 2, 1: 1}
    assert numbers.info().near_hits == 2
    with cache_bypass():
        assert numbers([1, 2, 3]) == {1: 3, 2: 3, 3: 4}
        assert numbers([]) == {}
    assert asked == [[1, 2], [3], [1, 2], [3]]


def test_ids_of_several_stores_are_read_from_those() -> None:
    stores = [watched_store()[1] for _ in range(2)]

    @kv_cached_many(60, store=lambda ids: stores[ids % 2], key=lambda id_: id_)
    def numbers(ids: list[int]) -> dict[int, int]:
        return {id_: -id_ for id_ in ids}

    assert [numbers([1, 2, 3, 4]), numbers([4, 1])] == [{1: -1, 2: -2, 3: -3, 4: -4}, {4: -4, 1: -1}]
    assert asyncio.run(stores[1].get(numbers.key(1))) is not None
    assert asyncio.run(stores[0].get(numbers.key(1))) is None


def test_store_and_values_to_prime_are_asked_for_in_the_callers_thread() -> None:
    threads: set[threading.Thread] = set()
    _, chosen = watched_store()

    def choose(_: int) -> AsyncKVStore:
        threads.add(threading.current_thread())
        return chosen

    class Values(Mapping[int, int]):
        def __iter__(self) -> Iterator[int]:
            threads.add(threading.current_thread())
            return iter([1])

        def __len__(self) -> int:
            return 1

        def __getitem__(self, key: int) -> int:
            return numbers([key + 1])[key + 1]

    @kv_cached_many(60, store=choose, key=lambda id_: id_)
    def numbers(ids: list[int]) -> dict[int, int]:
        return {id_: -id_ for id_ in ids}

    numbers.prime(Values())
    assert (numbers([1]), numbers.peek([1])[1].value, numbers.refresh([1])) == ({1: -2}, -2, {1: -1})
    numbers.invalidate([1])
    assert threads == {threading.current_thread()}


def test_failing_batch_leaves_the_results_of_the_others(store: AsyncKVStore) -> None:
    @kv_cached_many(60, store=store, key=lambda id_: id_, batch_size=1)
    def numbers(ids: list[int]) -> dict[int, int]:
        if ids == [2]:
            raise OSError("down")
        return {id_: -id_ for id_ in ids}

    with pytest.raises(OSError, match="down"):
        numbers([1, 2, 3])
    assert set(numbers.peek([1, 2, 3])) == {1, 3}


def test_failed_invalidation_names_the_ids(backend: WatchedBackend, store: AsyncKVStore) -> None:
    @kv_cached_many(60, store=store, key=lambda id_: id_)
    def numbers(ids: list[int]) -> dict[int, int]:
        return {id_: -id_ for id_ in ids}

    numbers([1, 2])
    backend.failing = {"delete"}
    with pytest.raises(BatchError) as caught:
        numbers.invalidate([1, 2])
    assert set(caught.value.errors) == {1, 2}
    assert all(isinstance(error, StorageError) for error in caught.value.errors.values())


def test_overlapping_calls_of_threads_compute_each_id_once(store: AsyncKVStore) -> None:
    gate, asked = threading.Event(), []

    @kv_cached_many(60, store=store, key=lambda id_: id_)
    def numbers(ids: list[int]) -> dict[int, int]:
        asked.extend(ids)
        assert gate.wait(10)
        return {id_: -id_ for id_ in ids}

    first = begin(numbers, [1, 2])
    wait_until(lambda: len(asked) == 2)
    others: list[Any] = [begin(numbers, [2, 3]), begin(numbers, [1, 2])]
    wait_until(lambda: numbers.info().joined == 3)
    gate.set()
    assert results([first, *others]) == [{1: -1, 2: -2}, {2: -2, 3: -3}, {1: -1, 2: -2}]
    assert sorted(asked) == [1, 2, 3]


def test_awaitable_result_and_results_of_other_ids_are_type_errors(store: AsyncKVStore) -> None:
    async def fetch() -> dict[int, int]:
        return {}

    def wrapper(ids: list[int]) -> Any:
        return fetch() if ids == [1] else {"2": 2}

    cached: Any = kv_cached_many(60, store=store, key=lambda id_: id_, returns=int)(wrapper)
    with pytest.raises(TypeError, match=r"wrapper is a plain function, and returned an awaitable"):
        cached([1])
    with pytest.raises(TypeError, match="id of type int"):
        cached([2])
    with pytest.raises(TypeError, match="must be an iterable of ids"):
        cached("ab")
