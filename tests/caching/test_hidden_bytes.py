"""Bytes that nobody sees in an array or a table: none is stored, none comes from a hit."""

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aiokv.caching.packing import unpack_content
from aiokv.caching.results import NotStorable, ResultCodec

pd = pytest.importorskip("pandas", reason="pip install 'aiokv[pandas]'")
pa = pytest.importorskip("pyarrow", reason="pip install 'aiokv[pandas]'")

SECRET = b"SECRET!!"
PADDED = np.dtype([("flag", "u1"), ("x", "f8")], align=True)
SPACED = np.dtype({"names": ["x"], "formats": ["u1"], "offsets": [0], "itemsize": 800})


def codec_of(returns: Any) -> ResultCodec:
    async def function() -> None: ...

    function.__annotations__ = {"return": returns}
    return ResultCodec(function)


def stored_bytes(returns: Any, value: object) -> bytes:
    return bytes(unpack_content(codec_of(returns).dump(value))[1])


def dirty(dtype: Any, count: int) -> np.ndarray:
    """Return zeros of a dtype with the secret in all padding."""
    raw = np.frombuffer((SECRET * (count * dtype.itemsize))[: count * dtype.itemsize], np.uint8).copy()
    array: np.ndarray = raw.view(dtype)
    for name in dtype.names or ():
        array[name] = 0
    return array


def with_dirty_padding(numbers: np.ndarray) -> np.ndarray:
    """Return long doubles with the secret where the machine has padding."""
    size = np.dtype(np.longdouble).itemsize
    parts = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, size)
    if np.finfo(np.longdouble).nmant == 63:
        parts[:, 10:] = np.frombuffer(SECRET, np.uint8)[: size - 10]
    return numbers


@pytest.mark.parametrize("dtype", [PADDED, SPACED], ids=["aligned", "spaced"])
@pytest.mark.parametrize("is_one", [False, True], ids=["many", "one"])
def test_padding_of_records_is_zero_at_each_hit(dtype: Any, is_one: bool) -> None:  # noqa: FBT001 (a parameter)
    array = dirty(dtype, 25)
    array = array[0:1].reshape(()) if is_one else array
    codec = codec_of(np.ndarray)
    text = codec.dump(array)
    assert SECRET[1:4] not in bytes(unpack_content(text)[1])
    for _ in range(5):
        # numpy takes memory of this size again.
        junk = [np.frombuffer(SECRET * (array.nbytes // 8), np.uint8).copy() for _ in range(50)]
        del junk
        assert codec.load(text).tobytes() == bytes(array.nbytes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_dirty_padding(np.arange(1, 9, dtype=np.longdouble) / 3),
        lambda: with_dirty_padding(np.arange(1, 9, dtype=np.clongdouble) / 3),
        lambda: with_dirty_padding(np.ones(1, np.longdouble))[0],
        lambda: with_dirty_padding(np.ones(3, np.longdouble)).view([("a", np.longdouble)]),
        lambda: with_dirty_padding(np.ones(4, np.longdouble)).view([("a", np.longdouble, (2,))]),
        lambda: with_dirty_padding(np.ones(4, np.longdouble)).byteswap().view(np.dtype(np.longdouble).newbyteorder()),
    ],
    ids=["real", "complex", "scalar", "record", "repeated", "other byte order"],
)
def test_padding_of_long_doubles_is_not_stored(make: Callable[[], Any]) -> None:
    value = make()
    returns = np.ndarray if isinstance(value, np.ndarray) else np.longdouble
    codec = codec_of(returns)
    text = codec.dump(value)
    content = bytes(unpack_content(text)[1])
    assert SECRET[:2] not in content
    assert SECRET[1::-1] not in content
    assert np.array_equal(codec.load(text), value)


def test_padding_of_long_doubles_in_a_frame_is_not_stored() -> None:
    frame = pd.DataFrame({"a": with_dirty_padding(np.arange(1, 5, dtype=np.longdouble) / 3), "b": ["x"] * 4})
    assert SECRET[:4] not in stored_bytes(pd.DataFrame, frame)
    back = codec_of(pd.DataFrame).load(codec_of(pd.DataFrame).dump(frame))
    assert list(back["a"]) == list(frame["a"])


def nulls_over(kind: Any, count: int, *buffers: Any, children: Any = None) -> Any:
    """Return an array of nulls alone, over bytes that say something else."""
    return pa.Array.from_buffers(kind, count, [pa.py_buffer(b"\0"), *buffers], children=children)


def hidden_arrays() -> dict[str, Any]:
    content = pa.py_buffer(SECRET * 4)
    known = pa.Array.from_buffers(pa.int64(), 4, [None, content])
    offsets = pa.py_buffer(np.array([0, 3], "i4").tobytes())
    views = pa.array(["SECRET!!SECRET!!SECRET", "x"], pa.string_view())
    numbers = pa.array([1, int.from_bytes(SECRET, "little")])
    words = pa.DictionaryArray.from_arrays(
        pa.array([0, 1]),
        pa.Array.from_buffers(
            pa.string(),
            2,
            [pa.py_buffer(b"\1"), pa.py_buffer(np.array([0, 1, 9], "i4").tobytes()), pa.py_buffer(b"x" + SECRET)],
        ),
    )
    named_view = pa.StructArray.from_arrays([pa.array(["x", "SECRET!!"])], ["view"])
    return {
        "int": nulls_over(pa.int64(), 4, content),
        "timestamp": nulls_over(pa.timestamp("us"), 4, content),
        "decimal": nulls_over(pa.decimal128(10, 2), 2, content),
        "fixed bytes": nulls_over(pa.binary(8), 4, content),
        "text": nulls_over(pa.string(), 1, pa.py_buffer(np.array([0, 16], "i4").tobytes()), content),
        "list": nulls_over(pa.list_(pa.int64()), 1, offsets, children=[known]),
        "fixed list": nulls_over(pa.list_(pa.int64(), 2), 2, children=[known]),
        "struct": nulls_over(pa.struct([("a", pa.int64())]), 4, children=[known]),
        "list of structs": pa.ListArray.from_arrays([0, 4], nulls_over(pa.struct([("a", pa.int64())]), 4, children=[known])),
        "dictionary": pa.DictionaryArray.from_arrays(
            pa.Array.from_buffers(pa.int64(), 4, [pa.py_buffer(b"\0"), content]), pa.array(["x"]), safe=False
        ),
        "slice of texts": pa.array(["SECRET!!", "x"]).slice(1),
        "slice of views": views.slice(1),
        "slice of lists of views": pa.ListArray.from_arrays([0, 1, 2], views).slice(1),
        "first of texts": pa.array(["x", "SECRET!!"]).slice(0, 1),
        "first of large texts": pa.array(["x", "SECRET!!"], pa.large_string()).slice(0, 1),
        "first of numbers": numbers.slice(0, 1),
        "first of fixed bytes": pa.array([b"12345678", SECRET], pa.binary(8)).slice(0, 1),
        "first of moments": numbers.cast(pa.timestamp("us")).slice(0, 1),
        "first of lists": pa.ListArray.from_arrays([0, 1, 2], numbers).slice(0, 1),
        "first of structs": pa.StructArray.from_arrays([numbers], ["a"]).slice(0, 1),
        "values of a dictionary": words,
        "values of dictionaries in fixed lists": pa.FixedSizeListArray.from_arrays(words, 2),
        "values of dictionaries in maps": pa.MapArray.from_arrays([0, 2], pa.array(["a", "b"]), words),
        "first of fixed lists with a field that is called view": pa.FixedSizeListArray.from_arrays(named_view, 1).slice(0, 1),
        "first of maps with a field that is called view": pa.MapArray.from_arrays(
            [0, 1, 2], pa.array(["a", "b"]), named_view
        ).slice(0, 1),
        "slice of fixed lists of views": pa.FixedSizeListArray.from_arrays(views, 1).slice(1),
        "slice of a dense union": pa.UnionArray.from_dense(
            pa.array([0, 1], pa.int8()), pa.array([0, 0], pa.int32()), [pa.array(["SECRET!!"]), pa.array(["x"])]
        ).slice(1),
    }


HIDDEN = list(hidden_arrays())


@pytest.mark.parametrize("name", HIDDEN)
def test_bytes_under_nulls_and_outside_of_slices_are_not_stored(name: str) -> None:
    array = hidden_arrays()[name]
    for returns, table in ((pa.Table, pa.table({"a": array})), (pa.RecordBatch, pa.record_batch({"a": array}))):
        codec = codec_of(returns)
        text = codec.dump(table)
        assert SECRET not in bytes(unpack_content(text)[1])
        back = codec.load(text)
        back.validate(full=True)
        assert back.equals(table)
        assert back.schema.equals(table.schema)


@pytest.mark.parametrize("array", [pa.array([True] * 7), pa.array([None, True, True, None, None, True])], ids=["bool", "null"])
def test_bits_of_other_rows_are_not_stored(array: Any) -> None:
    for column in (array, pa.ListArray.from_arrays([0, 6], array), pa.FixedSizeListArray.from_arrays(array[:6], 6)):
        alone = pa.record_batch({"a": pa.array(column[:1].to_pylist(), column.type)})
        assert codec_of(pa.RecordBatch).dump(pa.record_batch({"a": column[:1]})) == codec_of(pa.RecordBatch).dump(alone)


def test_views_that_arrow_cannot_copy_are_not_stored() -> None:
    views = pa.array(["SECRET!!SECRET!!SECRET", "x"], pa.string_view())
    maps = pa.MapArray.from_arrays([0, 1, 2], pa.array(["a", "b"]), views).slice(1)
    with pytest.raises(NotStorable, match="ArrowNotImplementedError"):
        codec_of(pa.Table).dump(pa.table({"a": maps}))


@pytest.mark.parametrize(
    "name", ["int", "text", "list", "struct", "slice of texts", "first of texts", "values of a dictionary"]
)
def test_bytes_under_nulls_of_a_series_of_arrow_are_not_stored(name: str) -> None:
    series = pd.Series(pd.arrays.ArrowExtensionArray(pa.chunked_array([hidden_arrays()[name]])))
    assert SECRET not in stored_bytes(pd.Series, series)


@pytest.mark.parametrize(
    "array",
    [
        pa.array([None, [1, None], [], [2]], pa.list_(pa.int64())),
        pa.array([[{"a": 1.5, "b": None}], None, []], pa.large_list(pa.struct([("a", pa.float64()), ("b", pa.string())]))),
        pa.array([{"a": float("nan"), "b": [None]}, None, {"a": None, "b": None}]),
        pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        pa.array(["a", None, "b"]).dictionary_encode(),
        pa.array([[1, 2], None], pa.list_(pa.int64(), 2)),
        pa.array(["a", None, "b" * 40], pa.string_view()),
        pa.array([{}, None], pa.struct([])),
        pa.array([None, True]),
        pa.RunEndEncodedArray.from_arrays([2, 4], [1, None]),
        pa.array([["a"], None], pa.list_view(pa.string())),
        pa.array([[["a"]], None], pa.list_(pa.list_view(pa.string()), 1)),
        pa.array([[("k", ["a"])], None], pa.map_(pa.string(), pa.list_view(pa.string()))),
        pa.array([[["a"], None], None], pa.list_(pa.list_(pa.string(), 1), 2)),
        pa.array([[], None], pa.list_(pa.string(), 0)),
        pa.array([], pa.list_(pa.string())),
    ],
    ids=lambda array: str(array.type),
)
@pytest.mark.parametrize("start", [0, 1])
def test_what_is_seen_comes_back(array: Any, start: int) -> None:
    table = pa.table({"a": array, "n": pa.array(range(len(array)), pa.int8())}).slice(start)
    codec = codec_of(pa.Table)
    back = codec.load(codec.dump(table))
    back.validate(full=True)
    assert back.schema.equals(table.schema, check_metadata=True)
    assert repr(back.to_pylist()) == repr(table.to_pylist())


def test_rows_come_back_whatever_their_chunks() -> None:
    table = pa.table(
        {"a": pa.chunked_array([[1], [2, 3], []], pa.int64()), "b": pa.chunked_array([[1.0, float("nan")], [3.0]])}
    )
    codec = codec_of(pa.Table)
    assert repr(codec.load(codec.dump(table)).to_pylist()) == repr(table.to_pylist())


def test_stored_column_name_that_is_no_text_is_a_value_error() -> None:
    for table in (pa.table({"naem": [1]}), pa.table({"a": pa.array([{"naem": 1}])})):
        codec = codec_of(pa.Table)
        content = base64.b64decode(codec.dump(table)[2:-1])
        assert content.count(b"naem") == 1
        text = b'"u' + base64.b64encode(content.replace(b"naem", b"na\xe9m")) + b'"'
        with pytest.raises(ValueError, match="utf-8"):
            codec.load(text)
