"""Tables, series and indexes of pandas, taken apart into a description and plain columns, and put together again. Pure.

The description is nested lists for JSON. It names columns by their numbers. A column is an array of numpy, a list of texts, or
an array of Arrow. Equal descriptions and columns mean equal state: dtypes, indexes, names, attributes, zones, kinds of missing
values. What has no such description is refused.
"""

import datetime as dt
import decimal
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, cast

from aiokv.caching.packing import MAX_CONTENT_BYTES, check_size
from aiokv.caching.unpackable import Unpackable
from aiokv.caching.zones import describe_frequency, describe_period, describe_zone, restore_zone

_PLAIN_KINDS: Final = frozenset("biufcmM")
_CLASSES: Final = ("DataFrame", "Series", "Index")
_INDEXES: Final = frozenset(
    {"Index", "RangeIndex", "MultiIndex", "DatetimeIndex", "TimedeltaIndex", "PeriodIndex", "IntervalIndex", "CategoricalIndex"}
)
_TO_PLAIN = "convert it with astype, to str, category or a number"

# Of objects: a code, and how they become text and come back. Codes stand in stored entries.
_TEXT, _FLOAT, _NAN, _NA, _NAT, _NONE = 0, 2, 3, 4, 5, 6
_CELLS: Final[dict[type, tuple[int, Callable[[Any], str], Callable[[str], Any]]]] = {
    str: (_TEXT, str, str),
    int: (1, lambda value: format(value, "x"), lambda text: int(text, 16)),
    float: (_FLOAT, float.hex, float.fromhex),
    type(None): (_NONE, lambda _: "", lambda _: None),
    bool: (7, lambda value: "1" if value else "", bool),
    bytes: (8, bytes.hex, bytes.fromhex),
    dt.date: (9, dt.date.isoformat, dt.date.fromisoformat),
    decimal.Decimal: (10, str, decimal.Decimal),
}
# Of numpy, for names: such as a column has among columns that are named by integers.
_LABELS: Final = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})
_READERS = {code: read for code, _, read in _CELLS.values()}
# No text stands for this one. Processors also make others, such as one with a sign.
_NAN_BITS: Final = struct.pack("<d", float("nan")).hex()
_READERS[_NAN] = lambda text: struct.unpack("<d", bytes.fromhex(text or _NAN_BITS))[0]


def pandas_class(kind: type) -> str | None:
    """Return which of the classes here a class is, such as `"DataFrame"`, or None.

    Args:
        kind: Any class.

    Raises:
        Unpackable: It is a subclass of one of the program's.
    """
    pandas: Any = sys.modules.get("pandas")
    if not hasattr(pandas, "DataFrame"):
        return None
    for name in _CLASSES:
        base = getattr(pandas, name)
        if issubclass(kind, base):
            if kind is not base and not (name == "Index" and getattr(pandas, kind.__name__, None) is kind):
                raise Unpackable(f"is of the subclass {kind.__qualname__} of {name}", f"take a plain {name}", is_type=True)
            return name
    return None


class Described:
    """A table, series or index, taken apart.

    Args:
        value: It.
        is_bounded: Whether it must be small enough to be stored.

    Raises:
        Unpackable: A part of it has no description, or it is too large.
    """

    def __init__(self, value: Any, *, is_bounded: bool = False) -> None:
        self._pandas: Any = sys.modules["pandas"]
        self._numpy: Any = sys.modules["numpy"]
        self._is_bounded = is_bounded
        self._size_bytes = 0
        self.columns: list[Any] = []
        self.attributes: dict[Any, Any] = {}
        name = pandas_class(type(value))
        describe = {"DataFrame": self._frame, "Series": self._series, "Index": self._index}.get(name or "")
        if describe is None:
            raise Unpackable(f"is of type {type(value).__qualname__}", "return a pandas.DataFrame", is_type=True)
        self.text: list[Any] = [name, describe(value)]

    def _frame(self, frame: Any) -> list[Any]:
        return [self._index(frame.index), self._index(frame.columns), self._columns(frame), self._flags(frame)]

    def _columns(self, frame: Any) -> list[Any]:
        dtypes = list(frame.dtypes)
        first = dtypes[0] if dtypes else None
        if self._is_plain(first) and all(dtype == first for dtype in dtypes):
            # One block, which comes back as one.
            self._check(int(frame.size) * int(cast("Any", first).itemsize))
            return ["block", self._plain(frame.to_numpy().T.reshape(-1))]
        return ["columns", [self._values(frame.iloc[:, number].array) for number in range(len(dtypes))]]

    def _series(self, series: Any) -> list[Any]:
        return [self._index(series.index), describe_label(series.name), self._values(series.array), self._flags(series)]

    def _flags(self, value: Any) -> bool:
        self.attributes = value.attrs
        return bool(value.flags.allows_duplicate_labels)

    def _index(self, index: Any) -> list[Any]:
        kind = type(index).__name__
        if pandas_class(type(index)) != "Index" or kind not in _INDEXES:
            raise Unpackable(f"has an index of type {kind}", "reset its index")
        if kind == "RangeIndex":
            return [kind, index.start, index.stop, index.step, describe_label(index.name)]
        if kind == "MultiIndex":
            codes = [self._plain(self._numpy.asarray(level)) for level in index.codes]
            names = [describe_label(name) for name in index.names]
            return [kind, [self._index(level.rename(None)) for level in index.levels], codes, names, index.sortorder]
        freq = None if kind not in {"DatetimeIndex", "TimedeltaIndex"} or index.freq is None else describe_frequency(index.freq)
        return [kind, self._values(index.array), freq, describe_label(index.name)]

    def _values(self, array: Any) -> list[Any]:  # noqa: C901, PLR0911 (one for each kind of dtype)
        pandas, numpy = self._pandas, self._numpy
        # Of objects and texts the bytes of the pointers, of others those of the values.
        self._check(int(array.nbytes) if self._is_bounded else 0)
        if type(array) is pandas.arrays.NumpyExtensionArray:
            array = array.to_numpy()
        dtype = array.dtype
        if self._is_plain(dtype):
            return self._plain(numpy.asarray(array))
        if isinstance(dtype, numpy.dtype) and dtype.kind == "O":
            codes, texts = self._cells(array)
            return ["objects", self._plain(numpy.array(codes, dtype=numpy.int8)), self._take(texts)]
        if isinstance(dtype, pandas.CategoricalDtype):
            return ["category", self._plain(numpy.asarray(array.codes)), self._index(dtype.categories), bool(dtype.ordered)]
        if isinstance(dtype, pandas.DatetimeTZDtype):
            moments = pandas.DatetimeIndex(array).tz_convert("UTC").tz_localize(None)
            return ["zoned", self._plain(moments.to_numpy()), describe_zone(dtype.tz)]
        if isinstance(dtype, pandas.PeriodDtype):
            periods = pandas.PeriodIndex(array)
            return ["period", self._plain(periods.asi8), describe_period(dtype, periods.freqstr)]
        if isinstance(dtype, pandas.IntervalDtype):
            return ["interval", self._index(pandas.Index(array.left)), self._index(pandas.Index(array.right)), array.closed]
        if isinstance(dtype, pandas.StringDtype):
            na_value = "NA" if getattr(dtype, "na_value", pandas.NA) is pandas.NA else "nan"
            if dtype.storage == "pyarrow":
                return ["texts", self._take(_one_chunk(array.__arrow_array__().cast("large_string"))), na_value]
            missing = numpy.asarray(array.isna())
            _, texts = self._cells("" if is_missing else text for text, is_missing in zip(array, missing, strict=True))
            return ["string", self._plain(missing), self._take(texts), na_value]
        if isinstance(array, pandas.arrays.IntegerArray | pandas.arrays.FloatingArray | pandas.arrays.BooleanArray):
            missing = numpy.asarray(array.isna())
            plain = array.to_numpy(dtype=dtype.numpy_dtype, na_value=False if dtype.kind == "b" else 0)
            return ["masked", self._plain(plain), self._plain(missing)]
        if isinstance(dtype, getattr(pandas, "ArrowDtype", ())):
            return ["arrow", self._take(_one_chunk(array.__arrow_array__()))]
        raise Unpackable(f"has values of the dtype {dtype.name}", _TO_PLAIN)

    def _is_plain(self, dtype: Any) -> bool:
        return isinstance(dtype, self._numpy.dtype) and dtype.kind in _PLAIN_KINDS

    def _plain(self, array: Any) -> list[Any]:
        self._check(int(array.size) * int(array.dtype.itemsize))
        self._size_bytes += int(array.nbytes)
        # Of one byte order: the other one is in the dtype.
        array = self._numpy.ascontiguousarray(array)
        return ["plain", self._take(array.astype(array.dtype.newbyteorder("="), copy=False)), array.dtype.str]

    def _check(self, more_bytes: int) -> None:
        """Refuse what is too large before it is copied."""
        if self._is_bounded:
            check_size(self._size_bytes + more_bytes)

    def _cells(self, cells: Iterable[Any]) -> tuple[list[int], list[str]]:
        codes, texts = [], []
        for cell in cells:
            code, text = self._cell(cell)
            codes.append(code)
            texts.append(text)
            self._size_bytes += len(text)  # One large object may stand in many cells.
            self._check(0)
        return codes, texts

    def _cell(self, cell: Any) -> tuple[int, str]:
        known = _CELLS.get(type(cell))
        if known is not None:
            code, write, _ = known
            if code == _FLOAT and cell != cell:  # noqa: PLR0124 (NaN)
                return _NAN, struct.pack("<d", cell).hex().removeprefix(_NAN_BITS)
            return code, write(cell)
        if cell is self._pandas.NA or cell is self._pandas.NaT:
            return (_NA if cell is self._pandas.NA else _NAT), ""
        raise Unpackable(f"has objects of type {type(cell).__qualname__}", _TO_PLAIN)

    def _take(self, column: Any) -> int:
        self.columns.append(column)
        return len(self.columns) - 1


class Composer:
    """What puts a table, series or index together.

    Args:
        columns: Those of `Described`, each new and of nobody else.
    """

    def __init__(self, columns: Sequence[Any]) -> None:
        self._pandas: Any = sys.modules["pandas"]
        self._numpy: Any = sys.modules["numpy"]
        self._columns: list[Any] = list(columns)
        self._range_steps = 0

    def compose(self, described: Any, attributes: dict[str, Any]) -> Any:
        """Make the value that was described; raise any error where the description fits none.

        Args:
            described: `Described.text`, or anything else.
            attributes: `Described.attributes`.
        """
        name, parts = described
        if name == "Index":
            return self._index(*parts)
        value = self._frame(*parts) if name == "DataFrame" else self._series(*parts)
        value.attrs.update(attributes)
        return value

    def _frame(self, index: Any, names: Any, columns: Any, allows_duplicates: Any) -> Any:
        pandas = self._pandas
        rows, labels = self._index(*index), self._index(*names)
        kind, content = columns
        if kind == "block":
            block = self._values(content).reshape(len(labels), len(rows)).T
            frame = pandas.DataFrame(block, index=rows, columns=labels, copy=False)
        elif len(content) != len(labels):
            raise ValueError("the stored table has another number of columns")
        else:
            series = {number: self._as_series(self._values(each), rows) for number, each in enumerate(content)}
            frame = pandas.DataFrame(series, index=rows, copy=False)
            frame.columns = labels
        return frame if allows_duplicates else frame.set_flags(allows_duplicate_labels=False)

    def _series(self, index: Any, name: Any, values: Any, allows_duplicates: Any) -> Any:
        series = self._as_series(self._values(values), self._index(*index))
        series.name = self._label(name)
        return series if allows_duplicates else series.set_flags(allows_duplicate_labels=False)

    def _as_series(self, values: Any, index: Any) -> Any:
        if len(values) != len(index):
            raise ValueError("a stored column has another length than its index")
        # Else pandas looks for a better dtype than that of objects.
        return self._pandas.Series(values, index=index, dtype=values.dtype, copy=False)

    def _index(self, kind: Any, *parts: Any) -> Any:
        pandas = self._pandas
        if kind == "RangeIndex":
            return self._range(*parts)
        if kind == "MultiIndex":
            levels, codes, names, sortorder = parts
            return pandas.MultiIndex(
                [self._index(*level) for level in levels],
                [self._values(each) for each in codes],
                sortorder=sortorder,
                names=[self._label(name) for name in names],
            )
        values, freq, name = parts
        made = self._values(values)
        index = pandas.Index(made, dtype=made.dtype, name=self._label(name), tupleize_cols=False, copy=False)
        if freq is not None:
            index.freq = freq
        if type(index).__name__ != kind:
            raise ValueError("the stored index is of another class")
        return index

    def _values(self, described: Any) -> Any:  # noqa: C901, PLR0911 (one for each kind of dtype)
        pandas = self._pandas
        kind, *parts = described
        if kind == "plain":
            column, dtype = self._column(parts[0]), self._numpy.dtype(parts[1])
            if dtype.kind not in _PLAIN_KINDS or column.dtype != dtype.newbyteorder("="):
                raise ValueError("a stored column is of another dtype")
            return column.astype(dtype, copy=False)
        if kind == "objects":
            return self._objects(self._values(parts[0]), self._column(parts[1]))
        if kind == "category":
            codes, categories, ordered = parts
            dtype = pandas.CategoricalDtype(self._index(*categories), ordered)
            return pandas.Categorical.from_codes(self._values(codes), dtype=dtype)
        if kind == "zoned":
            moments = pandas.DatetimeIndex(self._values(parts[0]))
            return moments.tz_localize("UTC").tz_convert(restore_zone(parts[1])).array
        if kind == "period":
            return pandas.PeriodIndex.from_ordinals(self._values(parts[0]), freq=parts[1]).array
        if kind == "interval":
            left, right, closed = parts
            return pandas.arrays.IntervalArray.from_arrays(self._index(*left), self._index(*right), closed)
        if kind == "string":
            missing, texts, na_value = parts
            marks = self._values(missing)
            cells = [None if mark else text for text, mark in zip(self._column(texts), marks, strict=True)]
            return pandas.array(cells, dtype=self._string_dtype("python", na_value))
        if kind == "texts":
            column = self._column(parts[0])
            if str(column.type) != "large_string":
                raise ValueError("a stored column is not of texts")
            return self._string_dtype("pyarrow", parts[1]).__from_arrow__(column)
        if kind == "masked":
            plain, missing = map(self._values, parts)
            arrays = {"b": pandas.arrays.BooleanArray, "f": pandas.arrays.FloatingArray}
            return arrays.get(plain.dtype.kind, pandas.arrays.IntegerArray)(plain, missing)
        if kind == "arrow":
            return pandas.arrays.ArrowExtensionArray(sys.modules["pyarrow"].chunked_array([self._column(parts[0])]))
        raise ValueError("a stored column is of an unknown kind")

    def _column(self, number: int) -> Any:
        """Take a column, once: few bytes that name it often would fill the memory."""
        column, self._columns[number] = self._columns[number], None
        if column is None:
            raise ValueError("a stored column is used twice")
        return column

    def _range(self, start: int, stop: int, step: int, name: Any) -> Any:
        index = self._pandas.RangeIndex(start, stop, step, name=self._label(name))
        self._range_steps += len(index)
        if self._range_steps > MAX_CONTENT_BYTES:
            raise ValueError("the stored ranges are longer than any column")
        return index

    def _string_dtype(self, storage: str, na_value: str) -> Any:
        if na_value == "NA":
            return self._pandas.StringDtype(storage)
        return self._pandas.StringDtype(storage, na_value=self._numpy.nan)

    def _objects(self, codes: Any, texts: Sequence[str]) -> Any:
        singletons = {_NA: self._pandas.NA, _NAT: self._pandas.NaT}
        cells = self._numpy.empty(len(texts), dtype=object)
        for number, (code, text) in enumerate(zip(codes.tolist(), texts, strict=True)):
            cells[number] = singletons[code] if code in singletons else _READERS[code](text)
        return cells

    def _label(self, described: Any) -> Any:
        code, content = described
        if code == "tuple":
            return tuple(map(self._label, content))
        if code == "numpy":
            kind, text = content
            if kind not in _LABELS:
                raise ValueError("a stored name is of an unknown kind")
            return self._numpy.dtype(kind).type(float.fromhex(text) if kind[0] == "f" else int(text))
        singletons = {_NA: self._pandas.NA, _NAT: self._pandas.NaT}
        return singletons[code] if code in singletons else _READERS[code](content)


def looks_same(one: Any, other: Any) -> bool:
    """Return whether pandas itself finds no difference between two tables, series or indexes: a check of the descriptions.

    Args:
        one: A table, series or index.
        other: Another.
    """
    if type(one) is not type(other) or not one.equals(other):
        return False
    if hasattr(one, "columns"):
        return (
            list(one.dtypes) == list(other.dtypes)
            and looks_same(one.columns, other.columns)
            and looks_same(one.index, other.index)
        )
    if hasattr(one, "index"):
        return bool(one.dtype == other.dtype) and looks_same(one.index, other.index)
    return bool(one.dtype == other.dtype) and list(map(repr, one.names)) == list(map(repr, other.names))


def _one_chunk(column: Any) -> Any:
    """Return a column of Arrow as one array."""
    return column.combine_chunks() if hasattr(column, "combine_chunks") else column


def describe_label(name: Any) -> list[Any]:
    """Describe the name of a series or an index.

    Args:
        name: It.

    Raises:
        Unpackable: It is no text, number, scalar of numpy, date, bytes, None, or tuple of these.
    """
    if type(name) is tuple:
        return ["tuple", [describe_label(part) for part in name]]
    kind = type(name)
    numpy: Any = sys.modules["numpy"]
    is_label = isinstance(name, numpy.generic) and name.dtype.str[1:] in _LABELS and kind is numpy.dtype(name.dtype.str).type
    known = _CELLS.get(kind)
    if known is None and not is_label:
        raise Unpackable(f"has a name of type {kind.__module__}.{kind.__qualname__}", "name it by a text")
    if name != name:  # noqa: PLR0124 (NaN)
        raise Unpackable("has NaN for a name", "name it by a text")
    if known is None:
        return ["numpy", [name.dtype.str[1:], float(name).hex() if name.dtype.kind == "f" else str(int(name))]]
    return [known[0], known[1](name)]
