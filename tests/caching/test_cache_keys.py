"""The key of a call: equal calls share one, different calls never do, in every process."""

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import json
import os
import pathlib
import subprocess
import sys
import types
import uuid
import zoneinfo
from collections.abc import Callable, Coroutine
from typing import Any

import golden_values
import numpy as np
import pydantic
import pytest
from golden_values import Colour, Level, Model, Open, OtherModel, OtherPoint, OtherTenant, Pair, Point, Tenant, Word
from helpers import REPOSITORY
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiokv.caching.keys import MAX_PREFIX_CHARS, KeyMaker, Unencodable, encode

GOLDEN: dict[str, dict[str, str]] = json.loads((REPOSITORY / "tests" / "caching" / "golden_keys.json").read_text())
SECRET = "s3cr3t-value"
Function = Callable[..., Coroutine[None, None, object]]


async def plain(a: object, b: object = 2) -> object:
    return locals()


async def nothing() -> object:
    return locals()


async def positional_only(a: object, b: object = 2, /) -> object:
    return locals()


async def keyword_only(*, a: object, b: object = 2) -> object:
    return locals()


async def stars(*args: object, **kwargs: object) -> object:
    return locals()


async def star_then_keyword(a: object, *args: object, b: object = 2) -> object:
    return locals()


async def every_kind(a: object, b: object = 2, /, c: object = 3, *args: object, d: object = 4, **kwargs: object) -> object:
    return locals()


async def positional_and_keyword_only(a: object, /, *, b: object = 2) -> object:
    return locals()


async def object_defaults(a: object = Point(1), b: object = (1, (2,)), *, c: object = Colour.RED) -> object:
    return locals()


async def named_like_internals(_default_1: object, values: object = 5, _default_0: object = 6, lambda_: object = 7) -> object:
    return locals()


async def named_like_builtins(encode: object, tuple: object = 1, *, signature: object = 2) -> object:  # noqa: A002
    return locals()


async def named_like_types(type: object, types: object = 1, map: object = 2) -> object:  # noqa: A002
    return locals()


async def beyond_ascii(ñ: object, naïve: object = 1) -> object:  # noqa: PLC2401
    return locals()


class Service:
    async def method(self, a: object, b: object = 2) -> object:
        return locals()

    async def mangled(self, __a: object, *, __b: object = 2) -> object:  # noqa: PYI063 (a mangled name, not a positional-only one)
        return locals()

    async def itself(self, *, values: object = 1) -> object:
        return locals()


def bound(function: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Say what Python binds to each parameter, by calling a function that returns its own."""
    with pytest.raises(StopIteration) as stopped:
        function(*args, **kwargs).send(None)
    return stopped.value.value


def key_of(function: Function, /, *args: object, **kwargs: object) -> str:
    return KeyMaker(function)(args, kwargs)


def identity(value: object) -> object:
    """Say what makes a value the same argument, in another way than the encoding does."""
    kind = type(value)
    if isinstance(value, float):
        return kind, "nan" if value != value else value.hex()  # noqa: PLR0124
    if isinstance(value, list | tuple):
        return kind, tuple(map(identity, value))
    if isinstance(value, set | frozenset):
        return kind, frozenset(collections.Counter(map(identity, value)).items())
    if isinstance(value, dict):
        return kind, frozenset(collections.Counter((identity(key), identity(item)) for key, item in value.items()).items())
    if isinstance(value, dt.datetime):
        return kind, value.isoformat(), value.fold, str(type(value.tzinfo))
    return kind, str(value) if isinstance(value, decimal.Decimal) else value


# Small alphabets, so that equal values and texts that look like structure come up often.
TEXTS = st.text(alphabet="1:sbilt2aé\ud800", max_size=6)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([0.0, -0.0, 1.0, float("nan"), -float("nan"), float("inf")]),
    st.floats(),
    TEXTS,
    TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.decimals(allow_nan=False),
    st.sampled_from([decimal.Decimal(text) for text in ("1", "1.0", "-0", "0", "NaN", "1E+2", "100")]),
    st.dates(),
    st.times(),
    st.datetimes(timezones=st.sampled_from([None, dt.UTC, zoneinfo.ZoneInfo("UTC")])),
    st.timedeltas(),
    st.uuids(),
    st.sampled_from([Colour.RED, Colour.BLUE, Level.LOW, Word.LOW]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.sets(SCALARS, max_size=3),
        st.frozensets(SCALARS, max_size=3),
        st.dictionaries(SCALARS, inner, max_size=3),
    ),
    max_leaves=6,
)
SMALL = st.sampled_from([0, 1, 2, 3, True, 1.0, "1", "", None, (), (1,), [1], "1:b:2", "2:b:3"])


@pytest.mark.parametrize("name", golden_values.VALUES)
def test_encoding_is_what_it_has_always_been(name: str) -> None:
    assert golden_values.computed()["encodings"][name] == GOLDEN["encodings"][name]


@pytest.mark.parametrize("name", golden_values.WHOLE_KEYS)
def test_key_is_what_it_has_always_been(name: str) -> None:
    assert golden_values.computed()["keys"][name] == GOLDEN["keys"][name]


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
        (Model(name="m"), OtherModel(name="m"), Open(name="m"), {"name": "m", "size": 1}),
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
        ({"a": 1, "b": [2]}, {"b": [2], "a": 1}),
        ({1: "x", "1": "y", None: "z"}, {None: "z", "1": "y", 1: "x"}),
        ({"a", "b", 3}, {3, "b", "a"}),
        (float("nan"), -float("nan")),
        (Model(name="m"), Model(size=1, name="m")),
        (Tenant(7, "one"), Tenant(7, "other")),
        (Point(1), Point(1, 0.5)),
        (dt.datetime(2024, 1, 1, tzinfo=dt.UTC), dt.datetime(2024, 1, 1, tzinfo=dt.timezone(dt.timedelta(0)))),
    ],
    ids=repr,
)
def test_equal_values_share_an_encoding(first: object, second: object) -> None:
    assert encode(first) == encode(second)


def test_order_of_extra_fields_of_a_model_does_not_count() -> None:
    first, second = (Open.model_validate({"name": "m", **extra}) for extra in ({"x": 1, "y": 2}, {"y": 2, "x": 1}))
    assert first == second
    assert encode(first) == encode(second)


def test_decimal_context_of_the_caller_does_not_count() -> None:
    with decimal.localcontext() as context:
        context.capitals = 0
        encoded = encode(decimal.Decimal("1E+5"))
    assert encoded == encode(decimal.Decimal("1E+5"))


def test_aware_datetime_of_a_model_is_the_same_as_one_of_the_standard_library() -> None:
    parsed = pydantic.TypeAdapter(dt.datetime).validate_json('"2024-01-01T00:00:00+01:00"')
    assert encode(parsed) == encode(dt.datetime(2024, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1))))


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
        range(3),
        memoryview(b"x"),
        ...,
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


CALLS: list[tuple[Function, list[tuple[tuple[object, ...], dict[str, object]]]]] = [
    (plain, [((1,), {}), ((), {"a": 1}), ((1, 2), {}), ((1,), {"b": 2}), ((), {"b": 2, "a": 1})]),
    (positional_only, [((1,), {}), ((1, 2), {})]),
    (keyword_only, [((), {"a": 1}), ((), {"a": 1, "b": 2}), ((), {"b": 2, "a": 1})]),
    (stars, [((1,), {"x": 1, "y": 2}), ((1,), {"y": 2, "x": 1})]),
    (star_then_keyword, [((1,), {}), ((1,), {"b": 2}), ((), {"a": 1})]),
    (every_kind, [((1,), {}), ((1, 2), {"c": 3}), ((1, 2, 3), {"d": 4}), ((1,), {"d": 4, "c": 3})]),
    (positional_and_keyword_only, [((1,), {}), ((1,), {"b": 2})]),
    (object_defaults, [((), {}), ((Point(1),), {}), ((), {"c": Colour.RED, "b": (1, (2,))})]),
    (named_like_internals, [((1,), {}), ((1, 5, 6, 7), {}), ((), {"_default_1": 1, "_default_0": 6, "values": 5})]),
    (named_like_builtins, [((1,), {}), ((1, 1), {"signature": 2}), ((), {"encode": 1, "tuple": 1})]),
    (named_like_types, [((1,), {}), ((1, 1), {"map": 2}), ((), {"map": 2, "type": 1, "types": 1})]),
    (beyond_ascii, [((1,), {}), ((), {"ñ": 1}), ((1,), {"naïve": 1})]),
    (Service.method, [((None, 1), {}), ((None,), {"a": 1}), ((), {"self": None, "a": 1, "b": 2})]),
    (Service.mangled, [((None, 1), {}), ((None,), {"_Service__a": 1}), ((None, 1), {"_Service__b": 2})]),
    (Service.itself, [((None,), {}), ((), {"self": None}), ((None,), {"values": 1})]),
    (nothing, [((), {})]),
]


@pytest.mark.parametrize(("function", "calls"), CALLS, ids=[function.__qualname__ for function, _ in CALLS])
def test_equal_calls_give_one_key(function: Function, calls: list[tuple[tuple[object, ...], dict[str, object]]]) -> None:
    maker = KeyMaker(function)
    assert len({maker(args, kwargs) for args, kwargs in calls}) == 1
    assert len({KeyMaker(function)(args, kwargs) for args, kwargs in calls}) == 1


@given(
    function=st.sampled_from([function for function, _ in CALLS]),
    calls=st.lists(
        st.tuples(
            st.lists(SMALL, max_size=4),
            st.dictionaries(st.sampled_from(["a", "b", "c", "d", "x", "y", "self", "values", "_default_0", "encode"]), SMALL),
        ),
        min_size=2,
        max_size=6,
    ),
)
@settings(max_examples=200)
@example(function=stars, calls=[(["1:b:2", 3], {}), ([1, "2:b:3"], {})])
@example(function=plain, calls=[([None], {"b": ""}), ([""], {"b": None})])
@example(function=stars, calls=[([1, ()], {}), ([1], {}), ([(1,)], {})])
@example(function=stars, calls=[([("x", 1)], {}), ([], {"x": 1})])
def test_calls_share_a_key_exactly_where_python_binds_the_same(
    function: Function, calls: list[tuple[list[object], dict[str, object]]]
) -> None:
    maker = KeyMaker(function)
    key_by_call: dict[object, str] = {}
    for args, kwargs in calls:
        try:
            arguments = bound(function, tuple(args), kwargs)
        except TypeError:
            with pytest.raises(TypeError, match=function.__name__):
                maker(tuple(args), kwargs)
            continue
        key = maker(tuple(args), kwargs)
        assert key_by_call.setdefault(identity(arguments), key) == key
    assert len(set(key_by_call.values())) == len(key_by_call)


def test_key_is_prefix_version_and_digest_of_128_bits() -> None:
    prefix, version, digest = key_of(plain, 1).rsplit(":", 2)
    assert prefix == f"{__name__}.plain" == KeyMaker(plain).prefix
    assert version == "0"
    assert len(bytes.fromhex(digest)) == 16


def test_prefix_of_a_method_names_its_class() -> None:
    assert KeyMaker(Service.method).prefix == f"{__name__}.Service.method"


def test_functions_of_one_signature_have_keys_of_their_own() -> None:
    digests = [key_of(function, 1).rpartition(":")[2] for function in (plain, positional_only)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (plain, (), {}),
        (plain, (1, 2, 3), {}),
        (plain, (1,), {"a": 1}),
        (plain, (1,), {"c": 1}),
        (nothing, (1,), {}),
        (positional_only, (), {"a": 1}),
        (keyword_only, (1,), {}),
        (Service.method, (), {}),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_call_that_does_not_fit_is_a_type_error_that_names_the_function(
    function: Function, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    with pytest.raises(TypeError, match=function.__qualname__) as caught:
        KeyMaker(function)(args, kwargs)
    assert "_default" not in str(caught.value)
    with pytest.raises(TypeError):
        # Whatever is asked of the key beside it.
        KeyMaker(function, key=lambda *_args, **_kwargs: 1)(args, kwargs)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "place"),
    [
        (plain, (1, object()), {}, "b"),
        (plain, ([1, {SECRET: object()}],), {}, "a"),
        (plain, ({object(): SECRET},), {}, "a"),
        (stars, (SECRET, object()), {}, "args"),
        (stars, (), {SECRET: object()}, "kwargs"),
        (plain, (Model.model_construct(name=object()),), {}, "a"),
        (plain, (Tenant(object()),), {}, "a"),  # type: ignore[arg-type]
        (plain, (OwnStr(SECRET),), {}, "a"),
    ],
    ids=["itself", "in a list", "a dictionary's key", "of many", "of many by name", "field", "own key", "text"],
)
def test_unencodable_argument_is_named_with_ways_out_and_never_shown(
    function: Function, args: tuple[object, ...], kwargs: dict[str, object], place: str
) -> None:
    with pytest.raises(TypeError) as caught:
        KeyMaker(function)(args, kwargs)
    message = str(caught.value)
    assert f"{function.__qualname__}: the argument {place}" in message
    assert f"ignore=({place!r},)" in message
    assert "key=" in message
    assert "__cache_key__" in message
    assert SECRET not in message
    assert "object at 0x" not in message


@pytest.mark.parametrize("option", ["key", "vary"])
def test_unencodable_key_or_vary_is_named_without_advice_to_ignore_it(option: str) -> None:
    options: dict[str, Any] = {option: lambda *_args, **_kwargs: object()}
    with pytest.raises(TypeError, match=rf"plain.*{option}=") as caught:
        KeyMaker(plain, **options)((1,), {})
    assert "ignore=" not in str(caught.value)


def test_surrogate_in_a_path_is_no_error_of_another_kind() -> None:
    assert key_of(plain, pathlib.PurePosixPath("a\ud800"))


@dataclasses.dataclass
class Unset:
    a: int
    b: int = dataclasses.field(init=False)


def test_dataclass_with_an_unset_field_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="plain: the argument a"):
        key_of(plain, Unset(1))


def self_containing_list() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


def self_containing_dict() -> dict[str, object]:
    value: dict[str, object] = {}
    value["x"] = (value,)
    return value


class SelfKeyed:
    def __cache_key__(self) -> object:
        return self


@pytest.mark.parametrize("make", [self_containing_list, self_containing_dict, SelfKeyed], ids=lambda make: make.__name__)
def test_value_that_holds_itself_is_a_type_error_that_names_the_parameter(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="plain: the argument b") as caught:
        key_of(plain, 1, make())
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("ignore", ["b", ("b",), ["b"], {"b"}], ids=repr)
def test_ignored_parameter_does_not_count_and_need_not_be_encodable(ignore: Any) -> None:
    maker = KeyMaker(plain, ignore=ignore)
    assert maker((1,), {}) == maker((1, object()), {}) == maker((1,), {"b": self_containing_list()})
    assert maker((1,), {}) != maker((2,), {})


def test_every_star_can_be_ignored() -> None:
    maker = KeyMaker(every_kind, ignore=("args", "kwargs"))
    assert maker((1,), {}) == maker((1, 2, 3, object()), {"x": object()})
    assert maker((1,), {}) != maker((1,), {"d": 5})


@pytest.mark.parametrize("ignore", ["c", ("a", "c"), ["kwargs"]], ids=repr)
def test_ignoring_an_unknown_parameter_is_a_type_error_that_names_it_and_the_known_ones(ignore: Any) -> None:
    with pytest.raises(TypeError, match=r"(?s)c|kwargs") as caught:
        KeyMaker(plain, ignore=ignore)
    assert "plain" in str(caught.value)
    assert "['a', 'b']" in str(caught.value)


def test_local_function_is_refused_without_a_key() -> None:
    async def local(a: int) -> object:
        return a

    with pytest.raises(ValueError, match=r"local.*key="):
        KeyMaker(local)
    assert KeyMaker(local, key=lambda a: a)((1,), {}) != KeyMaker(local, key=lambda a: a)((2,), {})


def test_key_takes_the_place_of_the_arguments() -> None:
    maker = KeyMaker(plain, key=lambda a, b=2: a.number)  # noqa: ARG005 (takes what the function takes)
    assert maker((Tenant(7),), {}) == maker((Tenant(7, "other"), object()), {})
    assert maker((Tenant(7),), {}) != maker((Tenant(8),), {})


def test_vary_comes_on_top_of_the_arguments() -> None:
    tenants = iter(["x", "x", "y", "x"])
    maker = KeyMaker(plain, vary=lambda *_args, **_kwargs: next(tenants))
    first, again, other_tenant, other_argument = maker((1,), {}), maker((1,), {}), maker((1,), {}), maker((2,), {})
    assert first == again
    assert len({first, other_tenant, other_argument}) == 3


def test_vary_comes_on_top_of_a_key() -> None:
    keys = {KeyMaker(plain, key=lambda _: "k", vary=lambda _, v=vary: v)((1,), {}) for vary in ("x", "y", None)}
    assert len(keys) == 3


@pytest.mark.parametrize("versions", [(0, 1), (1, "1"), ("1", "2"), (0, "0")], ids=repr)
def test_versions_are_told_apart(versions: tuple[int | str, int | str]) -> None:
    assert KeyMaker(plain, version=versions[0])((1,), {}) != KeyMaker(plain, version=versions[1])((1,), {})


def test_version_of_another_type_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match="version"):
        KeyMaker(plain, version=object())  # type: ignore[arg-type]


def test_prefix_that_looks_like_a_version_meets_nothing() -> None:
    first, second = KeyMaker(plain, prefix="a:1", version=0), KeyMaker(plain, prefix="a", version="1:0")
    assert first.prefix == "a:1"
    keys = first((1,), {}), second((1,), {})
    assert all(key.startswith("a:1:0:") for key in keys)
    assert keys[0] != keys[1]


def test_prefix_lets_two_functions_share() -> None:
    assert KeyMaker(plain, prefix="p")((1,), {}) == KeyMaker(positional_only, prefix="p")((1,), {})


@pytest.mark.parametrize("prefix", ["", "x" * (MAX_PREFIX_CHARS + 1)], ids=len)
def test_prefix_of_unusable_length_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        KeyMaker(plain, prefix=prefix)


SCRIPT = """
from aiokv.caching.keys import KeyMaker

async def work(a: int) -> None: ...

print(KeyMaker(work)((1,), {}))
"""


def output_of(folder: pathlib.Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    answer = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


def test_script_is_named_by_its_file_however_it_is_run(tmp_path: pathlib.Path) -> None:
    for name in ("first.py", "second.py", "package/__main__.py", "package/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if name.endswith("__init__.py") else SCRIPT)
    first, second = output_of(tmp_path, "first.py"), output_of(tmp_path, str(tmp_path / "second.py"))
    assert first.startswith("first.work:0:")
    assert second.startswith("second.work:0:")
    assert first.rpartition(":")[2] != second.rpartition(":")[2]
    assert output_of(tmp_path, "-c", "import first") == first
    assert output_of(tmp_path, "-m", "first") == first
    assert output_of(tmp_path, "-m", "package").startswith("package.work:0:")


def test_remembered_calls_are_never_mixed() -> None:
    calls: list[tuple[object, ...]] = [
        (1,), (True,), (1.0,), ("1",), (b"1",), (1, True), (True, 1), (0,), (False,), (0.0,), (-0.0,), ("",), (None,)
    ]  # fmt: skip
    maker = KeyMaker(plain)
    alone = [KeyMaker(plain)(args, {}) for args in calls]
    assert len(set(alone)) == len(calls)
    for _ in range(3):
        assert [maker(args, {}) for args in calls] == alone
        assert [maker(args, {}) for args in reversed(calls)] == alone[::-1]


@given(
    function=st.sampled_from([plain, keyword_only, stars, named_like_types, nothing]),
    calls=st.lists(
        st.tuples(st.lists(SMALL, max_size=3), st.dictionaries(st.sampled_from(["a", "b", "type"]), SMALL)), max_size=6
    ),
)
@settings(max_examples=200)
@example(function=plain, calls=[([1], {}), ([True], {}), ([1.0], {}), ([0.0], {}), ([-0.0], {})])
def test_calls_that_are_looked_up_without_a_key_are_told_apart_as_keys_are(
    function: Function, calls: list[tuple[list[object], dict[str, object]]]
) -> None:
    maker = KeyMaker(function)
    key_by_call: dict[object, str] = {}
    for args, kwargs in calls:
        try:
            key = maker(tuple(args), kwargs)
        except TypeError:
            with pytest.raises(TypeError, match=function.__name__):
                maker.plain_call(tuple(args), kwargs)
            continue
        call = maker.plain_call(tuple(args), kwargs)
        if call is not None:
            assert key_by_call.setdefault(call, key) == key
    assert len(set(key_by_call.values())) == len(key_by_call)


def test_call_that_depends_on_more_than_its_arguments_is_never_looked_up_without_a_key() -> None:
    assert KeyMaker(plain, vary=lambda *_args: 1).plain_call((1,), {}) is None
    assert KeyMaker(plain, key=lambda *_args: 1).plain_call((1,), {}) is None


def test_keys_stay_the_same_after_many_calls() -> None:
    maker = KeyMaker(plain)
    first = [maker((number,), {}) for number in range(100)]
    for number in range(10_000):
        maker((number,), {"b": str(number)})
    assert [maker((number,), {}) for number in range(100)] == first
    assert len(set(first)) == 100


def test_memory_of_remembered_calls_is_bounded() -> None:
    maker = KeyMaker(plain)
    for number in range(10_000):
        maker((number,), {})
    maker(("x" * 100_000,), {})
    assert len(maker._remembered) <= 2_048
    assert not any("x" * 1_000 in str(values) for values in maker._remembered)


def test_remembered_call_still_asks_key_and_vary() -> None:
    tenants = iter("xyx")
    maker = KeyMaker(plain, vary=lambda _: next(tenants))
    first, second, third = maker((1,), {}), maker((1,), {}), maker((1,), {})
    assert first == third != second


def test_default_that_is_changed_in_place_counts_as_it_is() -> None:
    before = key_of(changing_default)
    CHANGING.append(1)
    try:
        assert key_of(changing_default) == key_of(changing_default, [1]) != before
    finally:
        CHANGING.clear()


CHANGING: list[int] = []


async def changing_default(a: object = CHANGING) -> object:
    return a
