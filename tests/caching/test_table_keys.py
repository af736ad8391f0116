"""Arrays, tables and moments as arguments: equal state, equal key; other state, another key."""

import datetime as dt
import importlib
import importlib.resources
import zoneinfo
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aiokv import AsyncKVStore, kv_cached
from aiokv.caching.encoding import encode
from aiokv.caching.keys import KeyMaker

pd = pytest.importorskip("pandas", reason="pip install 'aiokv[pandas]'")
pa = pytest.importorskip("pyarrow", reason="pip install 'aiokv[pandas]'")

Frame = pd.DataFrame
Moment = pd.Timestamp


async def shape(table: Any) -> list[int]:
    return list(table.shape)


def key_of(value: Any) -> str:
    return KeyMaker(shape)((value,), {})


def with_attrs(frame: Any, attrs: dict[str, Any]) -> Any:
    frame.attrs = attrs
    return frame


DIFFERENT: list[Any] = [
    Frame({"a": [1, 2]}),
    Frame({"a": [1, 3]}),
    Frame({"b": [1, 2]}),
    Frame({"a": [1.0, 2.0]}),
    Frame({"a": np.array([1, 2], "i4")}),
    Frame({"a": [1, 2]}, index=[0, 2]),
    Frame({"a": [1, 2]}, index=pd.Index([0, 1])),
    Frame({"a": [1, 2]}, index=pd.RangeIndex(2, name="i")),
    Frame({"a": [1, 2], "b": [3, 4]}),
    Frame({"b": [3, 4], "a": [1, 2]}),
    Frame({"a": [1, 2]}).set_flags(allows_duplicate_labels=False),
    with_attrs(Frame({"a": [1, 2]}), {"unit": "m"}),
    with_attrs(Frame({"a": [1, 2]}), {"unit": ("m",)}),
    Frame({"a": pd.array([1, 2], dtype="Int64")}),
    Frame({"a": pd.array([1, None], dtype="Int64")}),
    Frame({"a": pd.array([0, None], dtype="Int64")}),
    Frame({"a": pd.Series(["ab", ""], dtype=object)}),
    Frame({"a": pd.Series(["a", "b"], dtype=object)}),
    Frame({"a": pd.Series(["a", None], dtype=object)}),
    Frame({"a": pd.Series(["a", float("nan")], dtype=object)}),
    Frame({"a": pd.Series(["a", -float("nan")], dtype=object)}),
    Frame({"a": pd.Series(["a", pd.NA], dtype=object)}),
    Frame({"a": pd.Series(["a", pd.NaT], dtype=object)}),
    Frame({"a": pd.Series(["a", ""], dtype=object)}),
    Frame({"a": pd.Series(["1", "a"], dtype=object)}),
    Frame({"a": pd.Series([1, "a"], dtype=object)}),
    Frame({"a": pd.Series([True, "a"], dtype=object)}),
    Frame({"a": pd.Series([1.0, "a"], dtype=object)}),
    Frame({"a": pd.array(["a", "b"], dtype="string[python]")}),
    Frame({"a": pd.Categorical(["a", "b"])}),
    Frame({"a": pd.Categorical(["a", "b"], ["b", "a"])}),
    Frame({"a": pd.Categorical(["a", "b"], ordered=True)}),
    Frame({"a": pd.date_range("2020", periods=2)}),
    Frame({"a": pd.date_range("2020", periods=2, tz="UTC")}),
    Frame({"a": pd.date_range("2020", periods=2, tz="Europe/Oslo")}),
    Frame({"a": pd.Series([1, 2], dtype=pd.ArrowDtype(pa.int64()))}),
    Frame(),
    pd.Series([1, 2]),
    pd.Series([1, 2], name="a"),
    pd.Series([1, 2], name=1),
    pd.Series([1, 2], name="1"),
    pd.Index([1, 2]),
    pd.RangeIndex(1, 3),
    pd.Index(["1", "2"]),
    Moment("2020-01-01").as_unit("ns"),
    Moment("2020-01-01").as_unit("s"),
    Moment("2020-01-01T00:00:00.000000001"),
    Moment("2020-01-01", tz="UTC").as_unit("ns"),
    Moment("2020-01-01", tz="Europe/London").as_unit("ns"),
    Moment("2020-10-25T00:30Z").tz_convert("Europe/Oslo"),
    Moment("2020-10-25T01:30Z").tz_convert("Europe/Oslo"),
    dt.datetime(2020, 1, 1),  # noqa: DTZ001 (without a zone on purpose)
    pd.Timedelta(1, "ns"),
    pd.Timedelta(2, "ns"),
    pd.Timedelta(1, "s").as_unit("s"),
    pd.Timedelta(1, "s").as_unit("ns"),
    pd.NaT,
    pd.NA,
    None,
    float("nan"),
    range(3),
    range(0, 3, 2),
    [0, 1, 2],
    pa.table({"a": [1, 2]}),
    pa.table({"a": [1, None]}),
    pa.table({"a": [None, 1]}),
    pa.table({"a": pa.array([1, 2], pa.int32())}),
    pa.table({"a": [1, 2]}).replace_schema_metadata({"k": "v"}),
    pa.table({"b": [1, 2]}),
    pa.table({"a": ["ab", ""]}),
    pa.table({"a": ["a", "b"]}),
    pa.table({"a": ["a", None]}),
    pa.table({"a": [b"a", b"b"]}),
    pa.table({"a": pa.nulls(2)}),
    pa.table({"a": [True, False]}),
    pa.table({"a": pa.array([1, 2], pa.timestamp("s"))}),
    pa.table({"a": pa.array([1, 2], pa.timestamp("s", "UTC"))}),
    pa.table({"a": pa.array([1, 2], pa.date32())}),
    pa.table({"a": [1.5, 2.5], "b": [1, 2]}),
    pa.record_batch({"a": [1, 2]}),
    np.array([1, 2]),
    np.array([1.0, 2.0]),
    np.array([[1, 2]]),
    np.int64(1),
    np.float64(1),
    1,
]


def test_values_of_different_state_have_different_keys() -> None:
    keys = list(map(key_of, DIFFERENT))
    twins = [(DIFFERENT[one], DIFFERENT[keys.index(key)]) for one, key in enumerate(keys) if keys.index(key) != one]
    assert not twins


@pytest.mark.parametrize("index", range(len(DIFFERENT)))
def test_copy_has_the_key_of_its_original(index: int) -> None:
    value = DIFFERENT[index]
    copy = getattr(value, "copy", lambda: value)
    assert encode(copy()) == encode(value)


EQUAL: list[tuple[Any, Any]] = [
    (Frame({"a": [1, 2, 3, 4]}).iloc[::2].reset_index(drop=True), Frame({"a": [1, 3]})),
    (Frame({"a": [1.0], "b": [2.0]}), Frame([[1.0, 2.0]], columns=["a", "b"])),
    (Frame({"a": [1]}).assign(b=2), Frame({"a": [1], "b": [2]})),
    (pa.table({"a": pa.chunked_array([[1], [2]])}), pa.table({"a": [1, 2]})),
    (pa.table({"a": ["x", "a", None]}).slice(1), pa.table({"a": ["a", None]})),
    (pa.table({"a": [True, False, None]}).slice(1), pa.table({"a": pa.array([False, None])})),
    (np.asfortranarray(np.ones((2, 3))), np.ones((2, 3))),
    (np.arange(10)[::2], np.array([0, 2, 4, 6, 8])),
    (np.array([1], ">i4"), np.array([1], "<i4")),
    (
        Frame({"a": pd.arrays.IntegerArray(np.array([1, 7]), np.array([False, True]))}),
        Frame({"a": pd.array([1, None], dtype="Int64")}),
    ),
]


@pytest.mark.parametrize("pair", EQUAL, ids=repr)
def test_values_of_equal_state_have_one_key_whatever_their_layout(pair: tuple[Any, Any]) -> None:
    assert key_of(pair[0]) == key_of(pair[1])


MOMENTS = st.datetimes(dt.datetime(1700, 1, 1), dt.datetime(2200, 1, 1))  # noqa: DTZ001 (naive bounds)


@st.composite
def frames(draw: st.DrawFn) -> Any:
    dtypes = draw(st.lists(st.sampled_from(["i1", "f2", "?"]), max_size=3))
    rows = draw(st.integers(0, 2))
    return Frame({number: draw(hnp.arrays(dtype, rows)) for number, dtype in enumerate(dtypes)}, index=pd.RangeIndex(rows))


@pytest.mark.slow
@given(one=frames(), other=frames())
@settings(max_examples=100, deadline=None)
def test_law_keys_are_equal_where_the_bits_are(one: Any, other: Any) -> None:
    def bits(frame: Any) -> Any:
        return repr(frame.index), [(column.dtype.str, column.to_numpy().tobytes()) for _, column in frame.items()]

    assert (key_of(one) == key_of(other)) is (bits(one) == bits(other))
    assert key_of(one) == key_of(one.copy())


@given(moment=MOMENTS, nanoseconds=st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_law_every_nanosecond_counts(moment: dt.datetime, nanoseconds: int) -> None:
    one = Moment(moment).as_unit("ns") + pd.Timedelta(nanoseconds, "ns")
    other = one + pd.Timedelta(1, "ns")
    assert key_of(one) != key_of(other)
    assert key_of(one) == key_of(Moment(one))


class OwnFrame(pd.DataFrame):  # type: ignore[misc, name-defined]
    """A subclass of the program's."""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Frame({"a": [[1]]}), "table is of type .*DataFrame, which has objects of type list"),
        (Frame({"a": pd.arrays.SparseArray([0, 1])}), "Sparse"),
        (OwnFrame({"a": [1]}), "OwnFrame"),
        (pa.table({"a": [[1]]}), r"table.columns\[0\].*type list<"),
        (pa.table({"a": pa.array(["a", None], pa.string_view())}), r"table.columns\[0\].*type string_view"),
        (pa.table({"a": pa.array(["a"]).dictionary_encode()}), r"table.columns\[0\].*type dictionary"),
        (pd.Series(pd.array(["a", None], dtype=pd.ArrowDtype(pa.binary_view()))), "type binary_view"),
        (pd.Period("2020"), "Period"),
        (pd.Categorical(["a"]), "Categorical"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_value_without_a_key_is_a_type_error_that_says_what_to_do(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"{message}.*ignore=.*key="):
        key_of(value)


def test_zone_without_a_name_is_a_type_error() -> None:
    tz = importlib.import_module("dateutil.tz").tzlocal()
    with pytest.raises(TypeError, match=r"zoneinfo"):
        key_of(Moment("2020-01-01", tz=tz))


def test_bytes_that_are_not_utf8_count_in_a_column_of_texts() -> None:
    def texts(content: bytes) -> Any:
        return pa.table({"a": pa.array([content]).view(pa.string())})

    assert key_of(texts(b"\xff")) != key_of(texts(b"\xfe"))
    assert key_of(texts(b"a")) == key_of(pa.table({"a": ["a"]}))


def test_zone_of_a_file_is_a_type_error() -> None:
    pytest.importorskip("tzdata", reason="pip install tzdata")
    path = importlib.resources.files("tzdata") / "zoneinfo" / "America" / "New_York"
    with path.open("rb") as file:
        zone = zoneinfo.ZoneInfo.from_file(file, key="Europe/Paris")
    for value in (Moment("2020-01-01", tz=zone), pd.Series([Moment("2020-01-01", tz=zone)])):
        with pytest.raises(TypeError, match="read from a file"):
            key_of(value)


def test_index_that_pandas_itself_cannot_read_is_a_type_error() -> None:
    index = pd.IntervalIndex.from_breaks(pd.RangeIndex(3))
    if pd.__version__.startswith("2."):
        pytest.skip("pandas 2 can read it: pip install 'pandas>=3'")
    with pytest.raises(TypeError, match=r"IntervalIndex, which cannot be read.*key="):
        key_of(index)


def test_zone_counts_by_its_name() -> None:
    one, other = (Moment("2020-07-01", tz=zoneinfo.ZoneInfo(name)) for name in ("Europe/Oslo", "Europe/Berlin"))
    assert key_of(one) != key_of(other)
    assert key_of(one) == key_of(Moment("2020-07-01", tz=zoneinfo.ZoneInfo.no_cache("Europe/Oslo")))


async def test_table_that_changes_while_the_function_runs_is_not_stored(store: AsyncKVStore) -> None:
    async def total(table: Any) -> int:
        result = int(table["a"].sum())
        table.loc[0, "a"] = 5
        return result

    cached = kv_cached(60, store=store, key=lambda table: table)(total)
    frame = Frame({"a": [1, 2]})
    assert await cached(frame) == 3
    assert await cached(Frame({"a": [1, 2]})) == 3
    assert cached.info().computations == 2


async def test_refresh_behind_a_caller_works_on_a_copy_of_its_table(store: AsyncKVStore) -> None:
    cached = kv_cached(60, store=store)(shape)
    for value in (Frame({"a": [1, 2], "b": ["x", None]}), np.ones((2, 2)), pa.table({"a": [1]})):
        copies = cached._cache.keys.copies((value,), {})
        assert copies is not None
        (copy,), _ = copies
        assert key_of(copy) == key_of(value)
        assert copy is not value or isinstance(value, pa.Table)
