"""Results: what comes back equals what went in, or nothing is stored; and the text of an entry."""

import base64
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import math
import pathlib
import random
import sys
import typing
import uuid
import zoneinfo
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, Optional, TypeVar, Union

import orjson
import pydantic
import pytest
import typing_extensions
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import aiokv.caching.codec
from aiokv import ConfigurationError
from aiokv.caching.codec import JSON, MAX_DECOMPRESSED_BYTES, Codec, Encrypted, ResultCodec, Zstd
from aiokv.caching.entry import Entry, Freshness, pack, unpack
from aiokv.limits import MAX_VALUE_BYTES

SECRET = "s3cr3t-value"
KEY = "prefix:0:digest"
T = TypeVar("T")


class Colour(enum.Enum):
    RED = 1
    BLUE = "b"


class Model(pydantic.BaseModel):
    name: str
    sizes: tuple[int, ...] = ()


class Wider(Model):
    more: int = 3


class Nested(pydantic.BaseModel):
    models: dict[str, Model]
    when: dt.datetime
    price: decimal.Decimal
    colours: set[Colour]
    parent: Optional["Nested"] = None


class Box(pydantic.BaseModel, Generic[T]):
    content: T


@dataclasses.dataclass
class Point:
    x: int
    path: tuple[int, ...] = ()


@dataclasses.dataclass
class WiderPoint(Point):
    z: int = 1


class Pair(NamedTuple):
    first: int
    second: str = "x"


class Row(typing_extensions.TypedDict):
    name: str
    size: typing_extensions.NotRequired[tuple[int, int]]


class Closed(pydantic.BaseModel):
    password: pydantic.SecretStr


class Unshown(pydantic.BaseModel):
    content: Any = pydantic.Field(default=None, repr=False)


class Excluded(pydantic.BaseModel):
    shown: int
    left_out: int = pydantic.Field(default=0, exclude=True, repr=False)


class Private(pydantic.BaseModel):
    shown: int
    _note: int = pydantic.PrivateAttr(default=0)

    def noted(self, note: int) -> "Private":
        self._note = note
        return self


@dataclasses.dataclass
class UnshownField:
    x: int
    content: Any = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(slots=True)
class Slotted:
    content: Any = None


class OwnStr(str):  # noqa: SLOT000 (a subclass of a builtin is the point)
    pass


Number = NewType("Number", int)


def codec_of(returns: Any, steps: Codec | Sequence[Codec] | None = None) -> ResultCodec:
    """Make the codec of a function with a return annotation; `...` is one without."""

    async def function() -> None: ...

    function.__annotations__ = {} if returns is ... else {"return": returns}
    function.__qualname__ = "fetch"
    return ResultCodec(function, None, steps)


def round_trip(codec: ResultCodec, result: object, key: str = KEY) -> Any:
    payload, applied = codec.encode(result, key)
    return codec.decode(payload, applied, key)


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


@given(value=JSON_VALUES)
@settings(max_examples=200)
def test_native_value_comes_back_the_same(value: object) -> None:
    codec = codec_of(...)
    payload, applied = codec.encode(value, KEY)
    assert not applied
    # By text, which tells 1 from True and 0.0 from -0.0.
    assert repr(codec.decode(payload, applied, KEY)) == repr(value)
    assert orjson.loads(payload) == value


@given(value=JSON_VALUES)
@settings(max_examples=100)
def test_native_value_comes_back_the_same_through_every_step(value: object) -> None:
    codec = codec_of(..., [Zstd(min_bytes=8), Encrypted(b"k" * 32)])
    assert repr(round_trip(codec, value)) == repr(value)


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


@pytest.mark.parametrize(("returns", "result"), ROUND_TRIPS, ids=lambda value: repr(value)[:40])
def test_annotated_result_comes_back_equal_and_of_its_type(returns: Any, result: object) -> None:
    codec = codec_of(returns)
    back = round_trip(codec, result)
    assert back == result
    assert type(back) is type(result)
    assert round_trip(codec, back) == result
    assert round_trip(codec_of(returns, [Zstd(min_bytes=0), Encrypted(b"k" * 32)]), result) == result


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


@pytest.mark.parametrize("make", [Unshown, Slotted], ids=lambda make: make.__name__)
def test_nan_in_a_field_comes_back_as_nan_or_is_refused(make: Callable[..., Any]) -> None:
    codec = codec_of(tuple[make, ...])  # type: ignore[valid-type]
    try:
        back = round_trip(codec, (make(content=math.nan),))
    except TypeError as error:
        assert "fetch" in str(error)  # noqa: PT017 (either is right)
    else:
        assert math.isnan(back[0].content)


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
    assert round_trip(ResultCodec(function, None, None), Model(name="m")) == Model(name="m")


def test_return_annotation_that_does_not_resolve_is_a_type_error_that_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"fetch.*Missing.*returns="):
        codec_of("Missing").encode(1, KEY)


def test_returns_comes_before_the_annotation() -> None:
    async def function() -> object: ...

    function.__annotations__ = {"return": "Missing"}
    assert round_trip(ResultCodec(function, tuple[int, ...], None), (1, 2)) == (1, 2)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="pydantic takes typing.TypedDict from Python 3.12 on")
def test_typed_dict_of_the_old_kind_is_refused_with_what_to_do() -> None:
    old = typing.TypedDict("old", {"a": int})  # noqa: UP013 (shorter)
    with pytest.raises(TypeError, match="typing_extensions"):
        codec_of(old).encode({"a": 1}, KEY)


@pytest.mark.parametrize("returns", [bytearray, type("Custom", (), {}), Callable[[], int]], ids=repr)
def test_annotation_that_cannot_be_decoded_is_a_type_error_that_names_the_function(returns: Any) -> None:
    with pytest.raises(TypeError, match=r"fetch.*returns="):
        codec_of(returns).encode(1, KEY)


UNREPRESENTABLE: list[object] = [
    (1,),
    {1, 2},
    frozenset(),
    {1: SECRET},
    {None: SECRET},
    {OwnStr("k"): 1},
    math.nan,
    math.inf,
    -math.inf,
    Point(1),
    Model(name=SECRET),
    Pair(1, SECRET),
    Colour.RED,
    OwnStr(SECRET),
    collections.OrderedDict(a=1),
    2**64,
    -(2**63) - 1,
    SECRET + "\ud800",
    {SECRET + "\ud800": 1},
    SECRET.encode(),
    dt.datetime(2024, 1, 1),  # noqa: DTZ001
    uuid.UUID(int=1),
    object(),
]


@pytest.mark.parametrize("returns", [..., Any, dict | list | str | int | float], ids=["none", "Any", "native"])
@pytest.mark.parametrize("place", [lambda value: value, lambda value: {"k": [SECRET, value]}], ids=["itself", "nested"])
@pytest.mark.parametrize("result", UNREPRESENTABLE, ids=lambda value: ascii(value)[:25])
def test_result_that_json_would_change_is_a_type_error_with_ways_out_that_never_shows_it(
    result: object, place: Callable[[object], object], returns: Any
) -> None:
    with pytest.raises(TypeError, match=r"(?s)fetch.*annotate.*returns=") as caught:
        codec_of(returns).encode(place(result), KEY)
    assert SECRET not in str(caught.value)


def nested_list(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


def self_containing_list() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


@pytest.mark.parametrize("result", [nested_list(400), self_containing_list()], ids=["deep", "self"])
def test_result_nested_past_measure_is_a_short_type_error_that_names_the_function(result: object) -> None:
    with pytest.raises(TypeError, match="fetch") as caught:
        codec_of(...).encode(result, KEY)
    assert len(str(caught.value)) < 1_000


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
        (bytes, SECRET),
        (set[int], [1]),
        (tuple[int, ...], [1]),
        (Sequence[int], (1,)),
        (tuple, ((1,),)),
        (set[int], {SECRET}),
        (dict[int, int], {SECRET: 1}),
        (dt.datetime, SECRET),
        (decimal.Decimal, decimal.Decimal("NaN")),
        (Colour, "RED"),
        (Box[Any], Box[Any](content=(1,))),
        (Model, Model.model_construct(name=5)),
        (Model, Model(name=SECRET + "\ud800")),
        (tuple[Any, ...], (math.nan, (1,))),
        (Closed, Closed(password=SECRET)),  # type: ignore[arg-type]
        (pydantic.SecretStr, pydantic.SecretStr(SECRET)),
        (Unshown, Unshown(content=(SECRET,))),
        (Slotted, Slotted((SECRET,))),
        (int | tuple[int, ...], True),
        (tuple[int, str], Pair(1)),
        (UnshownField, UnshownField(1, (SECRET,))),
        (Excluded, Excluded(shown=1, left_out=2)),
        (Private, Private(shown=1).noted(2)),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_result_that_would_be_stored_changed_is_a_type_error_that_never_shows_it(returns: Any, result: object) -> None:
    with pytest.raises(TypeError, match=r"(?s)fetch.*annotation.*returns=") as caught:
        codec_of(returns).encode(result, KEY)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize("text", ["", "{", "nul", "[1,", '{"name":5}', '{"other":1}', "null", "[]", '"m"', "\ud800"], ids=ascii)
def test_text_that_is_not_of_the_annotated_type_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        codec_of(Model).decode(text, "", KEY)


@pytest.mark.parametrize("text", ["", "{", "nul", "[1,", "NaN", "1 2"], ids=ascii)
def test_text_that_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        codec_of(...).decode(text, "", KEY)


def test_what_is_decoded_belongs_to_nobody_else() -> None:
    codec = codec_of(...)
    payload, applied = codec.encode({"a": [1]}, KEY)
    codec.decode(payload, applied, KEY)["a"].append(2)
    assert codec.decode(payload, applied, KEY) == {"a": [1]}


def test_no_step_leaves_the_json_as_it_is() -> None:
    assert codec_of(..., JSON).encode({"a": 1}, KEY) == codec_of(...).encode({"a": 1}, KEY) == ('{"a":1}', "")


@pytest.mark.parametrize(("length", "applied"), [(97, ""), (98, "zstd"), (99, "zstd")])
def test_result_is_compressed_from_the_least_length_on(length: int, applied: str) -> None:
    # Two quotation marks come on top.
    codec = codec_of(..., Zstd(min_bytes=100))
    payload, names = codec.encode("x" * length, KEY)
    assert names == applied
    assert codec.decode(payload, names, KEY) == "x" * length


def test_large_result_fits_the_store_when_compressed() -> None:
    result = [{"number": number, "text": "something to say"} for number in range(100_000)]
    plain, _ = codec_of(...).encode(result, KEY)
    codec = codec_of(..., Zstd())
    payload, applied = codec.encode(result, KEY)
    assert len(payload) < MAX_VALUE_BYTES < len(plain)
    assert codec.decode(payload, applied, KEY) == result


def compressed_zeros(size_bytes: int) -> bytes:
    compressor = zstandard.ZstdCompressor().compressobj(size=size_bytes)
    whole, rest = divmod(size_bytes, 2**20)
    parts = [compressor.compress(bytes(2**20)) for _ in range(whole)] + [compressor.compress(bytes(rest)), compressor.flush()]
    return b"".join(parts)


def test_compressed_data_past_the_bound_are_refused_before_memory_is_taken() -> None:
    bomb = compressed_zeros(MAX_DECOMPRESSED_BYTES + 1)
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="size"):
        Zstd().decode(bomb, KEY)


def test_bound_of_decompression_is_inclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiokv.caching.codec, "MAX_DECOMPRESSED_BYTES", 1_000)
    assert Zstd().decode(compressed_zeros(1_000), KEY) == bytes(1_000)
    with pytest.raises(ValueError, match="size"):
        Zstd().decode(compressed_zeros(1_001), KEY)


def test_compressed_data_that_hide_their_size_are_refused() -> None:
    with pytest.raises(ValueError, match="size"):
        Zstd().decode(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10_000)), KEY)


def sealed_by(step: Codec, data: bytes) -> bytes:
    sealed = step.encode(data, KEY)
    assert sealed is not None
    return sealed


@pytest.mark.parametrize(
    "step", [pytest.param(Zstd(min_bytes=0), id="zstd"), pytest.param(Encrypted(b"k" * 32), id="encrypted")]
)
class TestDamage:
    DATA = random.Random(1).randbytes(300)

    def test_any_changed_bit_is_a_value_error_or_changes_nothing(self, step: Codec) -> None:
        sealed = sealed_by(step, self.DATA)
        for position in range(8 * len(sealed)):
            damaged = bytearray(sealed)
            damaged[position // 8] ^= 1 << position % 8
            try:
                data = step.decode(bytes(damaged), KEY)
            except ValueError:
                continue
            assert data == self.DATA, f"bit {position} has changed the data"

    def test_any_missing_end_is_a_value_error(self, step: Codec) -> None:
        sealed = sealed_by(step, self.DATA)
        for length in range(len(sealed)):
            with pytest.raises(ValueError, match="result"):
                step.decode(sealed[:length], KEY)

    def test_anything_that_follows_is_a_value_error(self, step: Codec) -> None:
        with pytest.raises(ValueError, match="result"):
            step.decode(sealed_by(step, self.DATA) + b"more", KEY)

    def test_payload_that_is_no_base85_is_a_value_error(self, step: Codec) -> None:
        codec = codec_of(..., step)
        for payload in ("", "é", '"""""', "~~~~~", "\0", "x"):
            with pytest.raises(ValueError, match=r"."):
                codec.decode(payload, step.name, KEY)


def test_encrypted_result_is_bound_to_its_key_and_never_the_same_twice() -> None:
    codec = codec_of(..., Encrypted(Encrypted.new_key()))
    first, second = codec.encode(SECRET, KEY), codec.encode(SECRET, KEY)
    assert first != second
    assert first[1] == "aesgcm"
    assert SECRET.encode() not in base64.b85decode(first[0])
    assert codec.decode(*first, KEY) == codec.decode(*second, KEY) == SECRET
    with pytest.raises(ValueError, match="not for this entry"):
        codec.decode(*first, KEY + "x")


def test_rotation_reads_with_every_key_and_writes_with_the_first() -> None:
    old, new = Encrypted.new_key(), Encrypted.new_key()
    by_old = codec_of(..., Encrypted(old)).encode(SECRET, KEY)
    rotating = codec_of(..., Encrypted([new, old]))
    assert rotating.decode(*by_old, KEY) == SECRET
    by_new = rotating.encode(SECRET, KEY)
    assert codec_of(..., Encrypted(new)).decode(*by_new, KEY) == SECRET
    for foreign, entry in ((old, by_new), (new, by_old), (Encrypted.new_key(), by_new)):
        with pytest.raises(ValueError, match="any of the keys"):
            codec_of(..., Encrypted(foreign)).decode(*entry, KEY)


@pytest.mark.parametrize("steps", [[Encrypted(b"k" * 32)], [Zstd(), Encrypted(b"k" * 32)]], ids=["alone", "after Zstd"])
@pytest.mark.parametrize("applied", ["", "zstd"])
def test_entry_that_was_not_encrypted_is_refused_where_encryption_is_configured(steps: list[Codec], applied: str) -> None:
    payload, names = codec_of(..., Zstd(min_bytes=0 if applied else 1_000)).encode("forged", KEY)
    assert names == applied
    with pytest.raises(ValueError, match="steps that are expected"):
        codec_of(..., steps).decode(payload, names, KEY)


@pytest.mark.parametrize(
    ("steps", "applied"),
    [
        ([], "zstd"),
        ([], "other"),
        ([Zstd()], "aesgcm"),
        ([Zstd()], "zstd+zstd"),
        ([Zstd()], "zstd+"),
        ([Zstd()], "+"),
        ([Zstd(), Encrypted(b"k" * 32)], "aesgcm+zstd"),
        ([Encrypted(b"k" * 32)], "zstd+aesgcm"),
    ],
    ids=str,
)
def test_entry_of_other_steps_is_refused(steps: list[Codec], applied: str) -> None:
    with pytest.raises(ValueError, match="steps that are expected"):
        codec_of(..., steps).decode("1", applied, KEY)


def test_uncompressed_entry_is_read_where_compression_is_configured() -> None:
    assert codec_of(..., Zstd()).decode(*codec_of(...).encode([1], KEY), KEY) == [1]


def test_steps_are_applied_in_order_and_undone_in_reverse() -> None:
    encrypted = Encrypted(b"k" * 32)
    small, names = codec_of(..., [Zstd(), encrypted]).encode("x" * 5_000, KEY)
    large, other_names = codec_of(..., [encrypted, Zstd()]).encode("x" * 5_000, KEY)
    assert (names, other_names) == ("zstd+aesgcm", "aesgcm+zstd")
    assert len(small) < 200
    assert len(large) > 5_000
    data = Zstd().decode(encrypted.decode(base64.b85decode(small), KEY), KEY)
    assert data == orjson.dumps("x" * 5_000)


@pytest.mark.parametrize("key", [b"", b"k" * 31, b"k" * 33, "k" * 32, [], [b"k" * 32, b"short"], ["k" * 32], [None]], ids=repr)
def test_key_of_another_size_or_type_is_refused_with_how_to_make_one_and_never_shown(key: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"32 bytes.*new_key") as caught:
        Encrypted(key)
    assert "kkk" not in str(caught.value)


def test_no_text_of_an_encrypting_step_shows_its_key() -> None:
    key = b"0123456789abcdef0123456789abcdef"
    step = Encrypted([key, b"k" * 32])
    assert repr(step) == str(step) == "Encrypted(<2 keys>)"
    assert "0123456789" not in repr(vars(step))


def test_new_keys_are_random() -> None:
    assert len({Encrypted.new_key() for _ in range(10)}) == 10
    assert all(len(Encrypted.new_key()) == 32 for _ in range(3))


class NamedStep:
    required = False

    def __init__(self, name: str) -> None:
        self.name = name

    def encode(self, data: bytes, key: str) -> bytes | None:
        return data + key.encode()

    def decode(self, data: bytes, key: str) -> bytes:
        return data.removesuffix(key.encode())


@pytest.mark.parametrize("names", [["a", "a"], ["a+b"], [""], ["a", "b", "a"]], ids=str)
def test_steps_that_could_not_be_told_apart_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="names"):
        codec_of(..., [NamedStep(name) for name in names])


def test_own_step_is_applied_with_the_key() -> None:
    codec = codec_of(..., [NamedStep("a"), Zstd(min_bytes=0), NamedStep("b")])
    payload, applied = codec.encode([1], KEY)
    assert applied == "a+zstd+b"
    assert base64.b85decode(payload).endswith(KEY.encode())
    assert codec.decode(payload, applied, KEY) == [1]


@pytest.mark.parametrize(("extra", "make"), [("zstandard", Zstd), ("cryptography.exceptions", lambda: Encrypted(b"k" * 32))])
def test_step_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, extra: str, make: Callable[[], object]
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'aiokv\["):
        make()


def test_typed_result_without_pydantic_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(TypeError, match=r"fetch.*pip install 'aiokv\[pydantic\]'"):
        codec_of(Point).encode(Point(1), KEY)
    assert round_trip(codec_of(dict[str, list[int | None]]), {"a": [1, None]}) == {"a": [1, None]}


ENTRY = Entry("payload\nof two lines", "zstd", 1_000.5, 2_000.0, 0.25)
NUMBERS = st.floats(-1e12, 1e12) | st.integers(-(2**63), 2**64 - 1)


def test_text_of_an_entry_is_what_it_has_always_been() -> None:
    text = '[1,"a:0:ff",1000.5,2000.0,0.25,"zstd"]\npayload\nof two lines'
    assert pack("a:0:ff", ENTRY) == text
    assert unpack("a:0:ff", text) == ENTRY


@given(
    key=st.text(st.characters(exclude_categories=["Cs"])),
    entry=st.builds(
        Entry,
        payload=st.text(),
        codec=st.sampled_from(["", "zstd", "zstd+aesgcm"]),
        started=NUMBERS,
        fresh_until=NUMBERS,
        compute_seconds=st.floats(0, 1e9),
    ),
)
@settings(max_examples=200)
def test_entry_comes_back_the_same_for_its_key_alone(key: str, entry: Entry) -> None:
    text = pack(key, entry)
    assert unpack(key, text) == entry
    assert unpack(key + "x", text) is None


@given(
    text=st.one_of(
        st.text(),
        JSON_VALUES.map(lambda value: orjson.dumps(value).decode() + "\n"),
        st.lists(JSON_VALUES | st.sampled_from([1, KEY, "", 5.0]), min_size=5, max_size=7).map(
            lambda items: orjson.dumps(items).decode() + "\nx"
        ),
        st.lists(JSON_VALUES, min_size=4, max_size=4).map(lambda items: orjson.dumps([1, KEY, *items]).decode() + "\nx"),
    )
)
@settings(max_examples=200)
def test_reading_any_text_gives_an_entry_or_none_and_never_raises(text: str) -> None:
    entry = unpack(KEY, text)
    if entry is not None:
        assert all(type(number) in {int, float} and math.isfinite(number) for number in entry[2:])
        assert entry.compute_seconds >= 0
        assert isinstance(entry.codec, str)
        assert entry.due_early(0.0, 1.0, 0.5) in {True, False}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "{}\n",
        '[1,"k",1,1,1,""]',
        '[2,"k",1,1,1,""]\n',
        '[0,"k",1,1,1,""]\n',
        '["1","k",1,1,1,""]\n',
        '[true,"k",1,1,1,""]\n',
        '[1,"K",1,1,1,""]\n',
        '[1,null,1,1,1,""]\n',
        '[1,"k",1,1,1]\n',
        '[1,"k",1,1,1,"",""]\n',
        '[1,"k","1",1,1,""]\n',
        '[1,"k",1,null,1,""]\n',
        '[1,"k",1,true,1,""]\n',
        '[1,"k",1,1,-1,""]\n',
        '[1,"k",1,1,1,null]\n',
        '[1,"k",NaN,1,1,""]\n',
        '[1,"k",1,1e999,1,""]\n',
        "[" * 100_000 + "\n",
        "\ud800\n",
    ],
    ids=lambda text: ascii(text)[:30],
)
def test_text_of_another_form_or_key_is_a_miss(text: str) -> None:
    assert unpack("k", text) is None


@pytest.mark.parametrize(
    ("now", "stale_seconds", "freshness"),
    [
        (0.0, 0.0, Freshness.FRESH),
        (1_999.999, 0.0, Freshness.FRESH),
        (2_000.0, 0.0, Freshness.EXPIRED),
        (2_000.0, 10.0, Freshness.STALE),
        (2_009.999, 10.0, Freshness.STALE),
        (2_010.0, 10.0, Freshness.EXPIRED),
        (1_999.999, 10.0, Freshness.FRESH),
    ],
)
def test_entry_is_fresh_then_stale_then_expired(now: float, stale_seconds: float, freshness: Freshness) -> None:
    assert ENTRY.freshness(now, stale_seconds) is freshness


CHANCES = st.floats(1e-12, 1.0, exclude_min=True)


@given(now=st.floats(0, 4_000), later=st.floats(0, 4_000), early=st.floats(0, 100), chance=CHANCES)
@settings(max_examples=200)
def test_entry_once_due_stays_due(now: float, later: float, early: float, chance: float) -> None:
    first, second = sorted((now, later))
    assert ENTRY.due_early(second, early, chance) >= ENTRY.due_early(first, early, chance)


@given(now=st.floats(0, 2_000, exclude_max=True), chance=CHANCES)
@settings(max_examples=100)
def test_fresh_entry_is_never_due_where_nothing_is_to_be_early(now: float, chance: float) -> None:
    assert not ENTRY.due_early(now, 0.0, chance)
    assert not ENTRY._replace(compute_seconds=0).due_early(now, 1.0, chance)


@given(now=st.floats(1_900, 2_000), early=st.floats(0, 100), more=st.floats(0, 100), chance=CHANCES)
@settings(max_examples=100)
def test_more_eager_or_longer_computed_is_due_no_later(now: float, early: float, more: float, chance: float) -> None:
    assert ENTRY.due_early(now, early + more, chance) >= ENTRY.due_early(now, early, chance)
    longer = ENTRY._replace(compute_seconds=ENTRY.compute_seconds + more)
    assert longer.due_early(now, early, chance) >= ENTRY.due_early(now, early, chance)


@pytest.mark.parametrize("seconds_left", [0.25, 0.5, 1.0])
def test_share_of_readers_that_compute_early_is_that_of_the_paper(seconds_left: float) -> None:
    generator = random.Random(7)
    due = sum(ENTRY.due_early(2_000.0 - seconds_left, 1.0, 1.0 - generator.random()) for _ in range(20_000))
    assert due / 20_000 == pytest.approx(math.exp(-seconds_left / ENTRY.compute_seconds), abs=0.02)


@pytest.mark.parametrize(
    ("then", "now"), [(list[int], dict[str, int]), (list[int], list[str]), (int, float), (Model, dict[str, Any]), (Any, int)]
)
def test_result_of_what_was_annotated_before_is_a_value_error(then: Any, now: Any) -> None:
    old, new = codec_of(then), codec_of(now)
    result: Any = {int: 1, Any: 1, Model: Model(name="m")}.get(then, [1])
    payload, applied = old.encode(result, KEY)
    assert old.decode(payload, applied, KEY) == result
    with pytest.raises(ValueError, match="of another type than this function returns today"):
        new.decode(payload, applied, KEY)


def test_annotation_that_holds_a_function_reads_the_same_in_every_process() -> None:
    def checked(value: int) -> int:
        return value

    codecs = [codec_of(Annotated[int, pydantic.AfterValidator(check)]) for check in (checked, lambda value: value)]
    (first, _), (second, _) = ((codec.encode(1, KEY)[1], 0) for codec in codecs)
    assert "0x" not in first
    other = codec_of(Annotated[int, pydantic.AfterValidator(checked)])
    assert other.encode(1, KEY)[1] == first
    assert first != second
