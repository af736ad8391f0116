"""What callers of a cached function get: what the function returned or raised, and nothing that others can change."""

import asyncio
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import math
import traceback
import uuid
from typing import Any, NamedTuple

import pydantic
import pytest
from helpers import stable_id
from typing_extensions import TypedDict

from aiokv import AsyncKVStore, NearCache, kv_cached


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: float
    tags: list[str]


@dataclasses.dataclass(frozen=True)
class Line:
    ends: tuple[Point, Point]


class Pair(NamedTuple):
    left: int
    right: str


class Record(TypedDict):
    name: str
    size: int


class Model(pydantic.BaseModel):
    at: dt.datetime
    price: decimal.Decimal


RESULTS = [
    (Any, None),
    (None, None),
    (int, 2**63),
    (bool, True),
    (float, 0.1),
    (str, "Grüße 😀 \0"),
    (list[int], [1, 2]),
    (dict[str, list[int]], {"a": [1], "": []}),
    (Any, {"deep": [{"er": [None, True, 1, 1.0, "1"]}]}),
    (tuple[int, str], (1, "a")),
    (tuple[int, ...], ()),
    (dict[int, str], {1: "a"}),
    (set[int], {1, 2}),
    (frozenset[str], frozenset({"a"})),
    (bytes, b"\x00\xff"),
    (dt.datetime, dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC)),
    (dt.timedelta, dt.timedelta(days=1, microseconds=1)),
    (decimal.Decimal, decimal.Decimal("1.10")),
    (uuid.UUID, uuid.UUID(int=7)),
    (Colour, Colour.RED),
    (Point, Point(1.5, ["a"])),
    (Line, Line((Point(0.0, []), Point(1.0, ["b"])))),
    (Pair, Pair(1, "a")),
    (Record, {"name": "a", "size": 1}),
    (Model, Model(at=dt.datetime(2024, 1, 1, tzinfo=dt.UTC), price=decimal.Decimal("1.10"))),
    (list[Point] | None, [Point(1.0, [])]),
    (list[Point] | None, None),
]


def _types(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (type(value), [_types(item) for item in value])
    return type(value)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize(("returns", "result"), RESULTS, ids=lambda value: str(value)[:40])
async def test_hit_returns_what_the_miss_returned(returns: Any, result: Any, *, near: bool, store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda: "one", returns=returns, near=NearCache(30) if near else None)
    async def compute() -> Any:
        return copy.deepcopy(result)

    miss, hit, again = await compute(), await compute(), await compute()
    assert miss == hit == again == result
    assert _types(miss) == _types(hit) == _types(again) == _types(result)
    assert compute.info().computations == 1


@pytest.mark.parametrize(
    ("returns", "result"),
    [
        (Any, (1, 2)),
        (Any, {1: "a"}),
        (Any, b"bytes"),
        (Any, object()),
        (Any, [Point(1.0, [])]),
        (list[int], [1, (2, 3)]),
        (tuple[int, int], [1, 2]),
        (Point, {"x": 1.0, "tags": []}),
        (tuple[int, int], (True, 2)),
        (tuple[int, ...], (enum.IntEnum("Small", "ONE").ONE,)),  # type: ignore[attr-defined]
        (dict[str, tuple[bool, str]], {"a": (1, "b")}),
        (frozenset[int], frozenset({True})),
        (Pair, Pair(True, "a")),
        (Point, Point(1.0, [enum.StrEnum("Tag", "RED").RED])),  # type: ignore[attr-defined]
    ],
    ids=stable_id,
)
async def test_result_that_would_come_back_changed_is_refused_and_not_stored(
    returns: Any, result: Any, store: AsyncKVStore
) -> None:
    @kv_cached(60, store=store, key=lambda: "one", returns=returns)
    async def compute() -> Any:
        return result

    for _ in range(2):
        with pytest.raises(TypeError, match=r"returns=|return type"):
            await compute()
    assert await store.get(compute.key()) is None


@pytest.mark.parametrize(("returns", "result"), [(Any, math.nan), (float, math.inf), (Any, 2**64), (str, "\ud800")], ids=ascii)
async def test_value_that_json_cannot_bear_is_returned_and_not_stored(
    returns: Any, result: Any, store: AsyncKVStore, caplog: pytest.LogCaptureFixture
) -> None:
    @kv_cached(60, store=store, key=lambda: "one", returns=returns)
    async def compute() -> Any:
        return result

    for _ in range(2):
        assert await compute() is result
    assert await store.get(compute.key()) is None
    assert (compute.info().computations, compute.info().not_stored, len(caplog.records)) == (2, 2, 1)


@pytest.mark.parametrize("near", [False, True])
async def test_callers_cannot_change_what_others_get(*, near: bool, store: AsyncKVStore) -> None:
    original: list[dict[str, int]] = [{"a": 1}]

    @kv_cached(60, store=store, key=lambda: "one", near=NearCache(30) if near else None)
    async def compute() -> list[dict[str, int]]:
        await asyncio.sleep(0)
        return original

    for _ in range(4):
        one, other = await asyncio.gather(compute(), compute())
        assert one == other == [{"a": 1}]
        one[0]["a"] = 99
        other.clear()
    original.clear()
    assert await compute() == [{"a": 1}]


async def test_what_the_function_still_holds_cannot_change_what_is_stored(store: AsyncKVStore) -> None:
    held: list[Point] = []

    @kv_cached(60, store=store, key=lambda: "one")
    async def compute() -> Point:
        held.append(Point(1.0, ["a"]))
        return held[0]

    first = await compute()
    held[0].tags.append("b")
    assert (first, await compute()) == (Point(1.0, ["a"]), Point(1.0, ["a"]))


async def test_none_is_a_result(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda: "one")
    async def compute() -> None:
        return None

    assert [await compute(), await compute(), compute.info().computations] == [None, None, 1]


async def test_exceptions_are_raised_anew_and_do_not_grow(store: AsyncKVStore) -> None:
    error = LookupError("the same one each time")
    runs = 0

    @kv_cached(60, store=store, key=lambda: "one")
    async def compute() -> int:
        nonlocal runs
        runs += 1
        # For a moment: a failure that is there at once is joined by nobody where tasks are eager.
        await asyncio.sleep(0)
        error.__traceback__ = None
        raise error

    depths = []
    for _ in range(5):
        results = await asyncio.gather(*(compute() for _ in range(20)), return_exceptions=True)
        # One caller gets the error itself, each of the others a copy.
        assert [type(result) is LookupError and result.args == error.args for result in results] == [True] * 20
        assert sum(result is error for result in results) == 1
        assert len(set(map(id, results))) == 20
        depths.append(max(len(traceback.extract_tb(result.__traceback__)) for result in results))
    assert (runs, max(depths) - min(depths) <= 1, await store.get(compute.key())) == (5, True, None)
