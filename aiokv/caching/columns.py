"""Columns of Arrow without the bytes that nobody sees: those under nulls, and those outside of a slice. Pure."""

import importlib
from typing import Any


def compact(column: Any, arrow: Any) -> Any:  # noqa: PLR0911 (one for each kind of type)
    """Return an array of equal values in memory that holds nothing else, as far as Arrow offers a way.

    Dictionaries are kept whole, since they can be seen. Unions, views of lists and run-end encoded
    columns are kept as they are.

    Args:
        column: A `pyarrow.Array`.
        arrow: The module pyarrow.
    """
    kind, types = column.type, arrow.types
    if isinstance(kind, arrow.BaseExtensionType):
        return arrow.ExtensionArray.from_storage(kind, compact(column.storage, arrow))
    if types.is_dictionary(kind):
        indices = compact(column.indices, arrow)
        return arrow.DictionaryArray.from_arrays(indices, column.dictionary, ordered=kind.ordered)
    if types.is_struct(kind):
        return _compact_struct(column, arrow)
    if types.is_list(kind) or types.is_large_list(kind):
        return _compact_list(column, arrow)
    if str(kind) in {"string_view", "binary_view"}:
        return arrow.array(column.to_pylist(), kind)
    if types.is_nested(kind):
        return column if _is_kept(kind, arrow) else _take_all(column, arrow)
    return _take_all(column, arrow) if column.null_count and not types.is_null(kind) else column


def _compact_struct(column: Any, arrow: Any) -> Any:
    kind = column.type
    if not kind.num_fields:
        return column
    # `flatten` puts the nulls of the whole into each field.
    fields = [compact(field, arrow) for field in column.flatten()]
    return arrow.StructArray.from_arrays(fields, fields=list(kind), mask=column.is_null() if column.null_count else None)


def _compact_list(column: Any, arrow: Any) -> Any:
    kind = column.type
    lengths = column.value_lengths().fill_null(0).cast(arrow.int64())
    ends = _compute().cumulative_sum(lengths)
    offsets = arrow.concat_arrays([arrow.array([0], arrow.int64()), ends])
    make = arrow.LargeListArray
    if arrow.types.is_list(kind):
        make, offsets = arrow.ListArray, offsets.cast(arrow.int32())
    # `flatten` leaves out what stands under nulls.
    values = compact(column.flatten(), arrow)
    return make.from_arrays(offsets, values, type=kind, mask=column.is_null() if column.null_count else None)


def _take_all(column: Any, arrow: Any) -> Any:
    numbers = _compute().cumulative_sum(arrow.repeat(arrow.scalar(1, arrow.int64()), len(column)), start=-1)
    return column.take(numbers)


def _compute() -> Any:
    return importlib.import_module("pyarrow.compute")


def _is_kept(kind: Any, arrow: Any) -> bool:
    """Return whether `take` is missing for a nested type, or for one inside."""
    if str(kind).startswith(("run_end_encoded", "list_view", "large_list_view")) or "view" in str(kind):
        return True
    return bool(arrow.types.is_union(kind) and kind.mode == "sparse")
