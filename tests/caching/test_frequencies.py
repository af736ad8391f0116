"""Frequencies of indexes and names of series: exact in results and keys, or refused."""

import datetime as dt
from typing import Any

import numpy as np
import pytest

from aiokv.caching.keys import KeyMaker
from aiokv.caching.results import NotStorable, ResultCodec

pd = pytest.importorskip("pandas", reason="pip install 'aiokv[pandas]'")
pytest.importorskip("pyarrow", reason="pip install 'aiokv[pandas]'")


def codec_of(returns: Any) -> ResultCodec:
    async def function() -> None: ...

    function.__annotations__ = {"return": returns}
    function.__qualname__ = "fetch"
    return ResultCodec(function)


async def shape(table: Any) -> list[int]:
    return list(table.shape)


def days(freq: Any) -> Any:
    return pd.date_range("2020-02-03", periods=4, freq=freq)


LOST = {
    "week mask": pd.offsets.CustomBusinessDay(weekmask="Sun Mon Tue Wed Thu"),
    "holidays": pd.offsets.CustomBusinessDay(holidays=["2020-02-05"]),
    "calendar": pd.offsets.CustomBusinessDay(calendar=np.busdaycalendar(weekmask="1111110")),
    "custom month": pd.offsets.CustomBusinessMonthEnd(holidays=["2020-02-28"]),
    "hours": pd.offsets.BusinessHour(start="10:00", end="18:00"),
    "custom hours": pd.offsets.CustomBusinessHour(start="10:00"),
    "normalized": pd.offsets.MonthEnd(normalize=True),
    "months": pd.offsets.DateOffset(months=1),
    "easter": pd.offsets.Easter(),
}
KEPT = ["D", "3D", "h", "2h", "ms", "B", "C", "bh", "W-WED", "ME", "MS", "QE-FEB", "YE-MAR", "SME-5", "WOM-2WED"]


@pytest.mark.parametrize("name", LOST)
def test_frequency_that_its_text_does_not_say_is_neither_stored_nor_in_a_key(name: str) -> None:
    index = days(LOST[name])
    frame = pd.DataFrame({"x": 1.0}, index=index)
    for returns, value in ((pd.DatetimeIndex, index), (pd.DataFrame, frame), (pd.Series, frame["x"])):
        with pytest.raises(
            NotStorable, match=r"a frequency that its freqstr does not say in full; .*freq of that index to None"
        ):
            codec_of(returns).dump(value)
        with pytest.raises(TypeError, match=r"argument table .*frequency that its freqstr does not say in full"):
            KeyMaker(shape)((value,), {})
    index.freq = None
    assert codec_of(pd.DatetimeIndex).load(codec_of(pd.DatetimeIndex).dump(index)).equals(index)
    KeyMaker(shape)((index,), {})


@pytest.mark.parametrize("freq", KEPT)
def test_frequency_that_its_text_says_comes_back_and_goes_on_alike(freq: str) -> None:
    index = days(freq)
    back = codec_of(pd.DatetimeIndex).load(codec_of(pd.DatetimeIndex).dump(index))
    assert back.freq == index.freq
    assert back.shift(1).equals(index.shift(1))
    assert KeyMaker(shape)((back,), {}) == KeyMaker(shape)((index,), {})


@pytest.mark.parametrize("freq", ["D", "M", "2M", "Q-FEB", "W-WED", "h", "Y-MAR"])
def test_frequency_of_periods_comes_back(freq: str) -> None:
    index = pd.period_range("2020-02-03", periods=3, freq=freq)
    back = codec_of(pd.PeriodIndex).load(codec_of(pd.PeriodIndex).dump(index))
    assert back.dtype == index.dtype
    assert back.equals(index)


NAMES = [True, 1, -0.0, 2.5, "a", None, b"a", dt.date(2020, 1, 1), ("a", 1)]
NUMPY_NAMES = [np.True_, np.int64(5), np.uint8(5), np.float64(-0.0), np.float64(5), np.float32(0.1), ("a", np.int64(1))]


@pytest.mark.parametrize("name", NAMES + NUMPY_NAMES, ids=repr)
def test_name_comes_back_with_its_type(name: Any) -> None:
    for value in (pd.Series([1], name=name), pd.DataFrame({"a": [1]}, index=pd.Index([1], name=name))):
        returns = type(value)
        back = codec_of(returns).load(codec_of(returns).dump(value))
        found = back.name if returns is pd.Series else back.index.name
        assert type(found) is type(name)
        assert repr(found) == repr(name)


def test_column_of_a_table_with_numbers_for_names_is_stored() -> None:
    column = pd.DataFrame([[1, 2]], columns=pd.Index([5, 7])).iloc[:, 0]
    assert codec_of(pd.Series).load(codec_of(pd.Series).dump(column)).name == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (float("nan"), "has NaN for a name"),
        (np.float64("nan"), "has NaN for a name"),
        (pd.NaT, "has a name of type .*NaTType"),
        (pd.NA, "has a name of type .*NAType"),
        (np.str_("a"), r"has a name of type numpy\.str_"),
        (np.longdouble(1), r"has a name of type numpy\.longdouble"),
        (pd.Timestamp("2020"), "has a name of type pandas.*Timestamp"),
    ],
    ids=repr,
)
def test_name_that_would_come_back_changed_is_not_stored(name: Any, message: str) -> None:
    with pytest.raises(NotStorable, match=message):
        codec_of(pd.Series).dump(pd.Series([1], name=name))


def test_names_of_other_types_have_other_keys() -> None:
    keys = {KeyMaker(shape)((pd.Series([1], name=name),), {}) for name in (*NAMES, *NUMPY_NAMES)}
    assert len(keys) == len(NAMES) + len(NUMPY_NAMES)
