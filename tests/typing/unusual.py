"""Type assertions about functions whose first parameter accepts anything, about protocols, and about overriding."""

from typing import Any, Protocol, TypeVar, assert_type

from aiokv import kv_cached, kv_cached_many

T = TypeVar("T")
N = TypeVar("N", int, str)


class Shape:
    pass


@kv_cached(ttl=60)
async def of_object(value: object, times: int = 1) -> str:
    return str(value) * times


@kv_cached(ttl=60)
async def of_any(value: Any, times: int = 1) -> str:
    return str(value) * times


@kv_cached(ttl=60)
async def of_type_variable(value: T, times: int = 1) -> list[T]:
    return [value] * times


@kv_cached(ttl=60)
async def of_constrained(value: N) -> N:
    return value


@kv_cached(ttl=60)
async def untyped(value, times=1):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    return value * times


@kv_cached(ttl=60)
async def of_class(kind: type[Shape], size: int) -> float:
    return size * len(kind.__name__)


@kv_cached(ttl=60)
async def positional_only(value: object, /, times: int = 1) -> str:
    return str(value) * times


async def functions() -> None:
    assert_type(await of_object("x", times=2), str)
    assert_type(await of_object(value=1), str)
    assert_type(of_object.key(value=1), str)
    await of_object.invalidate(value=1)
    assert_type(await of_any(1, 2), str)
    assert_type(await of_any(value=1), str)
    await of_any.refresh(value=1)
    await of_type_variable(1, times=2)
    await of_type_variable(value="x")
    await of_type_variable.invalidate("x")
    await of_constrained(1)
    await untyped(1, times=2)
    await untyped.invalidate(value=1)
    assert_type(await of_class(Shape, 1), float)
    assert_type(await of_class(kind=Shape, size=1), float)
    await of_class.invalidate(Shape, 1)
    assert_type(await positional_only(1), str)
    await positional_only.invalidate(1)
    await of_object()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await of_object(1, times="x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await of_class(1, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class Answers(Protocol):
    async def answer(self, question: str, effort: int = 1) -> list[int]: ...
    async def titles(self, ids: list[int], locale: str = "en") -> dict[int, str]: ...


class App:
    @kv_cached(ttl=60)
    async def answer(self, question: str, effort: int = 1) -> list[int]:
        return [len(question) * effort]

    @kv_cached_many(ttl=60)
    async def titles(self, ids: list[int], locale: str = "en") -> dict[int, str]:
        return dict.fromkeys(ids, locale)

    @kv_cached(ttl=60)
    async def untyped(self, question):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        return question

    @staticmethod
    @kv_cached(ttl=60)
    async def of_object(value: object) -> bytes:
        return bytes(str(value), "utf-8")

    @staticmethod
    @kv_cached(ttl=60)
    async def of_size(size: int, scale: int = 1) -> bytes:
        return bytes(size * scale)

    @classmethod
    @kv_cached(ttl=60)
    async def of_class(cls, size: int) -> float:
        return float(size)


class Special(App):
    @kv_cached(ttl=60)
    async def answer(self, question: str, effort: int = 1) -> list[int]:
        return [len(question) - effort]


class Other:
    async def answer(self, question: str, effort: int = 1) -> int:
        return len(question) * effort

    @kv_cached_many(ttl=60)
    async def titles(self, ids: list[str]) -> dict[str, str]:
        return dict.fromkeys(ids, "")


def ask(answers: Answers) -> None:
    del answers


async def methods(app: App) -> None:
    ask(app)
    ask(Special())
    ask(Other())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(await app.answer("why", effort=2), list[int])
    assert_type(await app.answer(question="why"), list[int])
    assert_type(await App.answer(app, "why"), list[int])
    assert_type(app.answer.key("why"), str)
    assert_type(App.answer.key(app, "why"), str)
    await app.answer.invalidate(question="why")
    await app.answer.prime([1], "why")
    await app.answer()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await App.answer("why")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await app.answer.prime(["x"], "why")  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    await app.untyped("why")
    await app.untyped.invalidate("why")
    assert_type(await App.of_size(1), bytes)
    assert_type(await app.of_size(1, scale=2), bytes)
    assert_type(app.of_size.key(1), str)
    await app.of_size.invalidate(size=1)
    assert_type(await App.of_object(1), bytes)
    assert_type(await App.of_class(1), float)
    assert_type(await app.of_class(1), float)
