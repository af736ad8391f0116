"""Results: what comes back is what went in, in value, type and state, or nothing is stored."""

import collections
import dataclasses
import datetime as dt
import decimal
import math
import pathlib
import sys
import typing
import uuid
import zoneinfo
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Optional, Union

import orjson
import pydantic
import pydantic.dataclasses
import pytest
from helpers import stable_id
from hypothesis import given, settings
from hypothesis import strategies as st
from result_types import (
    Aliased,
    AliasedData,
    AlwaysAlias,
    BeforeAlias,
    Blob,
    Box,
    ByName,
    Cat,
    Closed,
    Colour,
    Computed,
    Dog,
    Envelope,
    Excited,
    Excluded,
    Failing,
    Frozen,
    Generated,
    Guarded,
    Holder,
    Level,
    Measured,
    Model,
    Mutated,
    Nested,
    Number,
    Once,
    OnlyByName,
    Open,
    OwnStr,
    Pair,
    Point,
    Private,
    PydanticPoint,
    Reading,
    Remembering,
    RememberingModel,
    Root,
    Rounded,
    Row,
    Same,
    Serialized,
    Slotted,
    Stamped,
    Stamps,
    Stateful,
    StrictAliased,
    Swapped,
    Unshown,
    UnshownField,
    Wider,
    WiderPoint,
    WithInit,
    WithJson,
    Word,
)

from aiokv.caching.results import NotStorable, ResultCodec

SECRET = "s3cr3t-value"


def codec_of(returns: Any) -> ResultCodec:
    """Make the codec of a function with a return annotation; `...` is one without."""

    async def function() -> None: ...

    function.__annotations__ = {} if returns is ... else {"return": returns}
    function.__qualname__ = "fetch"
    return ResultCodec(function)


def round_trip(codec: ResultCodec, result: object) -> Any:
    return codec.load(codec.dump(result))


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=["Cs"])),
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=10,
)


@pytest.mark.slow
@given(value=JSON_VALUES)
@settings(max_examples=200)
def test_native_value_comes_back_the_same(value: object) -> None:
    codec = codec_of(...)
    # By text, which tells 1 from True and 0.0 from -0.0.
    assert repr(round_trip(codec, value)) == repr(value)
    assert repr(codec.load(codec.dump(value).decode())) == repr(value)


@pytest.mark.parametrize(
    "value", [2**64 - 1, -(2**63), 5e-324, 1.7976931348623157e308, -0.0, "\0\n\u2028😀", {"": []}], ids=ascii
)
@pytest.mark.parametrize("returns", [..., Any, object], ids=repr)
def test_value_at_the_edge_of_json_comes_back_the_same(returns: Any, value: object) -> None:
    assert repr(round_trip(codec_of(returns), value)) == repr(value)


ROUND_TRIPS: list[tuple[Any, object]] = [
    (Model, Model(name="m", sizes=(1, 2))),
    (
        Nested,
        Nested(
            models={"a": Model(name="m")},
            when=dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
            price=decimal.Decimal("1.10"),
            colours={Colour.RED},
        ),
    ),
    (Box[int], Box[int](content=1)),
    (Box[Model], Box[Model](content=Model(name="m"))),
    (Point, Point(1, (2, 3))),
    (list[Point], [Point(1), Point(2, (3,))]),
    (dict[str, Model], {"a": Model(name="m")}),
    (Row, {"name": "r", "size": (1, 2)}),
    (Row, {"name": "r"}),
    (list[Row], [{"name": "r"}]),
    (Pair, Pair(1)),
    (dict[str, Pair], {"a": Pair(1, "y")}),
    (Literal["a", 1] | None, "a"),
    (Optional[Model], None),  # noqa: UP045 (old spellings are in use)
    (Model | None, Model(name="m")),
    (Union[Model, Point], Point(1)),  # noqa: UP007 (likewise)
    (int | str, 1),
    (int | str, "1"),
    (bool | int | float, True),
    (bool | int | float, 1),
    (bool | int | float, 1.0),
    (dt.datetime | int, 5),
    (dt.datetime, dt.datetime(2024, 2, 29, 1, 2, 3, 456789)),  # noqa: DTZ001
    (dt.datetime, dt.datetime(2024, 2, 29, tzinfo=dt.UTC)),
    (dt.datetime, dt.datetime(2024, 2, 29, tzinfo=dt.timezone(dt.timedelta(hours=-3, minutes=-30)))),
    (dt.date, dt.date(2024, 2, 29)),
    (dt.time, dt.time(1, 2, 3, 4)),
    (dt.timedelta, dt.timedelta(days=-1, microseconds=1)),
    (decimal.Decimal, decimal.Decimal("1.10")),
    (decimal.Decimal, decimal.Decimal("1E+400")),
    (bytes, b""),
    (bytes, b"\xff\x00\xfe text"),
    (bytes, bytes(range(256))),
    (list[bytes], [b"\xff", b"a"]),
    (dict[str, bytes | None], {"a": b"\xff", "b": None}),
    (set[int], {1, 2}),
    (frozenset[str], frozenset("ab")),
    (set[tuple[int, str]], {(1, "a"), (2, "b")}),
    (tuple[int, str], (1, "a")),
    (tuple[int, ...], ()),
    (tuple[()], ()),
    (tuple, (1, "a", None)),
    (list[tuple[int, tuple[str, ...]]], [(1, ("a", "b"))]),
    (dict[int, str], {1: "a"}),
    (dict[tuple[int, int] | str, int], {"a": 1}),
    (dict[uuid.UUID, int], {uuid.UUID(int=1): 2}),
    (dict[dt.date, int], {dt.date(2024, 1, 1): 2}),
    (collections.OrderedDict[str, int], collections.OrderedDict(b=1, a=2)),
    (collections.deque[int], collections.deque([1, 2])),
    (Colour, Colour.BLUE),
    (list[Colour], [Colour.RED, Colour.BLUE]),
    (uuid.UUID, uuid.UUID(int=5)),
    (pathlib.Path, pathlib.Path("a/b")),
    (list[tuple[int]], [(2**70,)]),
    (tuple[float, ...], (math.inf, -math.inf, -0.0)),
    (Annotated[int, pydantic.Field(gt=0)], 3),
    (Annotated[Model, "noted"], Model(name="m")),
    (Number, Number(5)),
]


@pytest.mark.parametrize(("returns", "result"), ROUND_TRIPS, ids=stable_id)
def test_annotated_result_comes_back_equal_and_of_its_type(returns: Any, result: object) -> None:
    codec = codec_of(returns)
    back = round_trip(codec, result)
    assert back == result
    assert type(back) is type(result)
    assert round_trip(codec, back) == result


@pytest.mark.slow
@given(
    result=st.lists(
        st.tuples(
            st.binary(),
            st.datetimes(allow_imaginary=True).map(lambda when: when.replace(fold=0)),
            st.decimals(allow_nan=False, allow_infinity=False),
            st.floats(allow_nan=False),
        )
    )
)
@settings(max_examples=100)
def test_annotated_list_comes_back_the_same(result: list[tuple[bytes, dt.datetime, decimal.Decimal, float]]) -> None:
    codec = codec_of(list[tuple[bytes, dt.datetime, decimal.Decimal, float]])
    assert repr(round_trip(codec, result)) == repr(result)


def test_nan_that_is_annotated_comes_back_as_nan() -> None:
    back = round_trip(codec_of(tuple[float, str]), (math.nan, "x"))
    assert math.isnan(back[0])
    assert back[1] == "x"


def test_aware_datetime_comes_back_as_the_same_moment() -> None:
    when = dt.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Oslo"))
    back = round_trip(codec_of(dt.datetime), when)
    assert back == when
    assert back.utcoffset() == when.utcoffset()


@pytest.mark.parametrize("returns", [typing.Dict, typing.Optional[typing.Dict], typing.List, typing.Dict[str, int]], ids=repr)  # noqa: UP006, UP045 (old spellings are in use)
def test_old_spelling_of_a_generic_is_understood(returns: Any) -> None:
    result: object = [1] if returns is typing.List else {"a": 1}  # noqa: UP006 (likewise)
    assert round_trip(codec_of(returns), result) == result


def test_annotation_with_metadata_that_cannot_be_hashed_is_understood() -> None:
    assert round_trip(codec_of(Annotated[int, ["a list"]]), 3) == 3


def test_other_annotations_need_not_resolve() -> None:
    async def function(session: object) -> Model: ...  # type: ignore[empty-body]

    function.__annotations__ = {"session": "OnlyImportedForTypeCheckers", "return": "Model"}
    assert round_trip(ResultCodec(function), Model(name="m")) == Model(name="m")


def test_return_annotation_that_does_not_resolve_is_a_type_error_that_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"fetch.*Missing.*returns="):
        codec_of("Missing").dump(1)


def test_returns_comes_before_the_annotation() -> None:
    async def function() -> object: ...

    function.__annotations__ = {"return": "Missing"}
    assert round_trip(ResultCodec(function, tuple[int, ...]), (1, 2)) == (1, 2)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="pydantic takes typing.TypedDict from Python 3.12 on")
def test_typed_dict_of_the_old_kind_is_refused_with_what_to_do() -> None:
    old = typing.TypedDict("old", {"a": int})  # noqa: UP013 (shorter)
    with pytest.raises(TypeError, match="typing_extensions"):
        codec_of(old).dump({"a": 1})


@pytest.mark.parametrize("returns", [bytearray, type("Custom", (), {}), Callable[[], int]], ids=repr)
def test_annotation_that_cannot_be_decoded_is_a_type_error_that_names_the_function(returns: Any) -> None:
    with pytest.raises(TypeError, match=r"fetch.*returns="):
        codec_of(returns).dump(1)


NOT_NATIVE: list[object] = [
    (1,),
    {1, 2},
    frozenset(),
    {1: SECRET},
    {None: SECRET},
    {OwnStr("k"): 1},
    Point(1),
    Model(name=SECRET),
    Pair(1, SECRET),
    Colour.RED,
    OwnStr(SECRET),
    collections.OrderedDict(a=1),
    SECRET.encode(),
    dt.datetime(2024, 1, 1),  # noqa: DTZ001
    uuid.UUID(int=1),
    object(),
]
NATIVE_TYPES = pytest.mark.parametrize(
    ("returns", "advice"),
    [
        pytest.param(..., "annotate the return type", id="none"),
        pytest.param(Any, "annotate the return type", id="Any"),
        pytest.param(dict | list | str | int | float, "make the return annotation say exactly", id="native"),
    ],
)
PLACES = pytest.mark.parametrize("place", [lambda value: value, lambda value: {"k": [SECRET, value]}], ids=["itself", "nested"])


@NATIVE_TYPES
@PLACES
@pytest.mark.parametrize("result", NOT_NATIVE, ids=stable_id)
def test_type_that_json_would_change_is_a_type_error_with_ways_out_that_never_shows_the_value(
    result: object, place: Callable[[object], object], returns: Any, advice: str
) -> None:
    with pytest.raises(TypeError, match=rf"(?s)fetch.*JSON would change.*{advice}.*returns=") as caught:
        codec_of(returns).dump(place(result))
    assert SECRET not in str(caught.value)


@NATIVE_TYPES
@PLACES
@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (math.nan, "NaN"),
        (math.inf, "NaN or infinity"),
        (-math.inf, "NaN or infinity"),
        (2**64, "64 bits"),
        (-(2**63) - 1, "64 bits"),
        (SECRET + "\ud800", "surrogate"),
        ({SECRET + "\ud800": 1}, "surrogate"),
    ],
    ids=ascii,
)
def test_value_that_json_cannot_hold_is_not_storable_and_never_shown(
    result: object, reason: str, place: Callable[[object], object], returns: Any, advice: str
) -> None:
    with pytest.raises(NotStorable, match=rf"(?s)fetch.*{reason}.*to have it stored") as caught:
        codec_of(returns).dump(place(result))
    assert SECRET not in str(caught.value)
    assert advice not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


def nested(depth: int, value: object) -> object:
    for _ in range(depth):
        value = [value]
    return value


def self_containing_list() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


@pytest.mark.parametrize("returns", [..., list, tuple[Any, ...] | list[Any], Unshown, Slotted], ids=str)
@pytest.mark.parametrize(
    "result", [nested(400, 1), nested(230, 1), nested(20_000, 1), self_containing_list()], ids=["400", "230", "20000", "self"]
)
def test_result_nested_past_measure_comes_back_or_is_not_storable_with_a_short_message(result: object, returns: Any) -> None:
    codec = codec_of(returns)
    value: Any = returns(content=result) if returns in {Unshown, Slotted} else result
    try:
        json = codec.dump(value)
    except NotStorable as error:
        message = str(error)
        assert "flatter" in message
        assert len(message) < 1_000
    else:
        assert result == nested(230, 1)
        assert codec.load(json) == value


@pytest.mark.parametrize(
    ("returns", "result"),
    [
        (Model, Wider(name=SECRET)),
        (list[Model], [Wider(name=SECRET)]),
        (dict[str, Model], {"a": Wider(name=SECRET)}),
        (Model | None, Wider(name=SECRET)),
        (Point, WiderPoint(1)),
        (list[Point], [WiderPoint(1)]),
        (Model, {"name": SECRET}),
        (Model, None),
        (Row, {"name": SECRET, "other": 1}),
        (Row, {"name": 5}),
        (Model, {"name": math.nan, SECRET: b"\xff"}),
        (bytes, SECRET),
        (set[int], [1]),
        (tuple[int, ...], [1]),
        (Sequence[int], (1,)),
        (tuple, ((1,),)),
        (set[int], {SECRET}),
        (dict[int, int], {SECRET: 1}),
        (dt.datetime, SECRET),
        (Colour, "RED"),
        (Box[Any], Box[Any](content=(1,))),
        (Model, Model.model_construct(name=5)),
        (Closed, Closed(password=SECRET)),  # type: ignore[arg-type]
        (pydantic.SecretStr, pydantic.SecretStr(SECRET)),
        (list[pydantic.Secret[int]], [pydantic.Secret[int](5)]),
        (Unshown, Unshown(content=(SECRET,))),
        (Slotted, Slotted((SECRET,))),
        (int | tuple[int, ...], True),
        (tuple[float, int], (True, 1)),
        (tuple[int, int], (True, 1)),
        (tuple[str, int], (Word.LOW, 1)),
        (tuple[int, int], (Level.LOW, 1)),
        (list[Word], ["low"]),
        (tuple[int, str], Pair(1)),
        (UnshownField, UnshownField(1, (SECRET,))),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_value_of_another_type_than_annotated_is_a_type_error_that_never_shows_it(returns: Any, result: object) -> None:
    with pytest.raises(TypeError, match=r"(?s)fetch.*annotation.*returns=") as caught:
        codec_of(returns).dump(result)
    assert SECRET not in str(caught.value)
    assert "annotate the return type" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


class Wide(float):
    pass


@dataclasses.dataclass
class Dated:
    when: dt.date | str


class Twin(pydantic.BaseModel):
    name: str


class OtherTwin(pydantic.BaseModel):
    """Looks in JSON as `Twin` does."""

    name: str


def marked(result: Any) -> Any:
    """Set an attribute that no field declares."""
    object.__setattr__(result, "note", SECRET)
    return result


def changed(result: Any, **fields: Any) -> Any:
    for name, value in fields.items():
        object.__setattr__(result, name, value)
    return result


@pytest.mark.parametrize(
    ("returns", "result"),
    [
        (decimal.Decimal, decimal.Decimal("NaN")),
        (Model, Model(name=SECRET + "\ud800")),
        (tuple[str, ...], (SECRET, "\ud800")),
        (Reading, Reading(value=math.nan)),
        (list[Reading], [Reading(value=1.0), Reading(value=math.inf)]),
        (Measured, Measured(math.nan)),
        (Blob, Blob(data=b"\xff")),
        (Unshown, Unshown(content=math.nan)),
        (tuple[float, ...], (2**53 + 1,)),
        (Excluded, Excluded(shown=1, left_out=2)),
        (Same, Same(shown=1, left_out=2)),
        (Private, Private(shown=1).noted(2)),
        (Guarded, Guarded()),
        (Model, marked(Model(name="m"))),
        (list[Model], [Model(name="m"), marked(Model(name="m"))]),
        (Point, marked(Point(1))),
        (WithInit, changed(WithInit(1), twice=3)),
        (Stateful, Stateful(1)),
        (Excited, Excited(name="m")),
        (Rounded, Rounded(number=1.26)),
        (dt.time, dt.time(1, tzinfo=zoneinfo.ZoneInfo("Europe/Oslo"))),
        (tuple[dt.datetime], (dt.datetime(2024, 1, 1, fold=1),)),  # noqa: DTZ001
        (dt.date | str, "2020-01-01"),
        (list[dt.date | str | None], ["2020-01-01", None]),
        (uuid.UUID | str, str(uuid.UUID(int=1))),
        (decimal.Decimal | str, "1.5"),
        (bytes | str, SECRET),
        (Dated, Dated("2020-01-01")),
        (Twin | OtherTwin, OtherTwin(name=SECRET)),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_value_or_state_that_would_not_come_back_is_not_storable_and_never_shown(returns: Any, result: object) -> None:
    with pytest.raises(NotStorable, match=r"(?s)fetch.*to have it stored") as caught:
        codec_of(returns).dump(result)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize(
    ("returns", "result"),
    [
        (dt.date | str, "a day"),
        (dt.date | str, dt.date(2020, 1, 1)),
        (uuid.UUID | str, "x"),
        (Dated, Dated(dt.date(2020, 1, 1))),
        (Twin | OtherTwin, Twin(name="m")),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_value_that_its_json_tells_from_others_of_a_union_comes_back(returns: Any, result: object) -> None:
    assert round_trip(codec_of(returns), result) == result


@pytest.mark.parametrize(
    ("returns", "result"),
    [(str | dt.date, dt.date(2020, 1, 1)), (list[int] | tuple[int, ...], (1,)), (dt.date | str, 5), (dt.date | str, b"x")],
    ids=lambda value: repr(value)[:40],
)
def test_type_that_never_comes_back_under_its_union_stays_a_type_error(returns: Any, result: object) -> None:
    with pytest.raises(TypeError, match="returns="):
        codec_of(returns).dump(result)


@pytest.mark.parametrize(
    "value", [complex(-0.0, 0.0), complex(0.0, -0.0), complex(-0.0, -0.0), complex(1.0, -0.0), 1 + 2j], ids=repr
)
def test_complex_comes_back_with_its_signs_or_not_at_all(value: complex) -> None:
    codec = codec_of(complex)
    try:
        back = round_trip(codec, value)
    except NotStorable:
        assert value.real == 0 or value.imag == 0
    else:
        assert [math.copysign(1, part) for part in (back.real, back.imag)] == [
            math.copysign(1, part) for part in (value.real, value.imag)
        ]
        assert back == value


STATES: list[tuple[Any, Any]] = [
    (Model, Model(name="m")),
    (Model, Model(name="m", sizes=())),
    (Model, Model.model_construct(name="m")),
    (list[Model], [Model(name="m"), Model(name="m", sizes=(1,)), Model(name="n", sizes=())]),
    (dict[str, Box[Model]], {"b": Box[Model](content=Model(name="m")), "a": Box[Model](content=Model(name="m", sizes=()))}),
    (Cat | Dog, Dog(name="d")),
    (Annotated[Cat | Dog, pydantic.Field(discriminator="kind")], Cat(name="c")),
    (list[Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]], [Cat(name="c"), Dog(name="d", kind="dog")]),
    (Stamped, Stamped(name="m")),
    (tuple[Stamped, ...], (Stamped(name="m"), Stamped(name="n", number=3))),
    (Holder, Holder(Stamped(name="m"), [Stamped(name="n")])),
    (Mutated, Mutated(name="m").added(1)),
    (Open, Open.model_validate({"name": "m", "b": 1, "a": [2]})),
    (Frozen, Frozen(name="m")),
    (set[Frozen], {Frozen(name="m"), Frozen(name="n")}),
    (WithInit, WithInit(1)),
    (WithInit, changed(WithInit(1), hidden=[1])),
    (Same, Same(shown=1)),
    (Excluded, Excluded(shown=1)),
    (Private, Private(shown=1)),
    (Root, Root([1, 2])),
    (PydanticPoint, PydanticPoint(1)),
    (collections.defaultdict[str, list[int]], collections.defaultdict(list, a=[1])),
    (collections.Counter[str], collections.Counter("abca")),
    (collections.deque[int], collections.deque([1, 2])),
]


def state_of(value: Any) -> Any:
    """Write a value with all its state, types included."""
    if isinstance(value, pydantic.BaseModel):
        sets = (sorted(value.model_fields_set), value.model_extra, value.__pydantic_private__)
        return type(value), {name: state_of(part) for name, part in value.__dict__.items()}, repr(sets)
    if dataclasses.is_dataclass(value):
        return type(value), {name: state_of(part) for name, part in vars(value).items()}
    if isinstance(value, dict):
        return type(value), [(state_of(key), state_of(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | collections.deque):
        return type(value), [state_of(item) for item in value]
    if isinstance(value, set | frozenset):
        return type(value), sorted(repr(state_of(item)) for item in value)
    return type(value), repr(value)


@pytest.mark.parametrize(("returns", "result"), STATES, ids=stable_id)
def test_state_that_equality_does_not_see_comes_back_as_it_was(returns: Any, result: Any) -> None:
    codec = codec_of(returns)
    before = state_of(result)
    for _ in range(3):
        json = codec.dump(result)
        orjson.loads(json)
        assert state_of(codec.load(json)) == state_of(codec.load(json.decode())) == before == state_of(result)
    assert state_of(codec_of(returns).load(json)) == before, "another process reads it the same"


def test_way_that_one_value_needs_does_not_change_how_the_next_comes_back() -> None:
    codec = codec_of(list[Model] | Stamped)
    for result in (Stamped(name="m"), [Model(name="m")], [Model(name="m", sizes=())], Stamped(name="m", number=3)):
        assert state_of(round_trip(codec, result)) == state_of(result)


@pytest.mark.parametrize(
    "json",
    [
        " ",
        " [",
        " []",
        ' [[[["name"]],[0,0]],\n{"name":"m"}]',
        ' [[[["name"]],[1]],\n{"name":"m"}]',
        ' [[[[5]],[0]],\n{"name":"m"}]',
        ' [[["name"],[0]],\n{"name":"m"',
        ' [5,\n{"name":"m"}]',
        ' [[{"a":["name"]},[0]],\n{"name":"m"}]',
        ' [[["name"],[0]],\n{"name":"m"}]',
        ' [[["name"],[null]],\n{"name":"m"}]',
    ],
)
def test_set_fields_that_do_not_fit_are_a_value_error(json: str) -> None:
    for text in (json, json.encode()):
        with pytest.raises(ValueError, match=r"."):
            codec_of(Stamped).load(text)


def test_way_that_the_last_result_needed_is_tried_first() -> None:
    written = []

    class Watched(pydantic.BaseModel):
        kind: Literal["watched"] = "watched"
        number: Annotated[int, pydantic.PlainSerializer(lambda number: written.append(number) or number)]

    codec = codec_of(Annotated[Watched | Dog, pydantic.Field(discriminator="kind")])
    codec.dump(Watched(number=1))
    written.clear()
    for _ in range(3):
        codec.dump(Watched(number=1))
    assert len(written) == 3


def test_set_fields_of_many_models_take_little_room() -> None:
    codec = codec_of(list[Stamped])
    one, many = ([Stamped(name="m", id="x") for _ in range(number)] for number in (1, 1_000))
    assert len(codec.dump(many)) < 1_000 * len(codec.dump(one)) / 1.5


def test_dict_comes_back_in_its_order() -> None:
    result = {"b": 1, "a": 2, "c": {"z": 1, "y": 2}}
    for returns in (..., dict[str, Any], dict[str, int | dict[str, int]], Open, dict[Literal["a", "b", "c"], Any]):
        value: Any = Open(name="m", **result) if returns is Open else result
        back = round_trip(codec_of(returns), value)
        back = back.model_extra if returns is Open else back
        assert list(back) == ["b", "a", "c"]
        assert list(back["c"]) == ["z", "y"]


def test_typed_dict_comes_back_in_declared_order_from_every_call() -> None:
    result = [{"size": (1, 2), "name": "r"}, {"name": "s", "size": (1, 2)}]
    codec = codec_of(list[Row])
    back = round_trip(codec, result)
    assert back == result
    assert [list(row) for row in back] == [["name", "size"]] * 2
    assert repr(round_trip(codec, back)) == repr(back)


def test_models_of_a_typed_dict_in_another_order_keep_their_own_set_fields() -> None:
    result = {"second": Stamped(name="b"), "first": Stamped(name="a", number=1)}
    back = round_trip(codec_of(Stamps), result)
    assert back == result
    assert [back[name].model_fields_set for name in ("first", "second")] == [{"name", "number"}, {"name"}]


def test_int_where_float_is_annotated_comes_back_a_float() -> None:
    back = round_trip(codec_of(tuple[float, ...]), (1, 2.5))
    assert repr(back) == "(1.0, 2.5)"


@pytest.mark.parametrize("fold", [0, 1])
@pytest.mark.parametrize("parts", [(2024, 10, 27, 2, 30), (2024, 3, 31, 2, 30), (2024, 7, 1)], ids=str)
def test_moment_of_a_named_zone_comes_back_the_same_in_the_hour_that_comes_twice(parts: tuple[int, ...], fold: int) -> None:
    when = dt.datetime(*parts, tzinfo=zoneinfo.ZoneInfo("Europe/Oslo"), fold=fold)  # type: ignore[misc, arg-type]
    codec = codec_of(dt.datetime)
    back = round_trip(codec, when)
    assert back.astimezone(dt.UTC) == when.astimezone(dt.UTC)
    assert back.replace(tzinfo=None) == when.replace(tzinfo=None, fold=0)
    assert repr(round_trip(codec, back)) == repr(back)


def test_moment_before_zones_had_whole_minutes_comes_back_the_same_or_not_at_all() -> None:
    when = dt.datetime(1880, 1, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Oslo"))
    try:
        back = round_trip(codec_of(dt.datetime), when)
    except NotStorable:
        return
    assert back.astimezone(dt.UTC) == when.astimezone(dt.UTC)


ALIASED: list[tuple[Any, Any]] = [
    (Aliased, Aliased(Name="m")),
    (Aliased, Aliased(Name="m", Path="p", Choice=2)),
    (Generated, Generated(someName="m")),
    (Generated, Generated(someName="m", otherName="x")),
    (ByName, ByName(some_name="m")),
    (ByName, ByName(someName="m")),
    (OnlyByName, OnlyByName(some_name="m")),
    (Serialized, Serialized(name="m")),
    (AlwaysAlias, AlwaysAlias(Name="m")),
    (Swapped, Swapped.model_validate({"a": 1, "b": 2})),
    (BeforeAlias, BeforeAlias.model_validate({"Name": "m"})),
    (WithJson, WithJson(data="[1,2]")),  # type: ignore[arg-type]
    (Computed, Computed(width=2)),
    (StrictAliased, StrictAliased(Name="m")),
    (AliasedData, AliasedData(Number=1)),
]


@pytest.mark.parametrize(
    ("around", "wrap"),
    [
        pytest.param(lambda kind: kind, lambda value: value, id="itself"),
        pytest.param(lambda kind: list[kind], lambda value: [value, value], id="list"),
        pytest.param(lambda kind: dict[str, kind | None], lambda value: {"b": value, "a": None}, id="union"),
        pytest.param(lambda kind: Envelope[kind], lambda value: Envelope([value]), id="dataclass"),
        pytest.param(lambda kind: Box[kind], lambda value: Box[type(value)](content=value), id="generic"),  # type: ignore[misc]
        pytest.param(lambda kind: tuple[Model, kind], lambda value: (Model(name="n"), value), id="beside"),
    ],
)
@pytest.mark.parametrize(("returns", "result"), ALIASED, ids=lambda value: repr(value)[:40])
def test_model_with_other_names_in_json_comes_back_wherever_it_stands(
    returns: Any, result: Any, around: Callable[[Any], Any], wrap: Callable[[Any], Any]
) -> None:
    codec = codec_of(around(returns))
    value = wrap(result)
    assert state_of(round_trip(codec, value)) == state_of(value)


def test_validator_that_is_not_idempotent_never_changes_what_comes_back() -> None:
    with pytest.raises(NotStorable, match="another value"):
        codec_of(Excited).dump(Excited(name="m"))
    with pytest.raises(TypeError, match=r"(?s)fetch.*ValidationError"):
        codec_of(Once).dump(Once(name="m"))


def test_validator_that_fails_in_its_own_way_is_a_type_error_that_never_shows_the_value() -> None:
    with pytest.raises(TypeError, match="KeyError") as caught:
        codec_of(Failing).dump(Failing.model_construct(name=SECRET))
    assert SECRET not in str(caught.value)


def test_what_a_cached_property_remembers_does_not_count() -> None:
    for result in (Remembering(2), RememberingModel(size=2)):
        assert result.area == 4
        assert round_trip(codec_of(type(result)), result) == result


class Opaque:
    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque)

    __hash__ = None  # type: ignore[assignment]


OpaqueType = Annotated[
    Opaque, pydantic.PlainValidator(lambda number: Opaque(int(number))), pydantic.PlainSerializer(lambda opaque: opaque.number)
]
LosingType = Annotated[
    Opaque, pydantic.PlainValidator(lambda _: Opaque(0)), pydantic.PlainSerializer(lambda opaque: opaque.number)
]


def test_class_with_an_equality_of_its_own_is_compared_by_state_too() -> None:
    assert round_trip(codec_of(OpaqueType), Opaque(5)).number == 5
    assert round_trip(codec_of(LosingType), Opaque(0)).number == 0
    with pytest.raises(NotStorable):
        codec_of(LosingType).dump(Opaque(5))


def test_message_names_the_place_without_keys_that_are_data() -> None:
    models = [Unshown(content=1), Unshown(content={SECRET: math.nan})]
    with pytest.raises(NotStorable, match=r"at \[1\]\.content\[\.\.\.\] holds NaN") as caught:
        codec_of(list[Unshown]).dump(models)
    assert SECRET not in str(caught.value)
    with pytest.raises(TypeError, match=r"at \[1\]\.content comes back as list, not tuple"):
        codec_of(list[Box[Any]]).dump([Box[Any](content=1), Box[Any](content=(1,))])


def test_resolving_is_done_once_and_load_is_the_bare_function_then() -> None:
    parts = []
    codec = ResultCodec(
        test_message_names_the_place_without_keys_that_are_data, dict[str, int], lambda returns: parts.append(1) or returns
    )
    assert codec.load is orjson.loads
    codec.resolve()
    codec.resolve()
    assert codec.schema == ResultCodec(test_dict_comes_back_in_its_order, dict[str, int]).schema


def test_annotation_that_is_defined_later_is_resolved_at_the_first_call() -> None:
    async def function() -> object: ...

    function.__annotations__ = {"return": "DefinedLater"}
    codec = ResultCodec(function)
    with pytest.raises(TypeError, match="DefinedLater"):
        codec.resolve()
    globals()["DefinedLater"] = tuple[int, ...]
    try:
        assert codec.load(codec.dump((1, 2))) == (1, 2)
        assert codec.schema == ResultCodec(function, tuple[int, ...]).schema
        assert ResultCodec(function).load("[1]") == (1,)
    finally:
        del globals()["DefinedLater"]


def test_typed_result_without_pydantic_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(TypeError, match=r"fetch.*pip install 'aiokv\[pydantic\]'"):
        codec_of(Point).dump(Point(1))
    assert round_trip(codec_of(dict[str, list[int | None]]), {"a": [1, None]}) == {"a": [1, None]}


def test_part_of_what_is_annotated_is_what_is_stored() -> None:
    async def function() -> dict[int, Model]: ...  # type: ignore[empty-body]

    codec = ResultCodec(function, part=lambda returns: typing.get_args(returns)[1])
    assert round_trip(codec, Model(name="m")) == Model(name="m")
    assert codec.schema == codec_of(Model).schema


@pytest.mark.parametrize("text", ["", "{", "nul", "[1,", '{"name":5}', '{"other":1}', "null", "[]", '"m"', "\ud800"], ids=ascii)
def test_text_that_is_not_of_the_annotated_type_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        codec_of(Model).load(text)


@pytest.mark.parametrize("text", ["", "{", "nul", "[1,", "NaN", "1 2"], ids=ascii)
def test_text_that_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        codec_of(...).load(text)


def test_what_is_decoded_belongs_to_nobody_else() -> None:
    codec = codec_of(...)
    json = codec.dump({"a": [1]})
    codec.load(json)["a"].append(2)
    assert codec.load(json) == {"a": [1]}
