"""The identity of arguments that are numpy's, pandas' or pyarrow's: what a canonical encoding is made of. Pure."""

import hashlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from aiokv.caching.arrays import array_identity
from aiokv.caching.naming import Unencodable
from aiokv.caching.unpackable import Unpackable

Identify = Callable[[Any], object]

_ARRAY, _SCALAR, _TABLE = b"A", b"a", b"w"
_DIGEST_BYTES = 32


def find_identity(kind: type) -> tuple[bytes, Identify] | None:
    """Find what identifies the instances of a class.

    Args:
        kind: A class.

    Returns:
        A tag, and a function from an instance to values that have a canonical encoding. None where the class is of none of the
        three packages, or of no supported class of theirs.

    Raises:
        Unencodable: It is a subclass of the program's.
    """
    package = kind.__module__.partition(".")[0]
    numpy: Any = sys.modules.get("numpy")
    if kind is getattr(numpy, "ndarray", None):
        return _ARRAY, lambda array: array_identity(array, numpy)
    # A subclass of a scalar may hold more than the scalar.
    if package == "numpy" and issubclass(kind, numpy.generic):
        return _SCALAR, lambda scalar: array_identity(numpy.asarray(scalar), numpy)
    arrow: Any = sys.modules.get("pyarrow")
    if package == "pyarrow" and kind in {getattr(arrow, "Table", None), getattr(arrow, "RecordBatch", None)}:
        return _TABLE, partial(_identify_whole, _arrow_identity)
    pandas: Any = sys.modules.get("pandas")
    # Without the attribute it is being imported.
    return _find_in_pandas(kind, pandas) if hasattr(pandas, "DataFrame") else None


def _find_in_pandas(kind: type, pandas: Any) -> tuple[bytes, Identify] | None:
    from aiokv.caching.frames import pandas_class  # noqa: PLC0415 (most programs have no tables)

    try:
        if pandas_class(kind) is not None:
            return _TABLE, partial(_identify_whole, _frame_identity)
    except Unpackable as fault:
        raise Unencodable(kind, f"{fault.reason} ({fault.advice})") from None
    if kind is pandas.Timestamp:
        return _TABLE, _timestamp_identity
    if kind is pandas.Timedelta:
        return _TABLE, lambda delta: ("Timedelta", delta.unit, int(delta.asm8.astype("i8")))
    if kind is type(pandas.NaT) or kind is type(pandas.NA):
        return _TABLE, lambda value: ("missing", repr(value))
    return None


def _identify_whole(identify: Identify, value: Any) -> object:
    try:
        return identify(value)
    except (Unencodable, RecursionError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 (other packages fail in their own ways)
        raise Unencodable(type(value), f"cannot be read ({type(error).__qualname__})") from None


def _frame_identity(value: Any) -> object:
    from aiokv.caching.frames import Described  # noqa: PLC0415 (likewise)

    try:
        described = Described(value)
    except Unpackable as fault:
        raise Unencodable(type(value), f"{fault.reason} ({fault.advice})") from None
    return described.text, described.attributes, list(map(_column_identity, described.columns))


def _column_identity(column: Any) -> object:
    if isinstance(column, list):
        return "texts", len(column), _digest_texts(text.encode("utf-8", "surrogatepass") for text in column)
    numpy = sys.modules["numpy"]
    return array_identity(column, numpy) if isinstance(column, numpy.ndarray) else _arrow_column(column)


def _timestamp_identity(moment: Any) -> object:
    from aiokv.caching.zones import describe_zone  # noqa: PLC0415 (likewise)

    try:
        zone = None if moment.tzinfo is None else describe_zone(moment.tzinfo)
    except Unpackable as fault:
        raise Unencodable(type(moment.tzinfo), f"{fault.reason} ({fault.advice})", ".tzinfo") from None
    # `asm8` is the moment in UTC. The offset says which one of two equal times of the day it is.
    return "Timestamp", moment.unit, int(moment.asm8.astype("i8")), zone, moment.fold


def _arrow_identity(table: Any) -> object:
    schema = table.schema
    columns = []
    for number, column in enumerate(table.columns):
        try:
            columns.append(_arrow_column(column))
        except Unencodable as error:
            error.path = f".columns[{number}]"
            raise
    fields = [_field_identity(field) for field in schema]
    return type(table).__name__, table.num_rows, fields, _metadata_of(schema), columns


def _field_identity(field: Any) -> object:
    return field.name, str(field.type), field.nullable, _metadata_of(field)


def _metadata_of(owner: Any) -> object:
    return None if owner.metadata is None else sorted(owner.metadata.items())


def _arrow_column(column: Any) -> object:
    """Identify a column by its type, its nulls and the values beside them; what stands under a null does not count."""
    arrow: Any = sys.modules["pyarrow"]
    numpy: Any = sys.modules["numpy"]
    kind, types = column.type, arrow.types
    is_text = types.is_string(kind) or types.is_large_string(kind)
    is_binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    is_moment = types.is_temporal(kind) and not types.is_interval(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    # First: Arrow may unfold a column of another type, or have no functions for it.
    if not (is_text or is_binary or is_moment or is_number or types.is_null(kind)):
        raise Unencodable(type(column), f"holds values of type {kind}, which have no canonical encoding")
    array = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    if isinstance(array, arrow.ChunkedArray):
        # What Arrow cannot combine, such as texts of more than 2 GiB.
        raise Unencodable(type(column), "is too large for one array of its type")
    missing = array_identity(numpy.asarray(array.is_null()), numpy)
    known = array.drop_null()
    if is_text:
        # Not all of them need be UTF-8.
        known = known.cast(arrow.large_binary())
    if is_text or is_binary:
        return str(kind), missing, _digest_texts(known.to_pylist())
    if types.is_null(kind):
        return str(kind), len(array)
    if is_moment:
        known = known.view(arrow.int64() if kind.bit_width == 64 else arrow.int32())  # noqa: PLR2004 (bits)
    return str(kind), missing, array_identity(known.to_numpy(zero_copy_only=False), numpy)


def _digest_texts(texts: Any) -> bytes:
    """Digest texts with their lengths, so that ["a", "b"] and ["ab", ""] differ."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for text in texts:
        digest.update(b"%d:%b" % (len(text), text))
    return digest.digest()
