"""Columns of Arrow without the bytes that nobody sees: those under nulls, and those outside of a slice. Pure."""

import importlib
import itertools
from collections.abc import Callable
from typing import Any

from aiokv.caching.packing import check_size

Known = dict[Any, tuple[Any, Any]]
"""Dictionaries and their copies, by where in memory they are."""


def compact(column: Any, arrow: Any, known: Known) -> Any:  # noqa: PLR0911 (one for each kind of type)
    """Return an array of equal values in memory that holds nothing else, as far as Arrow offers a way.

    All values of a dictionary are kept, since they can be seen. Sparse unions, views of lists and run-end encoded
    columns are kept as they are.

    Args:
        column: A `pyarrow.Array`.
        arrow: The module pyarrow.
        known: Dictionaries that were copied for the same table, empty at first; each of its parts may refer to the same one.

    Raises:
        Unpackable: Views of texts or bytes refer to too much.
        pyarrow.ArrowNotImplementedError: Arrow has no way to copy the column.
    """
    kind, types = column.type, arrow.types
    if isinstance(kind, arrow.BaseExtensionType):
        return arrow.ExtensionArray.from_storage(kind, compact(column.storage, arrow, known))
    if types.is_dictionary(kind):
        indices = compact(column.indices, arrow, known)
        return arrow.DictionaryArray.from_arrays(indices, _compact_once(column.dictionary, arrow, known), ordered=kind.ordered)
    if types.is_struct(kind):
        return _compact_struct(column, arrow, known)
    if types.is_list(kind) or types.is_large_list(kind):
        return _compact_list(column, arrow, known)
    if types.is_nested(kind) and _has_type(kind, _is_kept, arrow):
        return column
    if types.is_map(kind):
        return _compact_map(column, arrow, known)
    if types.is_fixed_size_list(kind) and kind.list_size:
        return _compact_fixed_list(column, arrow, known)
    if _is_view(kind, arrow):
        # One long text may be seen many times.
        check_size(count_bytes(column, arrow))
        return arrow.array(column.to_pylist(), kind)
    if types.is_nested(kind) or (column.null_count and not types.is_null(kind)):
        return _take_all(column, arrow)
    # Of two parts Arrow makes an array in new memory.
    return column if _is_tight(column, arrow) else arrow.concat_arrays([column, column.slice(0, 0)])


def _compact_once(dictionary: Any, arrow: Any, known: Known) -> Any:
    """Copy a dictionary to which many parts of a table may refer."""
    kind = dictionary.type
    if kind.num_fields or arrow.types.is_dictionary(kind) or isinstance(kind, arrow.BaseExtensionType):
        # The buffers do not tell all: what is inside may have offsets, or a dictionary, of its own.
        return compact(dictionary, arrow, known)
    places = tuple(None if part is None else (part.address, part.size) for part in dictionary.buffers())
    place = (kind, dictionary.offset, len(dictionary), places)
    if place not in known:
        # The dictionary is kept, too: if it were freed, another one could be made at the same place.
        known[place] = dictionary, compact(dictionary, arrow, known)
    return known[place][1]


def _compact_struct(column: Any, arrow: Any, known: Known) -> Any:
    kind = column.type
    if not kind.num_fields:
        return column
    # `flatten` puts the nulls of the whole into each field.
    fields = [compact(field, arrow, known) for field in column.flatten()]
    return arrow.StructArray.from_arrays(fields, fields=list(kind), mask=column.is_null() if column.null_count else None)


def _compact_list(column: Any, arrow: Any, known: Known) -> Any:
    kind = column.type
    lengths = column.value_lengths().fill_null(0).cast(arrow.int64())
    ends = _compute().cumulative_sum(lengths)
    offsets = arrow.concat_arrays([arrow.array([0], arrow.int64()), ends])
    make = arrow.LargeListArray
    if arrow.types.is_list(kind):
        make, offsets = arrow.ListArray, offsets.cast(arrow.int32())
    # `flatten` leaves out what stands under nulls.
    values = compact(column.flatten(), arrow, known)
    return make.from_arrays(offsets, values, type=kind, mask=column.is_null() if column.null_count else None)


def _compact_map(column: Any, arrow: Any, known: Known) -> Any:
    column = _take_all(column, arrow)
    mask = column.is_null() if column.null_count else None
    keys, items = compact(column.keys, arrow, known), compact(column.items, arrow, known)
    return arrow.MapArray.from_arrays(column.offsets, keys, items, type=column.type, mask=mask)


def _compact_fixed_list(column: Any, arrow: Any, known: Known) -> Any:
    kind = column.type
    if column.null_count:
        column = _take_all(column, arrow)
    values = column.values.slice(column.offset * kind.list_size, len(column) * kind.list_size)
    mask = column.is_null() if column.null_count else None
    return arrow.FixedSizeListArray.from_arrays(compact(values, arrow, known), type=kind, mask=mask)


def _take_all(column: Any, arrow: Any) -> Any:
    numbers = _compute().cumulative_sum(arrow.repeat(arrow.scalar(1, arrow.int64()), len(column)), start=-1)
    return column.take(numbers)


def _compute() -> Any:
    return importlib.import_module("pyarrow.compute")


def _is_tight(column: Any, arrow: Any) -> bool:
    """Return whether a column without nulls, and without columns inside, is alone in its memory."""
    types, kind = arrow.types, column.type
    if types.is_boolean(kind):
        # The last byte may have bits of other rows.
        return False
    last_offset_bytes = 0
    if types.is_string(kind) or types.is_binary(kind):
        last_offset_bytes = 4
    elif types.is_large_string(kind) or types.is_large_binary(kind):
        last_offset_bytes = 8
    held_bytes = sum(part.size for part in column.buffers() if part is not None)
    return bool(held_bytes == column.nbytes + last_offset_bytes)


def count_bytes(column: Any, arrow: Any) -> int:
    """Return a lower bound of the bytes that a copy of a column takes. Arrow counts all that a part refers to.

    Args:
        column: A `pyarrow.Array`.
        arrow: The module pyarrow.
    """
    kind = column.type
    if arrow.types.is_dictionary(kind):
        return int(column.indices.nbytes)
    if _is_view(kind, arrow):
        # Each of 16 bytes begins with the length.
        views = memoryview(column.buffers()[1]).cast("B").cast("i")
        lengths = views[4 * column.offset : 4 * (column.offset + len(column)) : 4]
        return sum(itertools.compress(lengths, column.is_valid().to_pylist()))
    return 0 if _has_type(kind, _is_shared, arrow) else int(column.nbytes)


def _has_type(kind: Any, is_searched: Callable[[Any, Any], bool], arrow: Any) -> bool:
    """Return whether a type is searched for, or one inside."""
    if is_searched(kind, arrow):
        return True
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    if isinstance(kind, arrow.BaseExtensionType):
        inner.append(kind.storage_type)
    elif arrow.types.is_dictionary(kind):
        inner.append(kind.value_type)
    return any(_has_type(each, is_searched, arrow) for each in inner)


def _is_view(kind: Any, arrow: Any) -> bool:
    return bool(arrow.types.is_string_view(kind) or arrow.types.is_binary_view(kind))


def _is_list_view(kind: Any, arrow: Any) -> bool:
    return bool(arrow.types.is_list_view(kind) or arrow.types.is_large_list_view(kind))


def _is_shared(kind: Any, arrow: Any) -> bool:
    return bool(arrow.types.is_dictionary(kind) or _is_view(kind, arrow) or _is_list_view(kind, arrow))


def _is_kept(kind: Any, arrow: Any) -> bool:
    """Return whether `take` is missing for a nested type."""
    is_sparse = arrow.types.is_union(kind) and kind.mode == "sparse"
    return bool(is_sparse or arrow.types.is_run_end_encoded(kind) or _is_list_view(kind, arrow))
