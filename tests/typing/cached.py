"""Type assertions that only type checkers run: what kv_cached does to a function's type."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_type

from aiokv import (
    AsyncKVStore,
    CachedFunction,
    CacheInfo,
    KVStore,
    Peeked,
    PlainCachedFunction,
    kv_cached,
    kv_cached_many,
)


@dataclass
class Forecast:
    city: str


@kv_cached(ttl=60)
async def forecast(city: str, *, units: str = "metric") -> Forecast:
    return Forecast(f"{city} {units}")


class App:
    kv: AsyncKVStore

    @kv_cached(ttl=60, store=lambda self: self.kv, ignore=("self",))
    async def answer(self, question: str, /, effort: int = 1) -> list[int]:
        return [len(question) * effort]

    @classmethod
    @kv_cached(ttl=60)
    async def of_class(cls, size: int) -> float:
        return float(size)

    @kv_cached(ttl=60)
    @classmethod
    async def of_class_below(cls, size: int) -> float:
        return float(size)

    @kv_cached_many(ttl=60)
    async def titles(self, ids: list[int], locale: str = "en") -> dict[int, str] | None:
        return dict.fromkeys(ids, locale)

    @kv_cached_many(ttl=60)
    @classmethod
    async def titles_of_class(cls, ids: list[int], locale: str = "en") -> dict[int, str]:
        return dict.fromkeys(ids, locale)

    @staticmethod
    @kv_cached(ttl=60)
    async def of_nobody(size: int) -> bytes:
        return bytes(size)


@kv_cached_many(ttl=60)
async def users(ids: list[int], locale: str = "en") -> Mapping[int, str]:
    return dict.fromkeys(ids, locale)


async def functions() -> None:
    assert_type(await forecast("Oslo", units="imperial"), Forecast)
    assert_type(forecast.key("Oslo"), str)
    assert_type(await forecast.peek("Oslo"), Peeked[Forecast] | None)
    assert_type(await forecast.refresh("Oslo"), Forecast)
    assert_type(await forecast.prime(Forecast("Oslo"), "Oslo"), None)
    assert_type(await forecast.invalidate("Oslo"), None)
    assert_type(forecast.info(), CacheInfo)
    await forecast(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await forecast("Oslo", unit="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await forecast.invalidate()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await forecast.prime("Oslo", "Oslo")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def methods(app: App) -> None:
    assert_type(await app.answer("why"), list[int])
    assert_type(await app.answer("why", effort=2), list[int])
    assert_type(app.answer.key("why"), str)
    await app.answer.invalidate("why")
    await app.answer(question="why")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await app.answer(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(await App.of_class(1), float)
    assert_type(await app.of_class(1), float)
    assert_type(await App.of_nobody(1), bytes)
    assert_type(await app.of_nobody(1), bytes)
    assert_type(await App.answer(app, "why"), list[int])
    assert_type(await App.of_class_below(1), float)
    assert_type(await app.of_class_below(1), float)
    assert_type(await app.titles([1], locale="no"), dict[int, str])
    assert_type(await app.titles_of_class([1]), dict[int, str])
    assert_type(await App.titles_of_class([1], "no"), dict[int, str])
    await app.titles(["a"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    await App.of_class_below("x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await App.of_class_below.invalidate(1)
    await App.titles_of_class.invalidate([1])
    await App.of_class.invalidate(1)
    await App.of_nobody.invalidate(1)


async def many(ids: Sequence[int]) -> None:
    assert_type(await users(ids), dict[int, str])
    assert_type(await users(ids, locale="no"), dict[int, str])
    assert_type(await users(ids=ids, locale="no"), dict[int, str])
    assert_type(users.key(1), str)
    assert_type(await users.peek(ids), dict[int, Peeked[str]])
    assert_type(await users.peek(ids=ids, locale="no"), dict[int, Peeked[str]])
    assert_type(await users.refresh(ids, locale="no"), dict[int, str])
    assert_type(await users.prime({1: "x"}, locale="no"), None)
    assert_type(await users.invalidate(ids, "no"), None)
    await users.prime({1: 2})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
    await users.peek(["a"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    await users.refresh(ids, place="no")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await users.invalidate()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await users(["a"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]


@kv_cached(ttl=60)
def square(size: int, *, scale: float = 1.0) -> float:
    return size * size * scale


@kv_cached_many(ttl=60)
def names(ids: list[int], locale: str = "en") -> dict[int, str]:
    return dict.fromkeys(ids, locale)


class Plain:
    kv: KVStore

    @kv_cached(ttl=60, store=lambda self: self.kv, ignore=("self",))
    def answer(self, question: str, /, effort: int = 1) -> list[int]:
        return [len(question) * effort]

    @classmethod
    @kv_cached(ttl=60)
    def of_class(cls, size: int) -> float:
        return float(size)

    @kv_cached(ttl=60)
    @classmethod
    def of_class_below(cls, size: int) -> float:
        return float(size)

    @staticmethod
    @kv_cached(ttl=60)
    def of_nobody(size: int) -> bytes:
        return bytes(size)

    @kv_cached_many(ttl=60)
    def titles(self, ids: list[int], locale: str = "en") -> dict[int, str] | None:
        return dict.fromkeys(ids, locale)

    @kv_cached_many(ttl=60)
    @classmethod
    def titles_of_class(cls, ids: list[int], locale: str = "en") -> dict[int, str]:
        return dict.fromkeys(ids, locale)


def plain_functions(plain: Plain) -> None:
    assert_type(square(3, scale=2.0), float)
    assert_type(square.key(3), str)
    assert_type(square.peek(3), Peeked[float] | None)
    assert_type(square.refresh(3), float)
    assert_type(square.info(), CacheInfo)
    square.prime(9.0, 3)
    square.invalidate(3)
    square.close()
    square("3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    square(3, unit=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    square.prime("9", 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    square.aclose()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    assert_type(plain.answer("why", effort=2), list[int])
    assert_type(Plain.answer(plain, "why"), list[int])
    plain.answer.invalidate("why")
    plain.answer(question="why")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_type(Plain.of_class(1), float)
    assert_type(plain.of_class_below(1), float)
    assert_type(Plain.of_nobody(1), bytes)
    assert_type(plain.of_nobody(1), bytes)
    assert_type(names([1], locale="no"), dict[int, str])
    assert_type(names(ids=[1]), dict[int, str])
    assert_type(names.peek([1]), dict[int, Peeked[str]])
    assert_type(names.refresh([1]), dict[int, str])
    names.prime({1: "x"})
    names.invalidate([1])
    names(["a"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    assert_type(plain.titles([1], locale="no"), dict[int, str])
    assert_type(Plain.titles_of_class([1], "no"), dict[int, str])


def taken_as_a_parameter(cached: CachedFunction[[str], int]) -> None:
    assert_type(cached.key("x"), str)


def plain_one_taken_as_a_parameter(cached: PlainCachedFunction[[str], int]) -> None:
    assert_type(cached("x"), int)
