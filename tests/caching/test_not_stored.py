"""A value that cannot be stored is returned, counted and logged once; lifetimes at the edges."""

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
from caching_under_test import Events, MovedTime, watched_store

from aiokv import MAX_TTL_SECONDS, AsyncKVStore, NearCache, ValueTooLargeError, kv_cached, kv_cached_many


class Refusing:
    """A codec step that refuses what it is given."""

    name = "refusing"
    required = False

    def encode(self, data: bytes, key: str) -> bytes:
        raise ValueError(f"{data!r} of {key} is too much")

    def decode(self, data: bytes, key: str) -> bytes:
        raise ValueError(f"{data!r} of {key} is none of mine")


class Answer:
    """What the functions below return."""

    value: Any = None


answer = Answer()


async def number() -> float:
    return answer.value  # type: ignore[no-any-return]


async def whole() -> int:
    return answer.value  # type: ignore[no-any-return]


async def text() -> str:
    return answer.value  # type: ignore[no-any-return]


async def numbers() -> list[float]:
    # For a moment: a result that is there at once is joined by nobody where tasks are eager.
    await asyncio.sleep(0)
    return answer.value  # type: ignore[no-any-return]


async def mapping() -> dict[str, float]:
    return answer.value  # type: ignore[no-any-return]


async def anything() -> Any:
    return answer.value


UNSTORABLE = pytest.mark.parametrize(
    ("function", "value"),
    [
        (number, math.nan),
        (number, math.inf),
        (number, -math.inf),
        (numbers, [1.0, math.nan]),
        (mapping, {"a": math.inf}),
        (whole, 2**70),
        (whole, -(2**70)),
        (text, "\ud800"),
        (text, "fine \udfff not"),
        (text, "x" * 2_000_000),
        (anything, math.nan),
        (anything, [2**70]),
        (anything, {"a": "\ud800"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else repr(value)[:20],
)


def _same(one: Any, other: Any) -> bool:
    return bool(one == other or repr(one) == repr(other))


@UNSTORABLE
async def test_value_that_cannot_be_stored_is_returned_and_counted(function: Callable[..., Any], value: Any) -> None:
    backend, store = watched_store()
    events = Events()
    cached = kv_cached(60, store=store, observer=events, near=NearCache(30))(function)
    answer.value = value
    for _ in range(3):
        assert _same(await cached(), value)
    info: Any = cached.info()
    assert (info.computations, info.not_stored, info.hits, info.near_hits) == (3, 3, 0, 0)
    assert events.count("not_stored") == 3
    assert backend._entries == {}


@UNSTORABLE
async def test_value_that_cannot_be_stored_is_logged_once_and_not_shown(
    function: Callable[..., Any], value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cached = kv_cached(60, store=watched_store()[1])(function)
    answer.value = value
    with caplog.at_level(logging.INFO, "aiokv"):
        for _ in range(3):
            await cached()
    (record,) = caplog.records
    message = record.getMessage()
    assert function.__name__ in message
    assert not any(shown in message for shown in ("xxxx", "fine", str(2**70)))
    assert "annotate" not in message


@UNSTORABLE
async def test_storable_value_after_one_that_was_not_is_stored(function: Callable[..., Any], value: Any) -> None:
    cached = kv_cached(60, store=watched_store()[1])(function)
    answer.value = value
    await cached()
    answer.value = {number: 1.5, whole: 1, text: "a", numbers: [1.0], mapping: {"a": 1.0}, anything: 1}[function]
    assert await cached() == answer.value
    assert await cached() == answer.value
    assert cached.info().hits == 1


@UNSTORABLE
async def test_refresh_that_brings_what_cannot_be_stored_leaves_nothing_older(function: Callable[..., Any], value: Any) -> None:
    cached = kv_cached(60, store=watched_store()[1], near=NearCache(30))(function)
    answer.value = {number: 1.5, whole: 1, text: "a", numbers: [1.0], mapping: {"a": 1.0}, anything: 1}[function]
    await cached()
    answer.value = value
    assert _same(await cached.refresh(), value)
    assert await cached.peek() is None
    assert _same(await cached(), value)


async def test_those_who_wait_for_what_cannot_be_stored_get_it_too() -> None:
    cached = kv_cached(60, store=watched_store()[1])(numbers)
    answer.value = [math.inf, 1.0]
    results = await asyncio.gather(*(cached() for _ in range(5)))
    assert results == [[math.inf, 1.0]] * 5
    results[0].append(2.0)
    assert results[1:] == [[math.inf, 1.0]] * 4


async def test_value_that_a_codec_refuses_is_returned_and_not_stored(caplog: pytest.LogCaptureFixture) -> None:
    backend, store = watched_store()
    cached = kv_cached(60, store=store, codec=Refusing())(text)
    answer.value = "s3cret"
    for _ in range(3):
        assert await cached() == "s3cret"
    info: Any = cached.info()
    assert info.not_stored == 3
    assert backend.asked("set") == 0
    assert "s3cret" not in caplog.text


async def test_one_id_that_cannot_be_stored_spoils_no_other() -> None:
    @kv_cached_many(60, store=watched_store()[1], key=lambda id_: id_)
    async def many(ids: list[int]) -> dict[int, float]:
        return {id_: math.nan if id_ == 2 else float(id_) for id_ in ids}

    results = await many([1, 2, 3])
    assert math.isnan(results.pop(2))
    assert results == {1: 1.0, 3: 3.0}
    await many([1, 2, 3])
    info: Any = many.info()
    assert (info.hits, info.not_stored) == (2, 2)


async def test_result_that_is_not_to_be_stored_is_counted_too() -> None:
    @kv_cached(60, store=watched_store()[1], key=lambda: "one", when=lambda _: False)
    async def one() -> int:
        return 1

    await one()
    await one()
    info: Any = one.info()
    assert info.not_stored == 2


async def test_type_that_cannot_be_stored_is_refused_at_the_first_call() -> None:
    class Handle:
        pass

    @kv_cached(60, store=watched_store()[1], key=lambda: "one")
    async def one() -> Any:
        return Handle()

    with pytest.raises(TypeError):
        await one()


async def test_too_large_a_result_raises_where_that_was_asked_for() -> None:
    cached = kv_cached(60, store=watched_store()[1], on_oversize="raise")(text)
    answer.value = "x" * 2_000_000
    with pytest.raises(ValueTooLargeError):
        await cached()


# Lifetimes


def _lasting(store: AsyncKVStore, ttl: Any, **options: Any) -> Any:
    @kv_cached(ttl, store=store, key=lambda: "one", early=0, **options)
    async def one() -> int:
        return 1

    return one


@pytest.mark.parametrize("ttl", [0, 0.0, -1, -3_600.5, -math.inf], ids=repr)
async def test_result_whose_time_is_over_is_returned_and_not_stored(ttl: float) -> None:
    backend, store = watched_store()
    one = _lasting(store, lambda _: ttl)
    assert await one() == await one() == 1
    assert (one.info().computations, one.info().not_stored, backend.asked("set")) == (2, 2, 0)


@pytest.mark.parametrize("ttl", [MAX_TTL_SECONDS + 1, 10 * MAX_TTL_SECONDS, 1e18, math.inf], ids=repr)
def test_result_that_would_last_over_thirty_days_lasts_thirty(ttl: float, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        one = _lasting(watched_store(moved_time.now)[1], lambda _: ttl)
        await one()
        moved_time.advance(MAX_TTL_SECONDS - 10)
        await one()
        assert one.info().computations == 1
        moved_time.advance(20)
        await one()
        assert one.info().computations == 2

    moved_time.run(scenario())


@pytest.mark.parametrize("ttl", [math.nan, "60", True, [60]], ids=repr)
async def test_time_that_is_none_is_refused_by_name(ttl: Any) -> None:
    one = _lasting(watched_store()[1], lambda _: ttl)
    with pytest.raises((TypeError, ValueError), match="ttl"):
        await one()


async def test_id_whose_time_is_over_is_returned_and_not_stored() -> None:
    @kv_cached_many(lambda result: result, store=watched_store()[1], key=lambda id_: id_)
    async def many(ids: list[int]) -> dict[int, int]:
        return {id_: id_ for id_ in ids}

    for _ in range(2):
        assert await many([-5, 0, 60, 10**9]) == {-5: -5, 0: 0, 60: 60, 10**9: 10**9}
    info: Any = many.info()
    assert (info.hits, info.not_stored) == (2, 4)


@pytest.mark.parametrize("of", ["one", "many"])
def test_lifetime_counts_from_the_end_of_the_computation(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        store = watched_store(moved_time.now)[1]
        runs = 0

        async def compute() -> int:
            nonlocal runs
            runs += 1
            await asyncio.sleep(100)
            return runs

        one: Any = kv_cached(60, store=store, key=lambda: "one", early=0)(compute)
        call = one
        if of == "many":

            @kv_cached_many(60, store=store, key=lambda id_: id_, early=0)
            async def many(ids: list[int]) -> dict[int, int]:
                return dict.fromkeys(ids, await compute())

            call = lambda: many([1])  # noqa: E731 (the other way to call)
        await call()
        moved_time.advance(55)
        await call()
        assert runs == 1
        moved_time.advance(10)
        await call()
        assert runs == 2

    moved_time.run(scenario())


def test_near_result_lasts_from_the_end_of_the_computation(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        @kv_cached(60, store=watched_store(moved_time.now)[1], key=lambda: "one", near=NearCache(30), early=0)
        async def one() -> int:
            await asyncio.sleep(100)
            return 1

        await one()
        moved_time.advance(25)
        await one()
        assert one.info().near_hits == 1

    moved_time.run(scenario())
