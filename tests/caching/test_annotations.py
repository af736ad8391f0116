"""Return annotations that say a type in other ways: type parameters, `Self`, names of the class; before and after shipping."""

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Self, TypeVar

import pytest
from shipped_project import ship

from aiokv import AsyncKVStore, kv_cached, kv_cached_many
from aiokv.caching.annotation import return_annotation

T = TypeVar("T")
kv = AsyncKVStore("db", url="memory://annotations")


@dataclasses.dataclass
class Shape:
    size: int

    @kv_cached(60, store=kv)
    @classmethod
    async def above(cls, size: int) -> Self:
        return cls(size)

    @classmethod
    @kv_cached(60, store=kv)
    async def below(cls, size: int) -> Self | None:
        return cls(size)

    @kv_cached(60, store=kv)
    async def __private(self, by: int) -> "Self | None":
        return type(self)(self.size + by)

    @kv_cached(60, store=kv)
    async def list_of(self, by: int) -> Annotated[list[Self], "a list"]:
        return [type(self)(self.size + by)]

    @kv_cached_many(60, store=kv)
    @classmethod
    async def many(cls, ids: list[int]) -> dict[int, Self]:
        return {size: cls(size) for size in ids}

    async def grow(self, by: int) -> "Self":
        return await self.__private(by)


class Round(Shape):
    pass


async def test_self_is_the_class_that_the_method_stands_in() -> None:
    before = [Shape.above.info().computations, Shape.many.info().computations]
    for _ in range(2):
        assert await Shape.above(1) == await Shape.below(1) == Shape(1)
        assert await Shape(1).grow(2) == Shape(3)
        assert await Shape(1).list_of(2) == [Shape(3)]
        assert await Shape.many([1, 2]) == {1: Shape(1), 2: Shape(2)}
    assert [Shape.above.info().computations - before[0], Shape.many.info().computations - before[1]] == [1, 2]


async def test_self_of_a_subclass_is_returned_as_it_is_and_not_stored(caplog: pytest.LogCaptureFixture) -> None:
    before = Shape.above.info()
    for _ in range(2):
        assert await Round.above(1) == Round(1)
        assert await Round(1).list_of(2) == [Round(3)]
        assert await Round.many([1]) == {1: Round(1)}
    after = Shape.above.info()
    assert (after.computations - before.computations, after.not_stored - before.not_stored) == (2, 2)
    assert len([record for record in caplog.records if "above: its result is of a subclass of Shape" in record.message]) == 1


@kv_cached(60, store=kv)
async def shape_of(size: int) -> Shape:
    return Round(size)


async def test_subclass_of_another_class_than_the_methods_own_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="comes back as Shape, not Round"):
        await shape_of(1)


async def test_self_of_a_class_that_its_name_does_not_lead_to_is_a_type_error_that_says_what_to_do() -> None:
    class Local:
        @kv_cached(60, store=kv, key=lambda cls: "one")  # noqa: ARG005 (the name of the class's parameter)
        @classmethod
        async def of(cls) -> Self:
            return cls()

    with pytest.raises(TypeError, match=r"Local\.of: .* \(Self is the class of .*Local\.of, .*pass returns="):
        await Local.of()


def test_class_of_the_same_name_from_before_is_not_taken() -> None:
    module = types.ModuleType("again")
    source = "class Again:\n    async def of(self) -> Self: ..."
    exec(f"from typing import Self\n{source}", vars(module))
    old = module.Again
    assert return_annotation(old.of) is old
    exec(source, vars(module))
    assert return_annotation(module.Again.of) is module.Again is not old
    with pytest.raises(NameError, match="Self"):
        return_annotation(old.of)


@pytest.mark.parametrize(
    ("annotation", "resolved"),
    [
        (Self, Shape),
        (Self | None, Shape | None),
        (Optional[Self], Optional[Shape]),  # noqa: UP045 (another class at run time)
        (list[Self], list[Shape]),
        (dict[str, tuple[Self, int]], dict[str, tuple[Shape, int]]),
        (Annotated[Self, "x"], Annotated[Shape, "x"]),
        (Literal["Self"], Literal["Self"]),
        (T, Any),
        (list[int], list[int]),
    ],
)
def test_annotation_is_resolved(annotation: Any, resolved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def method() -> None: ...

    method.__qualname__ = "Shape.of_test"
    method.__annotations__["return"] = annotation
    monkeypatch.setattr(Shape, "of_test", method, raising=False)
    assert return_annotation(method) == resolved


async def test_result_of_an_unlimited_type_variable_counts_as_not_annotated() -> None:
    @kv_cached(60, store=kv, key=repr)
    async def same(value: T) -> T:
        return value

    assert [await same([1]), await same([1])] == [[1], [1]]
    with pytest.raises(TypeError, match="annotate the return type"):
        await same((1,))


NEWER = """
from __future__ import annotations

import dataclasses
from aiokv import kv_cached, kv_cached_many

@dataclasses.dataclass
class Item[T]:
    value: T

@kv_cached(60, store=kv)
async def same[T](value: T) -> T:
    return value

@kv_cached(60, store=kv)
async def listed[T: (int, str)](value: T) -> list[T]:
    return [value]

@kv_cached_many(60, store=kv)
async def many[K: int](ids: list[K]) -> dict[K, tuple[K, str]]:
    return {id_: (id_, "x") for id_ in ids}

class Box[T]:
    @dataclasses.dataclass
    class Inner:
        size: int

    @kv_cached(60, store=kv, ignore="self")
    async def of_class(self, value: T) -> list[T]:
        return [value]

    @kv_cached(60, store=kv, ignore="self")
    async def inner(self, size: int) -> Inner:
        return Box.Inner(size)
"""


@pytest.fixture
def newer(tmp_path: Path) -> Any:
    if sys.version_info < (3, 12):
        pytest.skip("type parameters came with Python 3.12")
    module = types.ModuleType("newer")
    module.kv = AsyncKVStore("db", url=f"sqlite:///{tmp_path / 'kv.db'}")  # type: ignore[attr-defined]
    # Dataclasses look for their module there.
    sys.modules["newer"] = module
    exec(NEWER, vars(module))
    yield module
    del sys.modules["newer"]


def unshipped(module: Any) -> Any:
    return module


def shipped(module: Any) -> Any:
    cloudpickle = pytest.importorskip("cloudpickle")
    cloudpickle.register_pickle_by_value(module)
    same, listed, many, box = ship((module.same, module.listed, module.many, module.Box))
    cloudpickle.unregister_pickle_by_value(module)
    assert same is not module.same
    return types.SimpleNamespace(same=same, listed=listed, many=many, Box=box)


@pytest.mark.parametrize("way", [unshipped, shipped])
async def test_type_parameters_under_future_annotations_are_resolved(newer: Any, way: Callable[[Any], Any]) -> None:
    module = way(newer)
    for _ in range(2):
        assert await module.same([1]) == [1]
        assert await module.listed("x") == ["x"]
        assert await module.many([1, 2]) == {1: (1, "x"), 2: (2, "x")}
        assert await module.Box().of_class(1) == [1]
        assert await module.Box().inner(3) == module.Box.Inner(3)
    assert [cached.info().computations for cached in (module.same, module.listed, module.many)] == [1, 1, 2]
