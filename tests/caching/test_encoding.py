"""The canonical encoding: different values have different bytes, equal ones the same, in every process."""

import array
import collections
import contextlib
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import gc
import json
import os
import pathlib
import pickle
import subprocess
import sys
import types
import uuid
import weakref
import zoneinfo
from collections.abc import Callable
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

import golden_values
import numpy as np
import pydantic
import pytest
from golden_values import Colour, Level, Model, Open, OtherModel, OtherPoint, OtherTenant, Pair, Point, Tenant, Word
from helpers import REPOSITORY, stable_id
from hypothesis import example, given, settings
from hypothesis import strategies as st
from key_values import SMALL, VALUES, identity

from aiokv.caching.encoding import encode, is_settled
from aiokv.caching.naming import Unencodable

T = TypeVar("T")
SMALL_KEYS = st.sampled_from(["a", "b", 1, True, None])

GOLDEN: dict[str, dict[str, str]] = json.loads((REPOSITORY / "tests" / "caching" / "golden_keys.json").read_text())


async def plain() -> None: ...


@pytest.mark.parametrize("name", golden_values.VALUES)
def test_encoding_is_what_it_has_always_been(name: str) -> None:
    assert golden_values.computed()["encodings"][name] == GOLDEN["encodings"][name]


@pytest.mark.parametrize(("seed", "zone"), [("0", "UTC"), ("1", "Asia/Kathmandu"), ("4242", "America/New_York")])
def test_keys_are_the_same_in_every_process(seed: str, zone: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "PYTHONPATH": str(REPOSITORY / "tests" / "caching")}
    program = "import sys, golden_values; sys.stdout.write(golden_values.computed_text())"
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(answer.stdout) == GOLDEN


def test_no_two_golden_values_share_an_encoding() -> None:
    assert len(set(GOLDEN["encodings"].values())) == len(GOLDEN["encodings"]) == len(golden_values.VALUES)
    assert len(set(GOLDEN["keys"].values())) == len(GOLDEN["keys"])


@given(first=VALUES, second=VALUES)
@settings(max_examples=200)
@example(first=["1:b:2", 3], second=[1, "2:b:3"])
@example(first=0.0, second=-0.0)
@example(first={float("nan")}, second={float("nan"), -float("nan")})
@example(first=("1i1:1",), second=("1", 1))
def test_values_share_an_encoding_exactly_where_they_are_the_same(first: object, second: object) -> None:
    assert (encode(first) == encode(second)) == (identity(first) == identity(second))


@given(first=VALUES, second=VALUES)
@settings(max_examples=200)
def test_no_encoding_is_the_beginning_of_another(first: object, second: object) -> None:
    one, other = encode(first), encode(second)
    assert one == other or not (one.startswith(other) or other.startswith(one))


@pytest.mark.parametrize(
    "values",
    [
        (1, True, 1.0, "1", b"1", decimal.Decimal(1), complex(1), bytearray(b"1"), Level.LOW, np.int64(1), np.array(1)),
        (0, False, 0.0, -0.0, None, "", b"", (), [], set(), frozenset(), {}, decimal.Decimal("-0"), dt.timedelta()),
        (float("nan"), "nan", None, decimal.Decimal("NaN"), complex("nan")),
        ((1, 2), [1, 2], {1, 2}, frozenset({1, 2}), {1: 2}, (1, (2,)), ((1,), 2), ((1, 2),), (12,), "(1, 2)"),
        (("1:b:2", 3), (1, "2:b:3"), ("1", "b", "2:b:3"), ("1:b:2:b:3",)),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": {"b": 2}}, [("a", 1), ("b", 2)]),
        (decimal.Decimal("1.0"), decimal.Decimal("1.00"), decimal.Decimal(1)),
        (dt.date(2024, 1, 1), dt.datetime(2024, 1, 1), dt.datetime(2024, 1, 1, tzinfo=dt.UTC), "2024-01-01"),  # noqa: DTZ001
        (dt.datetime(2024, 1, 1), dt.datetime(2024, 1, 1, fold=1)),  # noqa: DTZ001
        (dt.time(1), dt.time(1, fold=1), dt.timedelta(hours=1)),
        (uuid.UUID(int=1), str(uuid.UUID(int=1)), uuid.UUID(int=1).bytes, 1),
        (Point(1), OtherPoint(1), Point(1, 1.5), (1, 0.5), {"x": 1, "y": 0.5}),
        (Model(name="m"), Model(name="m", size=1), OtherModel(name="m"), Open(name="m"), {"name": "m", "size": 1}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        tuple(Open.model_validate({"name": "m", **extra}) for extra in ({"x": 1, "y": 2}, {"y": 2, "x": 1})),
        (range(2), range(0, 2, 2), range(0, 1, 2), (0, 2, 1), fractions.Fraction(1, 2), fractions.Fraction(2), ..., "..."),
        (Pair(1, "x"), (1, "x")),
        (Colour.RED, Colour.BLUE, "RED", 1, Word.LOW, "low"),
        (pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("a"), "a", b"a"),
        (Tenant(7), Tenant(8), OtherTenant(7), ("tenant", 7)),
        (Point, OtherPoint, int, "builtins.int", Point(1)),
    ],
    ids=lambda values: repr(values[0])[:30],
)
def test_alike_values_are_told_apart(values: tuple[object, ...]) -> None:
    encodings = [encode(value) for value in values]
    assert len(set(encodings)) == len(values)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a", "b", 3}, {3, "b", "a"}),
        (float("nan"), -float("nan")),
        (Model(name="m", size=1), Model(size=1, name="m")),
        (Tenant(7, "one"), Tenant(7, "other")),
        (Point(1), Point(1, 0.5)),
        (dt.datetime(2024, 1, 1, tzinfo=dt.UTC), dt.datetime(2024, 1, 1, tzinfo=dt.timezone(dt.timedelta(0)))),
    ],
    ids=stable_id,
)
def test_equal_values_share_an_encoding(first: object, second: object) -> None:
    assert encode(first) == encode(second)


def test_decimal_context_of_the_caller_does_not_count() -> None:
    with decimal.localcontext() as context:
        context.capitals = 0
        encoded = encode(decimal.Decimal("1E+5"))
    assert encoded == encode(decimal.Decimal("1E+5"))


def test_aware_datetime_of_a_model_is_the_same_as_one_of_the_standard_library() -> None:
    parsed = pydantic.TypeAdapter(dt.datetime).validate_json('"2024-01-01T00:00:00Z"')
    assert encode(parsed) == encode(dt.datetime(2024, 1, 1, tzinfo=dt.UTC))


def test_zone_without_a_name_is_refused() -> None:
    # Two such zones may have one offset on that day, and not on the next.
    with (pathlib.Path(zoneinfo.TZPATH[0]) / "Europe" / "Oslo").open("rb") as file:
        zone = zoneinfo.ZoneInfo.from_file(file)
    with pytest.raises(TypeError):
        encode(dt.datetime(2024, 1, 1, tzinfo=zone))


@pytest.mark.parametrize("name", ["a\ud800", "\udcc3\udca9", "\udcff"], ids=ascii)
def test_path_of_any_name_is_told_apart(name: str) -> None:
    paths = [pathlib.PurePosixPath(text) for text in (name, "é", "a", "ÿ")]
    assert len({encode(path) for path in paths}) == len(paths)


class OwnPath(pathlib.PurePosixPath):
    pass


class Noted(pydantic.BaseModel):
    name: str
    _note: int = pydantic.PrivateAttr(default=0)

    def noted(self, note: int) -> "Noted":
        self._note = note
        return self


@dataclasses.dataclass
class Mapped(dict[str, int]):
    x: int = 1

    def holding(self, key: str) -> "Mapped":
        self[key] = 1
        return self


def local_member(value: object) -> enum.Enum:
    """Make a member of a class that has the name of another."""

    class Local(enum.Enum):
        MEMBER = value

    return Local.MEMBER


def class_named(module: str, qualname: str) -> type:
    made = type("Made", (), {})
    made.__module__, made.__qualname__ = module, qualname
    return made


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(OwnPath("a"), pathlib.PurePosixPath("a"), id="subclass of a path"),
        pytest.param(Noted(name="m").noted(1), Noted(name="m").noted(2), id="private attribute, which counts in equality"),
        pytest.param(Mapped().holding("a"), Mapped().holding("b"), id="dataclass that is a dictionary, too"),
        pytest.param(local_member(1), local_member(2), id="local classes of one name"),
        pytest.param(class_named("a.b", "c"), class_named("a", "b.c"), id="nested class named like a module's"),
    ],
)
def test_values_with_more_to_them_are_refused_or_told_apart(first: object, second: object) -> None:
    try:
        encodings = {encode(first), encode(second)}
    except TypeError:
        return
    assert len(encodings) == 2


class OwnStr(str):  # noqa: SLOT000 (a subclass of a builtin is the point)
    pass


class OwnInt(int):
    pass


class OwnList(list[int]):
    pass


@pytest.mark.parametrize(
    "value",
    [
        OwnStr("x"),
        OwnInt(1),
        OwnList([1]),
        collections.OrderedDict(a=1),
        collections.defaultdict(int, a=1),
        collections.Counter("a"),
        collections.deque([1]),
        types.MappingProxyType({"a": 1}),
        np.ma.array([1, 2], mask=[False, True]),
        np.array([object()], dtype=object),
        np.dtype("f8"),
        object(),
        len,
        plain,
        lambda: None,
        memoryview(b"x"),
        iter([1]),
        dt.datetime(2024, 1, 1, tzinfo=type("Zone", (dt.tzinfo,), {})()),
        list[int],
        int | None,
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize(
    "place", [lambda value: value, lambda value: [{"k": (value,)}], Point], ids=["itself", "nested", "field"]
)
def test_value_of_another_type_is_refused(value: object, place: Callable[[object], object]) -> None:
    with pytest.raises(Unencodable):
        encode(place(value))


def test_local_class_is_refused() -> None:
    class Local:
        pass

    with pytest.raises(TypeError):
        encode(Local)


BASE = np.arange(6, dtype=np.int32).reshape(2, 3)


@pytest.mark.parametrize(
    "other",
    [
        BASE.copy(),
        np.asfortranarray(BASE),
        BASE.astype(">i4"),
        np.repeat(BASE, 2, axis=1)[:, ::2],
        np.broadcast_to(BASE, (1, 2, 3))[0],
    ],
    ids=["copy", "Fortran order", "big-endian", "stride", "view"],
)
def test_layout_of_an_array_does_not_count(other: np.ndarray[Any, Any]) -> None:
    assert encode(BASE) == encode(other)


@pytest.mark.parametrize(
    "other",
    [
        BASE.reshape(3, 2),
        BASE.reshape(6),
        BASE.T,
        BASE[::-1],
        BASE.astype(np.int64),
        BASE.astype(np.uint32),
        BASE.view(np.float32),
        BASE + 1,
        BASE.tolist(),
        BASE.tobytes(),
    ],
    ids=["shape", "flat", "transposed", "reversed", "wider", "unsigned", "floats", "content", "list", "bytes"],
)
def test_shape_type_and_content_of_an_array_count(other: object) -> None:
    assert encode(BASE) != encode(other)


def test_arrays_that_differ_in_one_of_many_elements_are_told_apart() -> None:
    array = np.zeros(100_000)
    other = array.copy()
    other[50_000] = 1e-300
    assert encode(array) != encode(other)


@pytest.mark.parametrize("shapes", [((), (1,)), ((0, 3), (3, 0)), ((0,), ())], ids=str)
def test_arrays_of_little_are_told_apart_by_shape(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    assert encode(np.zeros(shapes[0])) != encode(np.zeros(shapes[1]))


def test_scalar_of_numpy_is_neither_an_array_nor_a_number_of_python() -> None:
    assert len({encode(np.float64(1.0)), encode(np.float32(1.0)), encode(np.array(1.0)), encode(1.0)}) == 4


def test_padding_between_the_fields_of_a_record_does_not_count() -> None:
    array = np.zeros(2, dtype=np.dtype([("a", "i1"), ("b", "i4")], align=True))
    other = array.copy()
    other.view(np.uint8)[1] = 7
    assert (array == other).all()
    assert encode(array) == encode(other)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(1, dtype=np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 2]})),
        np.zeros(1, dtype=np.dtype("i4", metadata={"note": 1})),
    ],
    ids=["overlapping fields", "metadata"],
)
def test_array_of_an_unusual_type_is_encoded_or_refused_as_any_value(array: np.ndarray[Any, Any]) -> None:
    try:
        encode(array)
    except Unencodable:
        return


@dataclasses.dataclass
class Seeded:
    name: str
    seed: dataclasses.InitVar[int] = 0

    def __post_init__(self, seed: int) -> None:
        self.derived = seed * 2


class Extended(Point):
    def __init__(self, x: int, more: object) -> None:
        super().__init__(x)
        object.__setattr__(self, "more", more)


@dataclasses.dataclass
class Slotted:
    __slots__ = ("hidden", "x")
    x: int


class PairWithMore(Pair):
    note: object


class ModelWithSlot(Model):
    __slots__ = ("beside",)


class Page(pydantic.BaseModel, Generic[T]):
    items: list[Any] = []
    of: T | None = None


class First:
    class User(pydantic.BaseModel):
        name: str = "n"


class Second:
    class User(pydantic.BaseModel):
        name: str = "n"


class ReadOnce(pydantic.BaseModel):
    name: str

    @functools.cached_property
    def shout(self) -> str:
        return self.name.upper()


@dataclasses.dataclass
class Box(Generic[T]):
    content: T


class Speed(enum.Enum):
    FAST = (1, len)
    SLOW = (2, len)


def with_attribute(value: Any, name: str, content: object) -> Any:
    object.__setattr__(value, name, content)
    return value


def local_zone(kind: str) -> dt.tzinfo:
    return type(kind, (dt.tzinfo,), {"utcoffset": lambda *_: dt.timedelta(0), "tzname": lambda *_: kind})()


STATES: dict[str, tuple[object, ...]] = {
    "derived from an InitVar": (Seeded("a", 1), Seeded("a", 2), Seeded("a")),
    "attribute of a dataclass": (Point(1), with_attribute(Point(1), "z", 1), with_attribute(Point(1), "z", 2)),
    "attribute instead of another": (with_attribute(Point(1), "z", 1), with_attribute(Point(1), "w", 1)),
    "plain subclass of a dataclass": (Extended(1, 1), Extended(1, 2), Point(1)),
    "slot beside the fields": (Slotted(1), with_attribute(Slotted(1), "hidden", 1), with_attribute(Slotted(1), "hidden", 2)),
    "attribute of a named tuple": (
        Pair(1, "x"),
        PairWithMore(1, "x"),
        with_attribute(PairWithMore(1, "x"), "note", 1),
        with_attribute(PairWithMore(1, "x"), "note", 2),
    ),
    "slot of a model": (
        ModelWithSlot(name="m"),
        with_attribute(ModelWithSlot(name="m"), "beside", 1),
        with_attribute(ModelWithSlot(name="m"), "beside", 2),
    ),
    "fields set": (Model(name="m"), Model(name="m", size=1), Model.model_construct({"size"}, name="m", size=1)),
    "fields set beyond the fields": (Model.model_construct({"name", "x"}, name="m"), Model.model_construct({"name"}, name="m")),
    "field that a model lacks": (Model.model_construct({"size"}, size=1), Model.model_construct({"size"}, size=1, name=None)),
    "private attribute of a model": (Noted(name="m").noted(1), Noted(name="m").noted(2)),
    "arguments of a generic model": (
        Page[First.User](),
        Page[Second.User](),
        Page(),
        Page[list[First.User]](),
        Page[list[Second.User]](),
        Page[First.User | None](),
        Page[Literal[1]](),
        Page[Literal["1"]](),
        Page[Annotated[int, "a"]](),
        Page[Annotated[int, "b"]](),
    ),
    "arguments of a generic model that is nested": (Page[Page[First.User]](), Page[Page[Second.User]]()),
    "generic models as classes": (Page[First.User], Page[Second.User], Page),
    "arguments of a generic dataclass": (Box[int](1), Box[str](1), Box(1)),  # type: ignore[arg-type]
    "names of one offset": tuple(
        dt.datetime(2024, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1), *name)) for name in ((), ("A",), ("B",))
    ),
    "names of one zone": tuple(
        dt.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo(name)) for name in ("UTC", "Etc/UTC", "Europe/Oslo", "Europe/Berlin")
    ),
    "zones": (dt.UTC, zoneinfo.ZoneInfo("UTC"), zoneinfo.ZoneInfo("Etc/UTC"), dt.timezone(dt.timedelta(0), "Z")),
    "times of zones": tuple(dt.time(1, tzinfo=zone) for zone in (None, dt.UTC, dt.timezone(dt.timedelta(0), "Z"))),
    "the hour that comes twice": tuple(
        dt.datetime(2024, 10, 27, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Oslo"), fold=fold) for fold in (0, 1)
    ),
    "members with values that have no encoding": (Speed.FAST, Speed.SLOW),
    "record types": tuple(
        np.zeros(1, dtype=dtype)
        for dtype in (
            np.dtype([("a", "i1"), ("b", "i4")]),
            np.dtype([("a", "i1"), ("b", "i4")], align=True),
            np.dtype([("b", "i1"), ("a", "i4")]),
            np.dtype([(("title", "a"), "i1"), ("b", "i4")]),
            np.dtype([("a", "i1", (1,)), ("b", "i4")]),
            np.dtype("V5"),
            *(
                np.dtype({"names": ["a", "b"], "formats": ["i1", "i1"], "offsets": [0, offset], "itemsize": 4})
                for offset in (2, 3)
            ),
        )
    ),
    "long numbers": (np.longdouble(1), np.longdouble(1) + np.finfo(np.longdouble).eps, np.clongdouble(1), np.float64(1)),
}


@pytest.mark.parametrize("name", STATES)
def test_state_beside_the_declared_one_counts(name: str) -> None:
    assert len({encode(value) for value in STATES[name]}) == len(STATES[name])


@pytest.mark.parametrize("name", [name for name in STATES if name != "slot of a model"])
def test_copy_of_a_value_shares_its_encoding(name: str) -> None:
    for value in STATES[name]:
        assert encode(copy.deepcopy(value)) == encode(value)
        if "generic" not in name:
            assert encode(pickle.loads(pickle.dumps(value))) == encode(value)


@pytest.mark.parametrize(
    "number", [np.longdouble("1.1"), np.array([1, 2.5], dtype=np.longdouble), np.array([1 + 2j], dtype=np.clongdouble)], ids=str
)
def test_padding_of_long_numbers_does_not_count(number: Any) -> None:
    dirty = np.asarray(number).copy().reshape(-1)
    raw = dirty.view(np.uint8).reshape(-1, np.dtype(np.longdouble).itemsize)
    used = 10 if np.finfo(np.longdouble).nmant == 63 else raw.shape[1]
    raw[:, used:] = 0xAB
    dirty = dirty.reshape(np.shape(number))
    assert encode(np.asarray(number)) == encode(dirty)


class Number(float):
    __slots__ = ()


@dataclasses.dataclass
class Priced(float):  # type: ignore[misc]
    currency: str = "EUR"

    def __new__(cls, amount: float, currency: str = "EUR") -> Self:
        made = super().__new__(cls, amount)
        made.currency = currency
        return made

    def __init__(self, amount: float, currency: str = "EUR") -> None: ...


@dataclasses.dataclass(init=False)
class Day(dt.date):
    note: str = ""


@dataclasses.dataclass
class Queue(collections.deque[int]):
    name: str = ""


@dataclasses.dataclass
class OwnError(Exception):
    code: int = 0


@dataclasses.dataclass
class Listed(list[int]):
    name: str = ""


class Tagged(np.float64):
    note = ""


class Matrix(np.ndarray):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize(
    "value",
    [
        Number(1),
        Priced(1.5),
        Day(2024, 1, 1),
        Queue(),
        OwnError(),
        Listed(),
        Tagged(1.5),
        np.zeros(2).view(Matrix),
        np.zeros(2).view(np.recarray),
        np.array(["a"], dtype=np.dtypes.StringDType()),
        np.zeros(1, dtype=np.dtype("i4", metadata={"note": 1})),
        np.zeros(1, dtype=np.dtype([("a", np.dtype("i4", metadata={"note": 1}))])),
        collections.ChainMap({}),
        array.array("i", [1]),
        slice(1),
        functools.partial(len, "x"),
        dt.datetime(2024, 1, 1, tzinfo=local_zone("a")),
        dt.time(1, tzinfo=local_zone("a")),
        type("Point", (), {"__module__": __name__, "__qualname__": "Point"}),
        type("Missing", (), {"__module__": __name__}),
        enum.Enum("Colour", {"RED": 1}, module="golden_values"),
        pydantic.create_model("Model", __module__="golden_values", name=(str, "n"))(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_value_that_cannot_be_told_apart_is_refused(value: object) -> None:
    with pytest.raises(Unencodable):
        encode(value)


def test_value_of_a_cached_property_does_not_count() -> None:
    model = ReadOnce(name="m")
    before = encode(model)
    assert model.shout == "M"
    assert encode(model) == before


def test_encoder_of_a_class_is_forgotten_with_the_class() -> None:
    kind = dataclasses.make_dataclass("Temporary", ["x"], namespace={"__module__": "nowhere"})
    kind.__module__ = "nowhere"
    assert encode(kind(1))
    reference = weakref.ref(kind)
    del kind
    gc.collect()
    assert reference() is None


def test_class_of_a_script_is_named_as_where_it_is_imported(tmp_path: pathlib.Path) -> None:
    program = """
import dataclasses, enum, sys
import pydantic
from aiokv.caching.encoding import encode, is_settled

@dataclasses.dataclass
class Point:
    x: int

class Colour(enum.Enum):
    RED = 1

class Model(pydantic.BaseModel):
    name: str

sys.stdout.write(encode([Point, Point(1), Colour.RED, Model(name="m")]).hex())
"""
    (tmp_path / "shapes.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run, imported = (
        subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout
        for command in (["shapes.py"], ["-c", "import shapes"])
    )
    assert run == imported != ""


@pytest.mark.parametrize(
    "value",
    [None, ..., True, 1, 1.5, 1j, "x", b"x", dt.date(2024, 1, 1), dt.datetime(2024, 1, 1, tzinfo=dt.UTC), dt.time(1)]  # noqa: RUF005
    + [dt.timedelta(1), decimal.Decimal(1), fractions.Fraction(1, 2), uuid.UUID(int=1), pathlib.PurePosixPath("a"), range(2)]
    + [Colour.RED, Level.LOW, Word.LOW, Point, (), (1, (2, "x")), frozenset({1, (2,)}), zoneinfo.ZoneInfo("UTC")],
    ids=repr,
)
def test_what_can_never_change_is_settled(value: object) -> None:
    assert is_settled(value)
    assert is_settled((value, frozenset({value})))


class Loose(enum.Enum):
    MANY = [1]  # noqa: RUF012 (a member's value)


@pytest.mark.parametrize(
    "value",
    [[], {}, set(), bytearray(), Point(1), Pair(1, "x"), Model(name="m"), np.zeros(1), Tenant(1), Loose.MANY, OwnStr("x")],
    ids=lambda value: type(value).__name__,
)
def test_what_may_change_is_not_settled(value: object) -> None:
    assert not is_settled(value)
    assert not is_settled((1, (value,)))


# The same values, held by every kind of object, with and without more than was declared.
HELD = st.one_of(
    st.builds(Point, SMALL, SMALL),
    st.builds(OtherPoint, SMALL, SMALL),
    st.builds(Extended, SMALL, SMALL),
    st.builds(Seeded, SMALL, st.integers(0, 2)),
    st.builds(with_attribute, st.builds(Point, SMALL), st.sampled_from(["z", "w"]), SMALL),
    st.builds(with_attribute, st.builds(Slotted, SMALL), st.just("hidden"), SMALL),
    st.builds(Pair, SMALL, SMALL),
    st.builds(with_attribute, st.builds(PairWithMore, SMALL, SMALL), st.sampled_from(["z", "w"]), SMALL),
    st.builds(Model.model_construct, st.sets(st.sampled_from(["name", "size"])), name=SMALL, size=SMALL),
    st.builds(Model.model_construct, st.just({"name"}), name=SMALL),
    st.builds(Open.model_construct, st.just({"name"}), name=SMALL, x=SMALL),
    st.builds(lambda note: Noted(name="m").noted(note), SMALL),
    st.builds(Box, SMALL),
    st.builds(Page[First.User].model_construct, st.just({"items"}), items=SMALL),
    st.builds(Page[Second.User].model_construct, st.just({"items"}), items=SMALL),
)
NESTED = st.recursive(
    HELD,
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.builds(Point, inner, SMALL), st.dictionaries(SMALL_KEYS, inner)),
    max_leaves=4,
)


def state(value: Any) -> object:
    """Return what an object holds, in another way than the encoding does."""
    kind = type(value)
    if isinstance(value, list | tuple):
        return kind, tuple(map(state, value)), state(getattr(value, "__dict__", None))
    if isinstance(value, dict):
        return kind, tuple((state(key), state(item)) for key, item in value.items())
    if isinstance(value, set):
        return kind, frozenset(value)
    if isinstance(value, pydantic.BaseModel):
        parts = (value.__dict__, value.__pydantic_fields_set__, value.__pydantic_extra__, value.__pydantic_private__)
        return kind, tuple(map(state, parts))
    if dataclasses.is_dataclass(value):
        slots = [getattr(value, name, None) for name in getattr(kind, "__slots__", ())]
        return kind, state(sorted(getattr(value, "__dict__", {}).items())), state(slots)
    return identity(value)


@given(first=NESTED, second=NESTED)
@settings(max_examples=300)
def test_objects_share_an_encoding_exactly_where_their_states_are_the_same(first: object, second: object) -> None:
    assert (encode(first) == encode(second)) == (state(first) == state(second))


@given(value=st.one_of(NESTED, VALUES))
@settings(max_examples=200)
def test_copies_of_any_object_share_its_encoding(value: object) -> None:
    assert encode(copy.deepcopy(value)) == encode(value)
    # Pydantic's generic models with arguments cannot be pickled.
    with contextlib.suppress(pickle.PicklingError):
        assert encode(pickle.loads(pickle.dumps(value))) == encode(value)


class Equal(type):
    def __eq__(cls, other: object) -> bool:
        return isinstance(other, Equal)

    def __hash__(cls) -> int:
        return 1


class FirstEqual(metaclass=Equal):
    def __cache_key__(self) -> object:
        return 1


class SecondEqual(FirstEqual):
    pass


def test_classes_that_equal_each_other_are_told_apart() -> None:
    assert encode(FirstEqual()) != encode(SecondEqual())
