"""Type assertions in the syntax of Python 3.12: type parameters, under annotations that are text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self, assert_type

from aiokv import kv_cached, kv_cached_many


@dataclass
class Item[T]:
    value: T


@kv_cached(ttl=60)
async def wrap[T](value: T, times: int = 1) -> list[Item[T]]:
    return [Item(value)] * times


@kv_cached_many(ttl=60)
async def titles[V](ids: list[int], title: V, locale: str = "en") -> dict[int, V]:
    return dict.fromkeys(ids, title) if locale else {}


class Shape:
    def __init__(self, size: int) -> None:
        self.size = size

    @kv_cached(ttl=60)
    @classmethod
    async def above(cls, size: int) -> Self:
        return cls(size)

    @kv_cached(ttl=60)
    async def grown[T](self, by: T, times: int = 1) -> Item[T]:
        del times
        return Item(by)


class Box[T]:
    def __init__(self, value: T) -> None:
        self.value = value

    @kv_cached(ttl=60, ignore="self")
    async def content(self, times: int) -> list[int]:
        return [times]


class HasContent(Protocol):
    async def content(self, times: int) -> list[int]: ...


def take(holder: HasContent) -> None:
    del holder


async def functions(shape: Shape, box: Box[str]) -> None:
    await wrap(1)
    await wrap(value="x", times=2)
    assert_type(wrap.key(1), str)
    await wrap.invalidate("x", 2)
    await titles([1], "x")
    await titles.invalidate([1], "x", locale="no")
    await Shape.above(1)
    await shape.above.invalidate(size=1)
    await shape.grown(1, times=2)
    assert_type(await box.content(times=1), list[int])
    take(box)
    await wrap(1, times="x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await box.content("x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
