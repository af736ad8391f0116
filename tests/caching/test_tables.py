"""Tables of pandas and Arrow as results: exact, or not stored; stored text cannot harm."""

import base64
import datetime as dt
import decimal
import importlib
import logging
import re
import struct
import subprocess
import sys
import zoneinfo
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caching_under_test import Events
from helpers import REPOSITORY, clean_environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiokv import MAX_VALUE_BYTES, AsyncKVStore, NearCache, kv_cached
from aiokv.caching.packing import MAX_CONTENT_BYTES, pack_content, unpack_content
from aiokv.caching.results import NotStorable, ResultCodec

pd = pytest.importorskip("pandas", reason="pip install 'aiokv[pandas]'")
pa = pytest.importorskip("pyarrow", reason="pip install 'aiokv[pandas]'")
hpd = importlib.import_module("hypothesis.extra.pandas")

Frame = pd.DataFrame


def codec_of(returns: Any) -> ResultCodec:
    async def function() -> None: ...

    function.__annotations__ = {"return": returns}
    function.__qualname__ = "fetch"
    return ResultCodec(function)


def round_trip(returns: Any, value: object) -> Any:
    codec = codec_of(returns)
    return codec.load(codec.dump(value).decode())


def with_attrs(frame: Any, attrs: dict[str, Any]) -> Any:
    frame.attrs = attrs
    return frame


def moments(zone: Any) -> Any:
    return pd.date_range("2020-10-25", periods=30, freq="h", tz=zone)


OBJECTS = ["a", None, float("nan"), pd.NA, pd.NaT, 1, -(10**30), 2.5, True, b"x", dt.date(2020, 1, 1), decimal.Decimal("1.10")]
LISTS = pd.ArrowDtype(pa.list_(pa.int64()))
FRAMES: dict[str, Any] = {
    "floats": Frame(np.arange(12.0).reshape(3, 4)),
    "kinds": Frame({"a": [1, 2], "b": ["x", "y"], "c": [1.5, None], "d": [True, False]}),
    "objects": Frame({"o": pd.Series(OBJECTS, dtype=object)}),
    "objects that are texts": Frame({"o": pd.Series(["a", "b"], dtype=object)}),
    "names that occur twice": Frame([[1, "a"], [2, "b"]], columns=["x", "x"]),
    "names of several types": Frame([[1, "a", 2]], columns=pd.Index([0, "x", None], dtype=object)),
    "empty": Frame(),
    "no columns": Frame(index=pd.RangeIndex(3)),
    "no rows": Frame({"a": pd.Series([], dtype="i8"), "b": pd.Series([], dtype=object)}),
    "levels": Frame({"v": [1, 2]}, index=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["k", None])),
    "levels without use": Frame({"v": [1, 2]}, index=pd.MultiIndex.from_product([["a", "b"], [1]])).iloc[:1],
    "levels of columns": Frame([[1, "x"]], columns=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)])),
    "zones": Frame({"a": moments("UTC"), "b": moments(dt.timezone(dt.timedelta(hours=2))), "c": moments("Europe/Oslo")}),
    "zoneinfo": Frame({"a": moments(zoneinfo.ZoneInfo("Europe/Oslo"))}),
    "named offset": Frame({"a": moments(dt.timezone(dt.timedelta(hours=2), "here"))}),
    "frequency": Frame({"x": 1.0}, index=pd.date_range("2020", periods=3, freq="MS", name="when")),
    "differences": Frame({"x": 1}, index=pd.timedelta_range("1h", periods=3, freq="h")),
    "categories": Frame({"c": pd.Categorical(["a", "b", None], ["b", "a", "z"], ordered=True), "d": pd.Categorical([1, 2, 1])}),
    "masked": Frame(
        {
            "i": pd.array([1, None, 3], dtype="Int64"),
            "f": pd.arrays.FloatingArray(np.array([np.nan, 1.0, 2]), np.array([False, True, False])),
            "b": pd.array([True, None, False], dtype="boolean"),
        }
    ),
    "texts": Frame({"p": pd.array(["a", None], dtype="string[python]"), "q": pd.array(["", None], dtype="string[pyarrow]")}),
    "types of Arrow": Frame(
        {"l": pd.array([[1], None], dtype=LISTS), "s": pd.array(["a", None], dtype=pd.ArrowDtype(pa.string()))}
    ),
    "periods": Frame({"p": pd.period_range("2020", periods=3, freq="M")}),
    "intervals": Frame({"i": pd.interval_range(0, 3)}, index=pd.interval_range(0, 3, closed="left")),
    "units": Frame({"a": np.array(["2020", "NaT"], "M8[s]"), "b": np.array([1, 2], "m8[ms]")}),
    "rare numbers": Frame({"c": [1j, 2], "h": np.array([1, 2], "f2"), "b": np.array([1, 2], ">i4")}),
    "no duplicates": Frame({"a": [1]}).set_flags(allows_duplicate_labels=False),
    "slice": Frame(np.arange(20).reshape(4, 5))[::2],
    "attributes": with_attrs(Frame({"a": [1]}), {"unit": ["m", {"scale": 2.5}]}),
}


def assert_same(back: Any, frame: Any) -> None:
    """Compare by what pandas itself shows."""
    pd.testing.assert_frame_equal(
        back, frame, check_exact=True, check_freq=True, check_flags=True, check_column_type=True, check_index_type=True
    )
    assert back.attrs == frame.attrs
    assert list(map(repr, back.dtypes)) == list(map(repr, frame.dtypes))
    assert back.to_csv() == frame.to_csv()
    for one, other in ((back.index, frame.index), (back.columns, frame.columns)):
        assert type(one) is type(other)
        assert repr(one) == repr(other)
        assert list(map(type, one)) == list(map(type, other))
    for number in range(frame.shape[1]):
        left, right = back.iloc[:, number], frame.iloc[:, number]
        assert list(map(type, left)) == list(map(type, right))
        assert list(map(repr, left)) == list(map(repr, right))


@pytest.mark.parametrize("name", FRAMES)
def test_frame_comes_back_exactly(name: str) -> None:
    assert_same(round_trip(Frame, FRAMES[name]), FRAMES[name])


COLUMN_TYPES = st.sampled_from(
    ["i1", "i8", "u2", "f4", "f8", "bool", "M8[ns]", "m8[ns]", "M8[s]", "complex128", object, "Int16", "Float64", "boolean"]
)


@st.composite
def frames(draw: st.DrawFn) -> Any:
    rows = draw(st.integers(0, 5))
    columns = []
    cells = st.one_of(
        st.none(), st.text(st.characters(exclude_categories=["Cs"])), st.integers(), st.floats(), st.booleans(), st.just(pd.NA)
    )
    for _ in range(draw(st.integers(0, 4))):
        dtype = draw(COLUMN_TYPES)
        if dtype is object:
            columns.append(pd.Series(draw(st.lists(cells, min_size=rows, max_size=rows)), dtype=object))
        elif dtype in {"Int16", "Float64", "boolean"}:
            number: Any = {"Int16": st.integers(-9, 9), "Float64": st.floats(width=32), "boolean": st.booleans()}[dtype]
            some = draw(st.lists(st.none() | number, min_size=rows, max_size=rows))
            columns.append(pd.Series(pd.array(some, dtype=dtype)))
        else:
            columns.append(draw(hpd.series(dtype=dtype, index=hpd.range_indexes(rows, rows))))
    made = Frame(dict(enumerate(columns)), index=pd.RangeIndex(rows))
    labels = st.text(st.characters(exclude_categories=["Cs"]), max_size=3) | st.integers(-9, 9)
    made.columns = pd.Index(draw(st.lists(labels, min_size=len(columns), max_size=len(columns))), dtype=object)
    made.index.name = draw(st.none() | labels)
    return made


@pytest.mark.slow
@given(frame=frames())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_law_any_frame_comes_back_exactly(frame: Any) -> None:
    assert_same(round_trip(Frame, frame), frame)


@pytest.mark.parametrize(
    "value",
    [
        pd.Series([1, 2], name=("a", 1)),
        pd.Series(["a"], dtype=object),
        pd.Series([pd.Timestamp("2020", tz="UTC")], name="t"),
        pd.Series([1, 2], dtype="category"),
        pd.Series([1.0], index=pd.MultiIndex.from_tuples([(1, "a")])),
        with_attrs(pd.Series([1]), {"a": 1}),
    ],
    ids=repr,
)
def test_series_comes_back_exactly(value: Any) -> None:
    back = round_trip(pd.Series, value)
    pd.testing.assert_series_equal(back, value, check_exact=True, check_flags=True, check_series_type=True)
    assert back.attrs == value.attrs
    assert repr(back.name) == repr(value.name)


@pytest.mark.parametrize(
    ("returns", "value"),
    [
        (pd.Index, pd.Index(["a"])),
        (pd.Index, pd.Index(["a", None], dtype=object, name="x")),
        (pd.Index, pd.RangeIndex(1, 7, 2, name="x")),
        (pd.RangeIndex, pd.RangeIndex(3)),
        (pd.MultiIndex, pd.MultiIndex.from_product([[1, 2], ["a"]], names=["x", "y"])),
        (pd.DatetimeIndex, pd.date_range("2020", periods=3, freq="D", tz="Asia/Tokyo")),
        (pd.CategoricalIndex, pd.CategoricalIndex(["a", "b"], ordered=True)),
        (pd.Index, pd.Index(np.array([1, 2], "f4"))),
    ],
    ids=repr,
)
def test_index_comes_back_exactly(returns: Any, value: Any) -> None:
    back = round_trip(returns, value)
    pd.testing.assert_index_equal(back, value, exact=True, check_exact=True)
    assert repr(back) == repr(value)


TABLES = {
    "columns": pa.table({"a": [1, None], "b": ["x", "y"], "c": [float("nan"), 1.0], "d": [[1], None]}),
    "slice": pa.table({"x": ["a", "bb", "ccc"], "n": [1.0, float("nan"), 2.0], "t": [True, None, False]}).slice(1),
    "chunks": pa.table({"a": pa.chunked_array([[1, 2], [3]]), "b": pa.chunked_array([[1.0], [2.0, float("nan")]])}),
    "dictionary": pa.table({"d": pa.array(["a", "b", "a"]).dictionary_encode()}),
    "empty": pa.table({}),
    "no rows": pa.table({"e": pa.array([], pa.decimal128(10, 2))}),
    "nulls": pa.table({"n": pa.nulls(5)}),
    "metadata": pa.table({"a": [1]}).replace_schema_metadata({"k": "v"}),
    "struct": pa.table({"m": pa.array([{"a": 1, "b": float("nan")}] * 3)}),
    "zone": pa.table({"t": pa.array([dt.datetime(2020, 1, 1, tzinfo=dt.UTC)], pa.timestamp("us", "Europe/Oslo"))}),
}


@pytest.mark.parametrize("name", TABLES)
def test_table_of_arrow_comes_back_exactly(name: str) -> None:
    table = TABLES[name]
    back = round_trip(pa.Table, table)
    back.validate(full=True)
    assert back.schema.equals(table.schema, check_metadata=True)
    assert repr(back.to_pylist()) == repr(table.to_pylist())


def test_record_batch_comes_back_exactly() -> None:
    batch = pa.record_batch({"a": [1, None]})
    back = round_trip(pa.RecordBatch, batch)
    assert type(back) is pa.RecordBatch
    assert back.equals(batch, check_metadata=True)


@pytest.mark.parametrize(
    ("returns", "value"),
    [
        (Frame | None, None),
        (Frame | None, Frame({"a": [1]})),
        (Frame | np.ndarray, Frame({"a": [1]})),
        (Frame | np.ndarray, np.ones(2)),
        (dict[str, Frame], {"x": Frame({"a": [1]})}),
        (tuple[Frame, pd.Series], (Frame({"a": [1]}), pd.Series([1]))),
        (list[pa.Table], [pa.table({"a": [1]})]),
    ],
    ids=repr,
)
def test_table_in_a_container_comes_back_exactly(returns: Any, value: Any) -> None:
    assert repr(round_trip(returns, value)) == repr(value)


class OwnFrame(pd.DataFrame):  # type: ignore[misc, name-defined]
    """A subclass of the program's."""


@pytest.mark.parametrize(
    ("returns", "value", "message"),
    [
        (Frame, pd.Series([1]), "Series, and DataFrame is annotated"),
        (Frame, None, "NoneType"),
        (Frame, OwnFrame({"a": [1]}), "OwnFrame.*plain DataFrame"),
        (OwnFrame, OwnFrame({"a": [1]}), "OwnFrame.*plain DataFrame"),
        (pa.Table, pa.record_batch({"a": [1]}), "RecordBatch, and Table is annotated"),
        (pd.RangeIndex, pd.Index([1, 3, 4]), "RangeIndex is annotated"),
        (dict[str, Frame], {"a": OwnFrame({"a": [1]})}, "OwnFrame"),
    ],
    ids=repr,
)
def test_value_of_another_type_is_a_type_error_that_says_what_to_do(returns: Any, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"(?s)fetch.*{message}"):
        codec_of(returns).dump(value)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (Frame({"a": [[1], [2]]}), "objects of type list.*astype"),
        (Frame({"a": pd.arrays.SparseArray([0, 1])}), "Sparse.*astype"),
        (Frame({"a": pd.Series(["\ud800"], dtype=object)}), "Arrow cannot hold"),
        (with_attrs(Frame({"a": [1]}), {"x": (1,)}), "attrs"),
        (with_attrs(Frame({"a": [1]}), {"x": 2**70}), "JSON does not hold"),
        (Frame({"a": [1]}).rename(columns={"a": frozenset("s3cret")}), "frozenset"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_frame_that_would_come_back_changed_is_not_stored_and_not_quoted(frame: Any, message: str) -> None:
    with pytest.raises(NotStorable, match=message) as caught:
        codec_of(Frame).dump(frame)
    assert "s3cret" not in str(caught.value)


async def sales(rows: int) -> Frame:  # type: ignore[valid-type]
    return Frame({"shop": ["a", "b"] * rows, "sold": np.arange(2.0 * rows)})


async def lists() -> Frame:  # type: ignore[valid-type]
    return Frame({"a": [[1]]})


@pytest.mark.parametrize("near", [None, NearCache(60)], ids=["store", "near"])
async def test_each_caller_gets_a_frame_that_it_may_change(store: AsyncKVStore, near: NearCache | None) -> None:
    cached = kv_cached(60, store=store, near=near)(sales)
    expected = await sales(5)
    for _ in range(3):
        result = await cached(5)
        assert_same(result, expected)
        result.loc[0, "sold"] = -1.0
        result["shop"] = "z"
        result.attrs["changed"] = True
    assert cached.info().computations == 1


async def test_frame_that_cannot_be_stored_is_returned_counted_and_logged_once(
    store: AsyncKVStore, caplog: pytest.LogCaptureFixture
) -> None:
    events = Events()
    cached = kv_cached(60, store=store, observer=events, prefix="lists")(lists)
    with caplog.at_level(logging.INFO, "aiokv"):
        for _ in range(2):
            assert (await cached()).loc[0, "a"] == [1]
    assert events.count("not_stored") == 2
    assert len(caplog.records) == 1


def described(text: str) -> tuple[Any, bytes]:
    head, body = unpack_content(text)
    return head, bytes(body)


def plain_frame_text() -> str:
    return codec_of(Frame).dump(Frame({"a": [1.5, 2.5], "b": ["x", "y"]})).decode()


def test_compressed_columns_inside_are_refused_before_they_take_memory() -> None:
    table = pa.table({"a": np.zeros(10_000_000, "u1")})
    for codec in ("zstd", "lz4"):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
            writer.write_table(table)
        before = pa.total_allocated_bytes()
        with pytest.raises(ValueError, match="compressed columns"):
            codec_of(pa.Table).load(pack_content(["arrow", "Table"], [memoryview(sink.getvalue())]))
        assert pa.total_allocated_bytes() <= before + 1_000_000


def test_compressed_dictionary_inside_is_refused() -> None:
    table = pa.table({"a": pa.array(["a" * 1000, "b" * 1000]).dictionary_encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    messages = list(pa.ipc.MessageReader.open_stream(sink.getvalue()))
    # Without the batch, whose columns are compressed, too.
    stream = b"".join(message.serialize().to_pybytes() for message in messages if message.type != "record batch")
    with pytest.raises(ValueError, match="compressed columns"):
        codec_of(pa.Table).load(pack_content(["arrow", "Table"], [stream]))


def test_column_that_is_named_often_is_refused() -> None:
    head, body = described(codec_of(Frame).dump(Frame({0: ["x"], 1: ["y"], 2: [1]})).decode())
    columns = head[1][1][2][1]
    columns[1] = columns[0]
    with pytest.raises(ValueError, match="used twice"):
        codec_of(Frame).load(pack_content(head, [body]))


def test_columns_that_share_their_bytes_are_refused() -> None:
    head, body = described(codec_of(Frame).dump(Frame({"a": np.arange(1000.0), "b": np.arange(1000)})).decode())
    # The end mark takes 8 bytes, the last column the 8,000 before it. Let it point to the first column instead.
    stream = bytearray(body[:-8008] + body[-8:])
    begin, length = next((at, size) for at in range(0, len(body), 8) if (size := body_size(body, at)) > 16_000)
    at = stream.index(struct.pack("<q", length))
    struct.pack_into("<q", stream, at, length - 8000)
    places = [at for at in range(0, begin, 8) if struct.unpack_from("<q", body, at + 8)[0] == 8000]
    first, second = (at for at in places if struct.unpack_from("<q", body, at)[0] % 8 == 0)
    stream[second : second + 8] = stream[first : first + 8]
    with pytest.raises(ValueError, match="share their bytes"):
        codec_of(Frame).load(pack_content(head, [stream]))


def body_size(stream: bytes, begin: int) -> int:
    """Return how many bytes lie between a place and the end mark of a stream, where its only batch may begin there."""
    size = len(stream) - 8 - begin
    return size if struct.pack("<q", size) in stream[:begin] else 0


def test_ranges_that_would_fill_the_memory_are_refused() -> None:
    head, body = described(codec_of(Frame).dump(Frame(index=pd.RangeIndex(3))).decode())
    head[1][1][0] = ["RangeIndex", 0, 10**15, 1, [6, ""]]
    with pytest.raises(ValueError, match="ranges are longer"):
        codec_of(Frame).load(pack_content(head, [body]))


def test_table_of_more_rows_than_bits_is_refused() -> None:
    table = pa.table({"n": pa.nulls(10**9)})
    with pytest.raises(NotStorable, match="read back"):
        codec_of(pa.Table).dump(table)


def test_dtype_of_objects_in_a_description_is_refused() -> None:
    head, body = described(codec_of(Frame).dump(Frame({0: [1.5], 1: [2.5]})).decode())
    head[1][1][2][1][2] = "|O"
    with pytest.raises(ValueError, match="objects"):
        codec_of(Frame).load(pack_content(head, [body]))


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_law_changed_text_is_a_frame_or_an_error(data: st.DataObject) -> None:
    content = bytearray(base64.b64decode(pack_plain(plain_frame_text())))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        back = codec_of(Frame).load('"u' + base64.b64encode(content).decode() + '"')
    except Exception:  # noqa: BLE001 (a miss)
        return
    assert type(back) is Frame


def pack_plain(text: str) -> str:
    """Return the base64 of a text's content, not compressed."""
    head, body = described(text)
    start = len(body)
    raw = pack_content(head, [body]).decode()
    assert raw.startswith('"u') or start > 0
    if raw.startswith('"z'):
        zstandard = importlib.import_module("zstandard")
        return base64.b64encode(zstandard.ZstdDecompressor().decompress(base64.b64decode(raw[2:-1]))).decode()
    return raw[2:-1]


def test_without_pyarrow_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", None)
    with pytest.raises(TypeError, match=r"fetch.*pip install 'aiokv\[pandas\]'"):
        codec_of(Frame)


PAGE = (REPOSITORY / "docs" / "numpy-and-tables.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_of_the_page_runs(tmp_path: Path, number: int) -> None:
    environment = {**clean_environment(tmp_path), "AIOKV_URL": f"sqlite:///{tmp_path}/kv.db"}
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", BLOCKS[number]]
    subprocess.run(command, check=True, env=environment)


def test_limits_of_the_page_are_those_of_the_code() -> None:
    assert f"{MAX_VALUE_BYTES:,} bytes" in PAGE
    assert f"{MAX_CONTENT_BYTES // 2**20} MiB" in PAGE


@pytest.mark.parametrize("result", [pd.DataFrame({"a": [1]}), pa.table({"a": [1]})], ids=["pandas", "arrow"])
def test_table_of_a_function_without_annotation_names_the_extra_of_tables(result: object) -> None:
    with pytest.raises(TypeError, match=r"annotate the return type \(needs 'aiokv\[pandas\]'\)"):
        codec_of(Any).dump(result)
