"""Values to make keys of, and what makes two of them the same argument; for several test files."""

import collections
import datetime as dt
import decimal
import zoneinfo

from golden_values import Colour, Level, Word
from hypothesis import strategies as st

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


def identity(value: object) -> object:
    """Return what makes a value the same argument, in another way than the encoding does."""
    kind = type(value)
    if isinstance(value, float):
        return kind, "nan" if value != value else value.hex()  # noqa: PLR0124
    if isinstance(value, list | tuple):
        return kind, tuple(map(identity, value))
    if isinstance(value, set | frozenset):
        return kind, frozenset(collections.Counter(map(identity, value)).items())
    if isinstance(value, dict):
        return kind, tuple((identity(key), identity(item)) for key, item in value.items())
    if isinstance(value, dt.datetime):
        return kind, value.isoformat(), value.fold, str(type(value.tzinfo))
    return kind, str(value) if isinstance(value, decimal.Decimal) else value


SMALL = st.sampled_from([0, 1, 2, 3, True, 1.0, "1", "", None, (), (1,), [1], "1:b:2", "2:b:3"])
