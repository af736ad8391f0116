"""Tables in which pandas or Arrow lose something quietly: each caller's own objects, types of other processes, rare values."""

import asyncio
import enum
import importlib.resources
import struct
import zoneinfo
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from aiokv import AsyncKVStore, kv_cached
from aiokv.caching.results import NotStorable, ResultCodec

pd = pytest.importorskip("pandas", reason="pip install 'aiokv[pandas]'")
pa = pytest.importorskip("pyarrow", reason="pip install 'aiokv[pandas]'")

Frame = pd.DataFrame
NAME = "aiokv.testing.length"


class Length(pa.ExtensionType):  # type: ignore[misc, name-defined]
    """An extension type of the program's."""

    def __init__(self) -> None:
        super().__init__(pa.int8(), NAME)

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, _storage: Any, _text: bytes) -> "Length":
        return cls()


def codec_of(returns: Any) -> ResultCodec:
    async def function() -> None: ...

    function.__annotations__ = {"return": returns}
    return ResultCodec(function)


@pytest.fixture
def registered() -> Iterator[None]:
    pa.register_extension_type(Length())
    yield
    try:
        pa.unregister_extension_type(NAME)
    except KeyError:
        # The test has done so.
        return


LENGTHS = pa.ExtensionArray.from_storage(Length(), pa.array([1], pa.int8()))
NESTED = {
    "column": LENGTHS,
    "list": pa.ListArray.from_arrays([0, 1], LENGTHS),
    "fixed list": pa.FixedSizeListArray.from_arrays(LENGTHS, 1),
    "struct": pa.StructArray.from_arrays([LENGTHS], ["a"]),
    "map": pa.MapArray.from_arrays([0, 1], pa.array(["k"]), LENGTHS),
    "dictionary": pa.DictionaryArray.from_arrays(pa.array([0]), pa.StructArray.from_arrays([LENGTHS], ["a"])),
}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", NESTED)
def test_entry_with_an_extension_type_that_this_process_does_not_know_is_a_miss(name: str) -> None:
    table = pa.table({"a": NESTED[name]})
    codec = codec_of(pa.Table)
    text = codec.dump(table)
    assert codec.load(text).schema.equals(table.schema)
    pa.unregister_extension_type(NAME)
    with pytest.raises(ValueError, match="unknown here"):
        codec.load(text)


@pytest.mark.usefixtures("registered")
def test_series_of_an_extension_type_that_this_process_does_not_know_is_a_miss() -> None:
    series = pd.Series(pd.arrays.ArrowExtensionArray(pa.chunked_array([LENGTHS])))
    codec = codec_of(pd.Series)
    text = codec.dump(series)
    assert codec.load(text).dtype == series.dtype
    pa.unregister_extension_type(NAME)
    with pytest.raises(ValueError, match="unknown here"):
        codec.load(text)


@pytest.mark.parametrize("is_in_list", [False, True], ids=["frame", "frame in a list"])
async def test_callers_of_one_computation_share_no_object_of_a_frame(
    store: AsyncKVStore,
    is_in_list: bool,  # noqa: FBT001 (a parameter)
) -> None:
    begun = asyncio.Event()

    async def words() -> Any:
        await begun.wait()
        frame = Frame({"a": [["x"], ["y"]]})
        frame.attrs["log"] = []
        return [frame] if is_in_list else frame

    cached = kv_cached(60, store=store, key=lambda: "one", returns=list[Frame] if is_in_list else Frame)(words)
    callers = [asyncio.create_task(cached()) for _ in range(3)]
    await asyncio.sleep(0)
    begun.set()
    frames = [result[0] if is_in_list else result for result in await asyncio.gather(*callers)]
    frames[0].loc[0, "a"].append("z")
    frames[0].attrs["log"].append("z")
    assert [frame.loc[0, "a"] for frame in frames] == [["x", "z"], ["x"], ["x"]]
    assert [frame.attrs for frame in frames] == [{"log": ["z"]}, {"log": []}, {"log": []}]
    assert cached.info().computations == 1


class Color(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize("text", [Color.RED, np.str_("red")], ids=["enum", "numpy"])
@pytest.mark.parametrize("dtype", ["string[python]", object])
def test_texts_of_subclasses_are_not_stored(text: str, dtype: Any) -> None:
    with pytest.raises(NotStorable, match="objects of type"):
        codec_of(pd.Series).dump(pd.Series([text], dtype=dtype))


@pytest.mark.parametrize("bits", [0x7FF8000000000000, 0xFFF8000000000000, 0x7FF8000000000123])
def test_every_nan_among_objects_keeps_its_bits(bits: int) -> None:
    series = pd.Series(["x", struct.unpack("<d", struct.pack("<Q", bits))[0]], dtype=object)
    codec = codec_of(pd.Series)
    back = codec.load(codec.dump(series))
    assert struct.unpack("<Q", struct.pack("<d", back[1]))[0] == bits


def zone_of_file() -> zoneinfo.ZoneInfo:
    """Return the zone of New York under another name."""
    pytest.importorskip("tzdata", reason="pip install tzdata")
    path = importlib.resources.files("tzdata") / "zoneinfo" / "America" / "New_York"
    with path.open("rb") as file:
        return zoneinfo.ZoneInfo.from_file(file, key="Europe/Paris")


def test_zone_of_a_file_is_not_taken_for_the_zone_of_its_name() -> None:
    moments = pd.Series(pd.DatetimeIndex(["2024-07-01"]).tz_localize(zone_of_file()))
    with pytest.raises(NotStorable, match=r"read from a file.*ZoneInfo"):
        codec_of(pd.Series).dump(moments)


def test_parts_of_a_table_that_refer_to_one_dictionary_refer_to_one_copy_of_it() -> None:
    pa = pytest.importorskip("pyarrow", reason="pip install 'aiokv[pandas]'")
    from aiokv.caching.columns import compact  # noqa: PLC0415 (few tests need it)

    dictionary = pa.array([str(number) * 100 for number in range(11)]).slice(1, 10)
    parts = [pa.DictionaryArray.from_arrays(pa.array([number, 9]), dictionary) for number in range(3)]
    others = [pa.DictionaryArray.from_arrays(pa.array([0]), pa.array(["a", "b"]).slice(number, 1)) for number in range(2)]
    known: dict[Any, Any] = {}
    copies = [compact(part, pa, known) for part in parts]
    assert len({copy.dictionary.buffers()[2].address for copy in copies}) == 1
    assert [copy.to_pylist() for copy in copies] == [part.to_pylist() for part in parts]
    assert [compact(other, pa, known).to_pylist() for other in others] == [["a"], ["b"]]


def test_dictionaries_of_dictionaries_with_the_same_numbers_are_not_taken_for_one() -> None:
    pa = pytest.importorskip("pyarrow", reason="pip install 'aiokv[pandas]'")
    from aiokv.caching.columns import compact  # noqa: PLC0415 (few tests need it)

    numbers = pa.array([0, 1])
    inner = [pa.DictionaryArray.from_arrays(numbers, pa.array(texts)) for texts in (["a", "b"], ["c", "d"])]
    parts = [pa.DictionaryArray.from_arrays(numbers, dictionary) for dictionary in inner]
    known: dict[Any, Any] = {}
    assert [compact(part, pa, known).to_pylist() for part in parts] == [["a", "b"], ["c", "d"]]
