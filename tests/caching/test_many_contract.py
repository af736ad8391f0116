"""What `kv_cached_many` gives to its function, and takes from it."""

import asyncio
import contextlib
import inspect
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
from caching_under_test import settle, watched_store

from aiokv import AsyncKVStore, CachedManyFunction, NearCache, cache_bypass, cache_refresh, kv_cached_many

Many = CachedManyFunction[int, [], Any]
MODES = {"use": contextlib.nullcontext, "bypass": cache_bypass, "refresh": cache_refresh}


def _many(store: AsyncKVStore, answer: Any, **options: Any) -> Many:
    @kv_cached_many(60, **{"store": store, "key": lambda id_: id_, **options})
    async def many(ids: list[int]) -> dict[int, Any]:
        await asyncio.sleep(0)
        answered = answer(ids)
        return await answered if inspect.isawaitable(answered) else answered

    return many


def _drain(ids: list[int]) -> dict[int, int]:
    results = {}
    while ids:
        id_ = ids.pop()
        results[id_] = id_ * 10
    return results


async def test_function_that_empties_its_list_and_fails_has_its_error_raised(store: AsyncKVStore) -> None:
    def answer(ids: list[int]) -> dict[int, int]:
        ids.clear()
        raise LookupError("upstream")

    many = _many(store, answer)
    for _ in range(2):
        with pytest.raises(LookupError, match="upstream"):
            await many([1, 2])


async def test_function_that_empties_its_list_and_fails_has_its_error_raised_where_stale_would_be_served(
    store: AsyncKVStore,
) -> None:
    def answer(ids: list[int]) -> dict[int, int]:
        ids.clear()
        raise LookupError("upstream")

    with pytest.raises(LookupError, match="upstream"):
        await _many(store, answer, stale_if_error=60)([1, 2])


@pytest.mark.parametrize("mode", ["use", "refresh"])
async def test_function_that_uses_up_its_list_gives_every_result(mode: str, store: AsyncKVStore) -> None:
    many = _many(store, _drain)
    with MODES[mode]():
        assert await many([1, 2, 3]) == {1: 10, 2: 20, 3: 30}
    assert await many([3, 2]) == {3: 30, 2: 20}


async def test_function_that_changes_its_list_does_not_change_its_callers_list(store: AsyncKVStore) -> None:
    ids = [1, 2, 3]
    assert await _many(store, _drain)(ids) == {1: 10, 2: 20, 3: 30}
    with cache_bypass():
        await _many(store, _drain)(ids)
    assert ids == [1, 2, 3]


async def test_function_that_adds_to_its_list_gives_nobody_more_than_was_asked_for(store: AsyncKVStore) -> None:
    def answer(ids: list[int]) -> dict[int, int]:
        ids.extend([7, 8])
        return {id_: id_ for id_ in ids}

    assert await _many(store, answer)([1]) == {1: 1}


@pytest.mark.parametrize(
    "answer",
    [["a", "b", "c"], ("a", "b"), "abc", {1, 2}, 5, [(0, "a"), (1, "b")], iter([1])],
    ids=lambda answer: type(answer).__name__,
)
@pytest.mark.parametrize("mode", ["use", "bypass", "refresh"])
async def test_function_that_returns_no_mapping_is_refused(answer: Any, mode: str, store: AsyncKVStore) -> None:
    many = _many(store, lambda _: answer)
    with MODES[mode](), pytest.raises(TypeError, match=r"(?i)mapping"):
        await many([0, 1])


async def test_message_about_a_result_that_is_no_mapping_names_its_type_and_no_value(store: AsyncKVStore) -> None:
    many = _many(store, lambda _: ["s3cret"])
    with pytest.raises(TypeError) as caught:
        await many([0])
    assert "list" in str(caught.value)
    assert "s3cret" not in str(caught.value)


async def test_bypass_gives_the_ids_asked_for_in_their_order(store: AsyncKVStore) -> None:
    asked: list[list[int]] = []

    def answer(ids: list[int]) -> dict[int, int]:
        asked.append(list(ids))
        return {99: 99, **{id_: id_ for id_ in sorted(ids) if id_ != 4}}

    many = _many(store, answer)
    with cache_bypass():
        assert list((await many([3, 1, 4, 3, 2])).items()) == [(3, 3), (1, 1), (2, 2)]
    assert asked == [[3, 1, 4, 2]]


async def test_bypass_gives_a_dictionary_of_its_callers_own(store: AsyncKVStore) -> None:
    table = {1: "one", 2: "two"}
    many = _many(store, lambda _: table)
    with cache_bypass():
        result = await many([1, 2])
    result.clear()
    assert table == {1: "one", 2: "two"}


async def test_mapping_that_goes_on_changing_is_taken_as_it_was_returned() -> None:
    backend, store = watched_store()
    live = {id_: id_ for id_ in range(100)}
    many = _many(store, lambda _: live)
    gate = backend.hold("set")
    call = asyncio.create_task(many(list(range(100))))
    await settle(100)
    live.clear()
    live[50] = -1
    gate.set()
    assert await call == {id_: id_ for id_ in range(100)}
    assert await many(list(range(100))) == {id_: id_ for id_ in range(100)}


@pytest.mark.parametrize("near", [None, NearCache(30)], ids=["far", "near"])
async def test_results_of_a_live_mapping_are_every_callers_own(near: NearCache | None, store: AsyncKVStore) -> None:
    live = {1: ["a"]}
    many = _many(store, lambda _: live, near=near)
    (await many([1]))[1].append("b")
    live[1].append("c")
    assert await many([1]) == {1: ["a"]}
    (await many([1]))[1].append("d")
    assert await many([1]) == {1: ["a"]}


class Lazy(Mapping[int, int]):
    """A mapping of its own kind, which counts how often it is asked."""

    def __init__(self) -> None:
        self.closed = False

    def __getitem__(self, id_: int) -> int:
        if self.closed:
            raise RuntimeError("the connection is closed")
        if id_ > 2:
            raise KeyError(id_)
        return id_ * 10

    def __iter__(self) -> Iterator[int]:
        return iter([1, 2])

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("answer", [Lazy(), MappingProxyType({1: 10, 2: 20})], ids=lambda answer: type(answer).__name__)
async def test_any_mapping_will_do(answer: Mapping[int, int], store: AsyncKVStore) -> None:
    many = _many(store, lambda _: answer)
    assert await many([2, 1]) == {2: 20, 1: 10}
    assert await many([1, 2]) == {1: 10, 2: 20}
    assert await many([1, 3]) == {1: 10}


async def test_mapping_that_dies_after_its_return_is_read_at_once() -> None:
    backend, store = watched_store()
    lazy = Lazy()
    many = _many(store, lambda _: lazy)
    gate = backend.hold("set")
    call = asyncio.create_task(many([1, 2]))
    await settle(50)
    lazy.closed = True
    gate.set()
    assert await call == {1: 10, 2: 20}


class Repository:
    @kv_cached_many(60, store=watched_store()[1], ignore=["self"])
    async def users(self, user_ids: list[int], locale: str = "en") -> dict[int, str]:
        return {id_: f"{locale}-{id_}" for id_ in user_ids}


_module_store = watched_store()[1]


@kv_cached_many(60, store=_module_store)
async def users(user_ids: list[int], locale: str = "en") -> dict[int, str]:
    return {id_: f"{locale}-{id_}" for id_ in user_ids}


async def test_ids_may_be_given_by_name() -> None:
    call: Any = users
    assert await call(user_ids=[1, 2]) == {1: "en-1", 2: "en-2"}
    assert await call(user_ids=iter([2, 2, 1]), locale="no") == {2: "no-2", 1: "no-1"}
    assert await call(locale="no", user_ids=[1]) == {1: "no-1"}
    # One entry, however it is asked for.
    assert users.info().hits == 1
    assert await users([1]) == {1: "en-1"}
    assert users.info().hits == 2


async def test_ids_may_be_given_by_name_to_a_method() -> None:
    call: Any = Repository().users
    assert await call(user_ids=[1, 2], locale="no") == {1: "no-1", 2: "no-2"}
    with cache_bypass():
        assert await call(user_ids=[2]) == {2: "en-2"}


async def test_unknown_name_of_the_ids_is_refused_as_a_call_of_the_function_is() -> None:
    call: Any = users
    with pytest.raises(TypeError):
        await call(numbers=[1])
    with pytest.raises(TypeError):
        await call([1], user_ids=[1])
    with pytest.raises(TypeError):
        await call()


@pytest.mark.parametrize("answer", [{"1": "a", "2": "b"}, {1: "a", "2": "b"}, {b"1": "a", 2: "b"}], ids=["all", "one", "bytes"])
@pytest.mark.parametrize("mode", ["use", "refresh"])
async def test_ids_answered_under_another_type_are_an_error(answer: Any, mode: str, store: AsyncKVStore) -> None:
    many = _many(store, lambda _: answer)
    for _ in range(2):
        with MODES[mode](), pytest.raises((TypeError, ValueError, LookupError), match=r"str|bytes"):
            await many([1, 2])


async def test_ids_of_text_answered_by_number_are_an_error(store: AsyncKVStore) -> None:
    @kv_cached_many(60, store=store, key=lambda id_: id_)
    async def many(ids: list[str]) -> dict[Any, int]:
        return {int(id_): 0 for id_ in ids}

    with pytest.raises((TypeError, ValueError, LookupError), match="int"):
        await many(["1", "2"])


async def test_answer_with_more_ids_than_were_asked_for_is_taken(store: AsyncKVStore) -> None:
    many = _many(store, lambda ids: dict.fromkeys([*ids, 77, 78], 0))
    assert await many([1, 2]) == {1: 0, 2: 0}
    assert await many.peek([77]) == {}


async def test_answer_without_some_ids_is_taken(store: AsyncKVStore) -> None:
    many = _many(store, lambda ids: {id_: id_ for id_ in ids if id_ > 1})
    assert await many([1, 2]) == {2: 2}
    assert await _many(watched_store()[1], lambda _: {})([1, 2]) == {}
