"""The law of round trips: whatever a function returns, it comes back in value, type and state, or it is refused."""

import collections
import dataclasses
import datetime as dt
import decimal
import math
import pathlib
import sys
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, Union

import pydantic
import pytest
from helpers import stable_id
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from result_types import (
    Box,
    Cat,
    Colour,
    Dog,
    Envelope,
    Frozen,
    Level,
    Model,
    Mutated,
    Number,
    Open,
    Pair,
    Point,
    Stamped,
    Word,
)

from aiokv.caching.jsonable import find_not_native, find_unholdable, is_native, models_in
from aiokv.caching.results import NotStorable, ResultCodec
from aiokv.caching.roundtrip import difference

T = TypeVar("T")
ZONES = st.sampled_from([None, dt.UTC, dt.timezone(dt.timedelta(hours=-3, minutes=-30)), zoneinfo.ZoneInfo("Europe/Oslo")])


class Counted(pydantic.BaseModel, Generic[T]):
    """A model whose default is unset, mutable, and made anew."""

    content: T
    number: int = 0
    made: list[int] = pydantic.Field(default_factory=lambda: [1])


@dataclasses.dataclass
class Kept(Generic[T]):
    content: T
    beside: int = dataclasses.field(default=0, compare=False)


LEAVES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers() | st.sampled_from([2**63, 2**64, -(2**63) - 1])),
    (float, st.floats() | st.sampled_from([-0.0, math.nan, math.inf]) | st.integers()),
    (str, st.text()),
    (bool, st.booleans()),
    (type(None), st.none()),
    (bytes, st.binary()),
    (complex, st.complex_numbers()),
    (decimal.Decimal, st.decimals()),
    (dt.datetime, st.datetimes(timezones=ZONES, allow_imaginary=True)),
    (dt.date, st.dates()),
    (dt.time, st.times(timezones=ZONES)),
    (dt.timedelta, st.timedeltas()),
    (uuid.UUID, st.uuids()),
    (pathlib.PurePosixPath, st.text().map(lambda text: pathlib.PurePosixPath(text.replace("\0", "")))),
    (Colour, st.sampled_from(Colour)),
    (Level, st.sampled_from(Level)),
    (Word, st.sampled_from(Word)),
    (Number, st.integers(-5, 5)),
    (Any, st.integers() | st.floats() | st.text() | st.lists(st.integers()) | st.tuples(st.integers())),
    (Model, st.builds(Model, name=st.text()) | st.builds(Model, name=st.text(), sizes=st.tuples(st.integers()))),
    (Frozen, st.builds(Frozen, name=st.text())),
    (Stamped, st.builds(Stamped, name=st.text()) | st.builds(Stamped, name=st.text(), id=st.text())),
    (Mutated, st.builds(lambda item: Mutated(name="m").added(item), st.integers())),
    (Open, st.dictionaries(st.text(), st.integers()).map(lambda more: Open.model_validate({"name": "m", **more}))),
    (Cat | Dog, st.builds(Cat, name=st.text()) | st.builds(Dog, name=st.text(), kind=st.just("dog"))),
    (Point, st.builds(Point, st.integers())),
    (Pair, st.builds(Pair, st.integers())),
]


def hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def around(inner: st.SearchStrategy[tuple[Any, st.SearchStrategy[Any]]]) -> st.SearchStrategy[tuple[Any, Any]]:
    def wrap(make_type: Callable[[Any], Any], make_values: Callable[[Any], Any]) -> st.SearchStrategy[tuple[Any, Any]]:
        return inner.map(lambda pair: (make_type(pair[0]), make_values(pair[1])))

    def keys(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return values.filter(hashable)

    return st.one_of(
        wrap(lambda kind: list[kind], lambda values: st.lists(values, max_size=3)),
        wrap(lambda kind: tuple[kind, ...], lambda values: st.lists(values, max_size=3).map(tuple)),
        wrap(lambda kind: dict[str, kind], lambda values: st.dictionaries(st.text(), values, max_size=3)),
        wrap(lambda kind: dict[kind, int], lambda values: st.dictionaries(keys(values), st.integers(), max_size=3)),
        wrap(lambda kind: set[kind], lambda values: st.frozensets(keys(values), max_size=3).map(set)),
        wrap(lambda kind: frozenset[kind], lambda values: st.frozensets(keys(values), max_size=3)),
        wrap(lambda kind: collections.deque[kind], lambda values: st.lists(values, max_size=3).map(collections.deque)),
        wrap(lambda kind: Box[kind], lambda values: values.map(lambda value: Box[Any](content=value))),
        wrap(lambda kind: Envelope[kind], lambda values: st.lists(values, max_size=3).map(Envelope)),
        wrap(lambda kind: Kept[kind], lambda values: st.builds(Kept, values, st.integers(0, 1))),
        wrap(
            lambda kind: Counted[kind],
            lambda values: values.map(lambda value: Counted[Any](content=value).model_copy(update={"number": 1})),
        ),
        st.tuples(inner, inner).map(lambda pairs: (tuple[pairs[0][0], pairs[1][0]], st.tuples(pairs[0][1], pairs[1][1]))),
        st.tuples(inner, inner).map(lambda pairs: (Union[pairs[0][0], pairs[1][0], None], pairs[0][1] | pairs[1][1])),  # noqa: UP007 (of any form)
        # Values of another type than annotated.
        st.tuples(inner, inner).map(lambda pairs: (pairs[0][0], pairs[1][1])),
    )


def exactly(kind: Any, value: Any) -> Any:
    """Make models of the annotated class out of those that the strategies made of `Any`."""
    if isinstance(kind, type) and issubclass(kind, Box | Counted) and isinstance(value, Box | Counted):
        made = kind.model_construct(_fields_set=set(value.model_fields_set), **value.__dict__)
        made.content = exactly(kind.model_fields["content"].annotation, value.content)
        return made
    return value


TYPES = st.recursive(st.sampled_from(LEAVES), around, max_leaves=3)


def state_of(value: Any) -> Any:  # noqa: PLR0911 (one for each kind)
    """Write a value with its types and all its state; equal texts are equal values."""
    kind = type(value)
    if kind is int or (kind is float and value.is_integer()):
        # An int under float comes back as the float; signs of zero are kept apart.
        return ("number", math.copysign(1, value) if value == 0 else 0, int(value))
    if isinstance(value, pydantic.BaseModel):
        parts = {name: state_of(part) for name, part in value.__dict__.items()}
        return kind, parts, sorted(value.model_fields_set), state_of(value.model_extra), repr(value.__pydantic_private__)
    if dataclasses.is_dataclass(value):
        return kind, {name: state_of(part) for name, part in vars(value).items()}
    if isinstance(value, dict):
        return kind, [(state_of(key), state_of(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | collections.deque):
        return kind, [state_of(item) for item in value]
    if isinstance(value, set | frozenset):
        return kind, sorted(repr(state_of(item)) for item in value)
    if isinstance(value, dt.datetime | dt.time):
        offset = value.utcoffset()
        fold = value.fold if offset is None else 0
        return kind, repr(value.replace(tzinfo=None, fold=0)), offset, fold, value.tzinfo is None
    return kind, repr(value)


@pytest.mark.slow
@given(data=st.data(), pair=TYPES)
@settings(max_examples=500, suppress_health_check=list(HealthCheck), deadline=None)
def test_what_a_function_returns_comes_back_in_type_and_state_or_is_refused(data: st.DataObject, pair: Any) -> None:
    returns, values = pair
    result = exactly(returns, data.draw(values))

    async def function() -> None: ...

    function.__annotations__ = {"return": returns}
    codec = ResultCodec(function)
    before = state_of(result)
    try:
        json = codec.dump(result)
    except (NotStorable, TypeError) as error:
        assert len(str(error)) < 1_000  # noqa: PT017 (either is right)
        assert error.__context__ is None  # noqa: PT017 (likewise)
        return
    for text in (json, json.decode()):
        back = codec.load(text)
        assert state_of(back) == before
        assert difference(back, result) is None
        assert state_of(codec.load(codec.dump(back))) == before
    assert state_of(result) == before


def calls_of(function: Callable[[], object]) -> int:
    count = 0

    def profile(_frame: object, _event: str, _argument: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


SHAPES: dict[str, Callable[[int], Any]] = {
    "list": lambda size: [float(number) for number in range(size)],
    "tuples": lambda size: [(number, 0.5) for number in range(size)],
    "dict": lambda size: {number: float(number) for number in range(size)},
    "set": lambda size: set(map(float, range(size))),
    "models": lambda size: [Model(name="m", sizes=(1, 2)) for _ in range(size)],
    "dataclasses": lambda size: [Point(number) for number in range(size)],
    "typed dicts": lambda size: [{"size": (1, 2), "name": "m"} for _ in range(size)],
    "missing at the end": lambda size: [*({"a": [number]} for number in range(size)), object()],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_comparison_is_linear_in_the_size_of_the_result(shape: str) -> None:
    make = SHAPES[shape]
    orders = [dict.fromkeys(["name", "size"])]

    def compare(size: int) -> int:
        one, other = make(size), make(size)
        return calls_of(lambda: difference(one, other, orders))

    compare(10)
    small, large = compare(100), compare(1_000)
    assert large < 11 * small


def test_attributes_in_slots_are_compared_private_ones_too() -> None:
    class Base:
        __slots__ = ("__hidden", "__weakref__", "shown")

        def __init__(self, shown: int, hidden: int) -> None:
            self.shown = shown
            self.__hidden = hidden

    class Derived(Base):
        __slots__ = ("single",)

    assert difference(Base(1, 2), Base(1, 2)) is None
    assert difference(Base(1, 2), Base(1, 3)) is not None
    assert difference(Base(1, 2), Base(2, 2)) is not None
    one, other = Derived(1, 2), Derived(1, 2)
    other.single = 1
    assert difference(one, other) is not None
    one.single = 1
    assert difference(one, other) is None


class MoreList(list[int]):
    note: int


class MoreDate(dt.date):
    pass


@dataclasses.dataclass
class DataDate(dt.date):
    note: int = 0

    def __new__(cls, note: int, day: int = 1) -> Self:  # noqa: ARG004 (the signature of __init__)
        return super().__new__(cls, 2024, 1, day)

    def __init__(self, note: int, day: int = 1) -> None:  # noqa: ARG002 (the signature of __new__)
        self.note = note


@dataclasses.dataclass
class DataFloat(float):
    note: int = 0

    def __new__(cls, value: float) -> Self:
        return super().__new__(cls, value)

    def __init__(self, value: float) -> None:  # noqa: ARG002 (likewise)
        self.note = 0


def noted(value: Any, note: int) -> Any:
    value.note = note
    return value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0.0, -0.0),
        (0j, complex(0.0, -0.0)),
        (1, True),
        (1, 1.0),
        ("low", Word.LOW),
        (1, Level.LOW),
        (decimal.Decimal("1.0"), decimal.Decimal("1.00")),
        (decimal.Decimal(0), decimal.Decimal("-0")),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1: 1, 2: 2}, {2: 2, 1: 1}),
        ({1: 1}, {True: 1}),
        ({1, 2}, {True, 2}),
        ({0.0}, {-0.0}),
        ({math.nan}, {1.0}),
        ({math.nan, 1.0}, {math.nan, 2.0}),
        (collections.deque([1], maxlen=2), collections.deque([1])),
        (collections.defaultdict(list), collections.defaultdict(dict)),
        (pathlib.PureWindowsPath("A"), pathlib.PureWindowsPath("a")),
        (dt.datetime(2024, 1, 1), dt.datetime(2024, 1, 1, fold=1)),  # noqa: DTZ001 (naive ones are results too)
        (dt.datetime(2024, 1, 1, 1, tzinfo=dt.UTC), dt.datetime(2024, 1, 1, 2, tzinfo=dt.timezone(dt.timedelta(hours=1)))),
        (noted(MoreList([1]), 1), noted(MoreList([1]), 2)),
        (noted(MoreList([1]), 1), noted(MoreList([2]), 1)),
        (noted(MoreDate(2024, 1, 1), 1), noted(MoreDate(2024, 1, 1), 2)),
        (DataDate(1, 1), DataDate(1, 2)),
        (DataFloat(0.0), DataFloat(-0.0)),
        (DataFloat(1.0), DataFloat(2.0)),
        (Kept(1, 0), Kept(1, 1)),
        (noted(Kept(1), 1), Kept(1)),
        (object(), object()),
        (Box[Any](content=1), Box[int](content=1)),
        (Frozen(name="m"), Frozen(name="m", size=1)),
    ],
    ids=stable_id,
)
def test_what_equality_does_not_see_is_a_difference_at_any_depth(one: Any, other: Any) -> None:
    for wrap in (
        lambda value: value,
        lambda value: [value],
        lambda value: {"a": (value,)},
        Envelope,
        lambda value: Kept([value]),
    ):
        assert difference(wrap(one), wrap(one)) is None
        assert difference(wrap(one), wrap(other)) is not None


@pytest.mark.parametrize("value", [math.nan, {math.nan, 1.0}, complex(math.nan, 1.0), decimal.Decimal("sNaN")], ids=stable_id)
def test_nan_is_itself(value: Any) -> None:
    copy = eval(repr(value), {"nan": float("nan"), "Decimal": decimal.Decimal})
    assert difference([copy], [value]) is None


def test_equality_that_fails_is_a_difference() -> None:
    class Broken:
        def __eq__(self, other: object) -> bool:
            raise ValueError

        __hash__ = None  # type: ignore[assignment]

    assert difference(Broken(), Broken()) is not None


@given(st.recursive(st.none() | st.integers() | st.floats() | st.text() | st.binary(), st.lists, max_leaves=5))
def test_what_is_native_is_what_has_no_fault_but_surrogates_and_size(value: Any) -> None:
    if find_not_native(value) is None:
        assert is_native(value)
        assert find_unholdable(value) is None
    elif is_native(value):
        assert find_unholdable(value) is not None


def test_models_are_walked_in_the_same_order_in_every_copy() -> None:
    value = {"b": [Model(name="1"), Box[Any](content=(Model(name="3"),))], "a": Envelope([Model(name="4")])}
    for copy in (value, dict(reversed(value.items()))):
        assert [getattr(model, "name", "2") for model in models_in(copy)] == ["4", "1", "2", "3"]
    assert [model.name for model in models_in({1: Model(name="1"), "a": Model(name="2")})] == ["1", "2"]
    assert not list(models_in({Frozen(name="m")}))
