"""Arrays and scalars of numpy as results: they come back bit for bit, or are refused; stored text cannot harm."""

import base64
import dataclasses
import logging
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NewType

import numpy as np
import numpy.typing as npt
import orjson
import pydantic
import pytest
from caching_under_test import Events
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aiokv import (
    MAX_VALUE_BYTES,
    AsyncKVStore,
    Encrypted,
    NearCache,
    Packed,
    ValueTooLargeError,
    Zstd,
    kv_cached,
    kv_cached_many,
)
from aiokv.caching import packing
from aiokv.caching.numpy_values import arrays_are_same
from aiokv.caching.packing import MAX_CONTENT_BYTES, pack_content
from aiokv.caching.results import NotStorable, ResultCodec

Named = NewType("Named", np.ndarray)
Any2D = np.ndarray[tuple[int, int], np.dtype[Any]]


@dataclasses.dataclass
class Image:
    name: str
    pixels: Annotated[npt.NDArray[np.uint8], Packed]


class Measured(pydantic.BaseModel):
    values: Annotated[np.ndarray, Packed]
    mean: Annotated[np.float32, Packed] = np.float32(0)


@dataclasses.dataclass
class Unmarked:
    pixels: np.ndarray


def codec_of(returns: Any) -> ResultCodec:
    async def function() -> None: ...

    function.__annotations__ = {"return": returns}
    function.__qualname__ = "fetch"
    return ResultCodec(function)


def round_trip(returns: Any, value: object) -> Any:
    codec = codec_of(returns)
    text = codec.dump(value)
    orjson.loads(text)
    return codec.load(text.decode())


def is_same(one: Any, other: Any) -> bool:
    """Compare by what numpy itself shows."""
    return bool(
        type(one) is type(other)
        and one.dtype == other.dtype
        and one.dtype.str == other.dtype.str
        and one.dtype.isalignedstruct == other.dtype.isalignedstruct
        and one.dtype.fields == other.dtype.fields
        and one.shape == other.shape
        and (repr(one.tolist()) == repr(other.tolist()))
    )


RECORDS = np.dtype([("a", "i1"), ("b", ">f8", (2,)), ("c", [("d", "U3"), ("e", "M8[ms]")])])
ARRAYS: dict[str, np.ndarray] = {
    "float64": np.array([[1.5, np.nan, -0.0], [np.inf, 5e-324, 1e308]]),
    "float16": np.array([1, 2], "f2"),
    "longdouble": np.array([1, 3], np.longdouble) / 7,
    "complex": np.array([1j, complex(np.nan, -0.0)]),
    "bool": np.array([True, False]),
    "big-endian": np.array([1, 2], ">i4"),
    "uint64": np.array([2**64 - 1], "u8"),
    "text": np.array(["", "a", "日本語"]),
    "bytes": np.array([b"a\0b", b"\xff"]),
    "dates": np.array(["2020-01-01", "NaT"], "M8[D]"),
    "dates of 25 seconds": np.array([1, 2]).astype("M8[25s]"),
    "generic differences": np.array([1, 2]).view("m8"),
    "nought-dimensional": np.array(5),
    "empty": np.zeros((0, 4), "i2"),
    "no bytes": np.zeros(2, np.dtype([])),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(10)[::-2],
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
    "raw": np.array([b"abc"], "V5"),
    "records": np.zeros(2, RECORDS),
    "aligned": np.ones(2, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
    "titles": np.ones(2, [(("title", "a"), "i1")]),
    "record class": np.ones(2, np.dtype((np.record, [("a", "i1"), ("b", "f8")]))),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_array_comes_back_bit_for_bit_and_can_be_written_to(name: str) -> None:
    array = ARRAYS[name]
    back = round_trip(np.ndarray, array)
    assert is_same(back, array)
    assert back.flags.writeable
    assert back.flags.owndata
    assert back.flags.f_contiguous or not array.flags.f_contiguous
    assert not np.shares_memory(back, round_trip(np.ndarray, array))


@pytest.mark.slow
@given(
    array=st.one_of(hnp.scalar_dtypes(), hnp.array_dtypes(max_size=3, allow_subarrays=True)).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
    ),
    fortran=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_law_any_array_comes_back_bit_for_bit(array: np.ndarray, fortran: bool) -> None:  # noqa: FBT001 (drawn)
    array = np.asfortranarray(array) if fortran and array.ndim else array
    back = round_trip(np.ndarray, array)
    assert back.dtype == array.dtype
    assert arrays_are_same(back, array, np)
    # What numpy prints is made without the code under test.
    assert repr(back) == repr(array)


@given(scalar=hnp.scalar_dtypes().flatmap(hnp.from_dtype))
@settings(max_examples=200, deadline=None)
def test_law_any_scalar_comes_back_as_its_own_class(scalar: Any) -> None:
    try:
        back = round_trip(np.generic, scalar)
    except NotStorable:
        # numpy cuts zeros off the end of texts.
        assert isinstance(scalar, str | bytes)
        assert scalar[-1:] in {"\0", b"\0"}
        return
    assert type(back) is type(scalar)
    assert back.dtype == scalar.dtype
    assert repr(back) == repr(scalar)


@pytest.mark.parametrize(
    ("returns", "value"),
    [
        (np.float64, np.float64(1.5)),
        (np.bool_, np.True_),
        (np.datetime64, np.datetime64("2020-01-01T00:00:00.123456789")),
        (np.int32, np.int32(-5)),
        (np.floating, np.float32("nan")),
        (np.str_, np.str_("äß")),
        (np.ndarray | None, None),
        (np.ndarray | None, np.ones(2)),
        (list[np.ndarray], [np.ones(2), np.ones(3, "i1")]),
        (tuple[np.ndarray, ...], (np.ones(2),)),
        (dict[str, npt.NDArray[np.int8]], {"a": np.ones(2, "i1")}),
        (dict[np.int64, np.float32], {np.int64(2): np.float32(0.5)}),
        (set[np.int8], {np.int8(1)}),
        (np.ndarray | np.float64, np.float64(2)),
        (np.ndarray | np.float64, np.ones(2)),
        (npt.NDArray[np.int8] | npt.NDArray[np.int16], np.ones(2, "i2")),
        (Annotated[np.ndarray, "pixels"], np.ones(2)),
        (Named, np.ones(2)),
        (Image, Image("a", np.ones((2, 2), "u1"))),
        (list[Image], [Image("a", np.ones((2, 2), "u1"))]),
        (Measured, Measured(values=np.arange(3), mean=np.float32(1))),
        (Measured, Measured(values=np.arange(3))),
    ],
    ids=repr,
)
def test_value_in_a_container_or_a_class_comes_back_the_same(returns: Any, value: Any) -> None:
    back = round_trip(returns, value)
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_memory_map_and_read_only_view_come_back_as_plain_arrays(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(4))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    view = np.broadcast_to(np.arange(2), (3, 2))
    try:
        for returns, value in ((np.ndarray, mapped), (np.ndarray, view)):
            back = round_trip(returns, value)
            assert type(back) is np.ndarray
            assert back.flags.writeable
            assert (back == value).all()
        (back,) = round_trip(list[np.ndarray], [mapped])
        assert type(back) is np.ndarray
    finally:
        mapped._mmap.close()  # type: ignore[attr-defined]


with warnings.catch_warnings():
    warnings.simplefilter("ignore", PendingDeprecationWarning)
    MATRIX = np.matrix([[1]])


@pytest.mark.parametrize(
    ("returns", "value", "message"),
    [
        (np.ndarray, [1], "list"),
        (np.ndarray, None, "NoneType"),
        (np.ndarray, MATRIX, "matrix.*asarray"),
        (np.ndarray, np.ma.masked_array([1]), "MaskedArray.*asarray"),
        (np.ndarray, np.zeros(1, [("a", "i1")]).view(np.recarray), "recarray.*asarray"),
        (np.ndarray, np.array([None]), "dtype object.*astype"),
        (np.ndarray, np.zeros(1, [("a", "O")]), "plain bytes"),
        (npt.NDArray[np.float32], np.ones(1), "float64.*annotated"),
        (npt.NDArray[np.integer[Any]], np.ones(1), "float64.*annotated"),
        (Any2D, np.ones(1), "1 dimensions.*2"),
        (np.float64, 1.5, "float64"),
        (np.float64, np.float32(1), "float32.*float64"),
        (list[np.ndarray], [np.ones(1), np.array([None])], "dtype object"),
        (dict[str, npt.NDArray[np.int8]], {"a": np.ones(1)}, "float64.*annotated"),
        (np.matrix, MATRIX, "matrix.*asarray"),
        (np.ma.MaskedArray, np.ma.masked_array([1]), "MaskedArray.*asarray"),
        (npt.NDArray[np.object_], np.array([None]), "objects"),
        (Unmarked, Unmarked(np.ones(1)), "cannot be decoded.*Packed"),
    ],
    ids=repr,
)
def test_value_that_cannot_come_back_is_a_type_error_that_says_what_to_do(returns: Any, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"(?s)fetch.*{message}"):
        codec_of(returns).dump(value)


def test_text_that_numpy_cuts_is_not_stored() -> None:
    with pytest.raises(NotStorable, match="another value"):
        codec_of(np.str_).dump(np.str_("a\0"))


def test_dtype_with_metadata_is_not_stored() -> None:
    with pytest.raises(NotStorable, match="metadata"):
        codec_of(np.ndarray).dump(np.zeros(1, np.dtype("i4", metadata={"unit": "m"})))


def test_bytes_between_fields_are_not_stored() -> None:
    dtype = np.dtype([("a", "i1"), ("b", "f8")], align=True)
    secret = np.frombuffer(b"\xaa" * dtype.itemsize * 3, dtype)
    text = codec_of(np.ndarray).dump(secret)
    assert text.startswith(b'"u')
    assert b"\xaa" * 7 not in base64.b64decode(text[2:-1]).replace(b"\xaa" * 8, b"")


def test_mark_of_the_type_tells_dtypes_and_dimensions_apart() -> None:
    types = [np.ndarray, npt.NDArray[np.float32], npt.NDArray[np.float64], Any2D, np.float32, np.float64, list[np.ndarray]]
    assert len({codec_of(returns).schema for returns in types}) == len(types)


def array_text(head: object, body: bytes) -> str:
    return pack_content(head, [body]).decode()


HOSTILE = {
    "objects": array_text(["array", "|O", [1], "C"], bytes(8)),
    "objects in fields": array_text(
        ["array", {"fields": [["a", "|O", 0]], "size": 8, "aligned": False, "record": False}, [1], "C"], bytes(8)
    ),
    "a name of a type": array_text(["array", "object", [1], "C"], bytes(8)),
    "fields beyond the end": array_text(
        ["array", {"fields": [["a", "<f8", 4096]], "size": 8, "aligned": False, "record": False}, [1], "C"], bytes(8)
    ),
    "wrong shape": array_text(["array", "<f8", [2], "C"], bytes(8)),
    "huge shape": array_text(["array", "<f8", [2**62], "C"], bytes(8)),
    "overflowing shape": array_text(["array", "<f8", [2**32, 2**32, 2], "C"], b""),
    "many of no bytes": array_text(["array", "|V0", [2**50], "C"], b""),
    "negative shape": array_text(["array", "<f8", [-1], "C"], bytes(8)),
    "shape of bools": array_text(["array", "<f8", [True], "C"], bytes(8)),
    "no shape": array_text(["array", "<f8", None, "C"], bytes(8)),
    "order": array_text(["array", "<f8", [1], "K"], bytes(8)),
    "bool of 2": array_text(["array", "|b1", [1], "C"], b"\2"),
    "text beyond Unicode": array_text(["array", "<U1", [1], "C"], b"\xff\xff\xff\x7f"),
    "scalar": array_text(["scalar", "<f8", [], "C"], bytes(8)),
    "no head": '"u' + base64.b64encode(b"\xff\xff\xff\xff{}").decode() + '"',
    "no base64": '"u$$$$"',
    "empty": "",
    "null": "null",
    "list": "[1]",
    "unknown mark": '"p' + base64.b64encode(b"cos\nsystem\n").decode() + '"',
    "not Zstandard": '"z' + base64.b64encode(b"PK").decode() + '"',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_a_value_error(name: str) -> None:
    with pytest.raises((ValueError, TypeError, LookupError)):
        codec_of(np.ndarray).load(HOSTILE[name])


def test_small_frame_that_decompresses_to_too_much_is_refused_without_memory() -> None:
    zstandard = pytest.importorskip("zstandard", reason="pip install 'aiokv[zstd]'")
    bomb = zstandard.ZstdCompressor().compress(bytes(8 * MAX_CONTENT_BYTES))
    with pytest.raises(ValueError, match="too large"):
        codec_of(np.ndarray).load('"z' + base64.b64encode(bomb).decode() + '"')


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_law_changed_text_is_an_array_of_the_annotated_type_or_an_error(data: st.DataObject) -> None:
    codec = codec_of(npt.NDArray[np.float32])
    content = bytearray(base64.b64decode(codec.dump(np.ones((2, 3), "f4"))[2:-1]))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(len(content) - 4, len(content)))]
    try:
        back = codec.load('"u' + base64.b64encode(content).decode() + '"')
    except Exception:  # noqa: BLE001 (a miss)
        return
    assert back.dtype.type is np.float32


async def grid(rows: int) -> npt.NDArray[np.float64]:
    return np.arange(rows * 100.0).reshape(rows, 100)


async def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).random(count)


async def zeros(count: int) -> np.ndarray:
    return np.zeros(count, "u1")


@pytest.mark.parametrize("near", [None, NearCache(60)], ids=["store", "near"])
async def test_each_caller_gets_an_array_of_its_own(store: AsyncKVStore, near: NearCache | None) -> None:
    cached = kv_cached(60, store=store, near=near)(grid)
    for _ in range(3):
        result = await cached(10)
        assert (result == np.arange(1000.0).reshape(10, 100)).all()
        result[:] = -1
    assert cached.info().computations == 1


async def test_each_id_has_an_array_of_its_own(store: AsyncKVStore) -> None:
    @kv_cached_many(60, store=store, key=lambda id_: id_, prefix="rows")
    async def rows(ids: Sequence[int]) -> dict[int, npt.NDArray[np.int64]]:
        return {id_: np.full(3, id_) for id_ in ids}

    for _ in range(2):
        result = await rows([1, 2])
        assert {id_: row.tolist() for id_, row in result.items()} == {1: [1, 1, 1], 2: [2, 2, 2]}
        result[1][:] = 0
    assert rows.info().hits == 2


async def test_array_is_compressed_without_being_asked(store: AsyncKVStore) -> None:
    cached = kv_cached(60, store=store)(zeros)
    assert (await cached(20_000_000)).nbytes == 20_000_000
    text = await store.get(cached.key(20_000_000))
    assert text is not None
    assert len(text) < 10_000
    assert (await cached(20_000_000)).nbytes == 20_000_000
    assert cached.info().hits == 1


@pytest.mark.parametrize("codec", [Zstd(), [Zstd(), Encrypted(Encrypted.new_key())]], ids=["zstd", "encrypted"])
async def test_array_goes_through_codecs_as_other_results_do(store: AsyncKVStore, codec: Any) -> None:
    cached = kv_cached(60, store=store, codec=codec)(grid)
    await cached(10)
    assert (await cached(10) == np.arange(1000.0).reshape(10, 100)).all()
    assert cached.info().hits == 1


@pytest.mark.parametrize("count", [250_000, 5_000_000], ids=["over the store's limit", "over the limit of memory"])
async def test_array_that_is_too_large_is_returned_and_its_size_is_said(
    store: AsyncKVStore, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    events = Events()
    cached = kv_cached(60, store=store, observer=events, prefix=f"too large {count}")(noise)
    with caplog.at_level(logging.INFO, "aiokv"):
        for _ in range(2):
            assert (await cached(count)).shape == (count,)
    (record,) = caplog.records
    assert "bytes" in record.getMessage()
    assert "return less of it" in record.getMessage()
    assert events.count("not_stored") == 2
    assert cached.info().not_stored == 2


@pytest.mark.parametrize("count", [250_000, 5_000_000])
async def test_array_that_is_too_large_raises_where_that_is_asked_for(store: AsyncKVStore, count: int) -> None:
    cached = kv_cached(60, store=store, on_oversize="raise")(noise)
    with pytest.raises(ValueTooLargeError, match="bytes"):
        await cached(count)


async def test_stored_text_that_was_tampered_with_is_a_miss(store: AsyncKVStore) -> None:
    cached = kv_cached(60, store=store)(grid)
    await cached(1)
    key = cached.key(1)
    text = await store.get(key)
    assert text is not None
    for name, hostile in HOSTILE.items():
        await store.set(key, text.partition("\n")[0] + "\n" + hostile)
        assert (await cached(1)).shape == (1, 100), name
    assert cached.info().hits == 0


async def test_process_without_zstandard_stores_plain_and_takes_compressed_for_a_miss(
    store: AsyncKVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = kv_cached(60, store=store)(grid)
    await cached(10)
    with monkeypatch.context() as patched:
        patched.setattr(packing, "_find_zstandard", lambda: None)
        await cached(10)
        assert cached.info().misses == 2
        await cached(10)
    # What is stored plain, every process reads.
    await cached(10)
    assert cached.info().misses == 2


async def test_an_array_that_fits_just_is_stored(store: AsyncKVStore) -> None:
    count = MAX_VALUE_BYTES * 3 // 4 // 8 - 1000
    cached = kv_cached(60, store=store)(noise)
    await cached(count)
    await cached(count)
    assert cached.info().hits == 1


def test_numpy_is_not_imported_by_the_package() -> None:
    code = "import sys, aiokv; from aiokv import kv_cached; assert not {'numpy', 'pandas', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (np.float64(1), r"return float\(...\) of it"),
        (np.int64(1), r"return int\(...\) of it"),
        (np.bool_(True), r"return bool\(...\) of it"),
        (np.zeros(2), "JSON would change; annotate the return type, pass"),
    ],
    ids=["float64", "int64", "bool", "array"],
)
def test_what_is_not_annotated_names_a_way_out_without_pydantic(result: object, words: str) -> None:
    with pytest.raises(TypeError, match=words) as caught:
        codec_of(Any).dump(result)
    assert "pydantic" not in str(caught.value)


def test_scalar_of_another_type_than_annotated_is_to_be_converted() -> None:
    with pytest.raises(TypeError, match=r"return float\(...\) of it, make the return annotation say"):
        codec_of(float).dump(np.float64(1))
