"""numpy arrays and scalars as bytes, and back: dtype, shape, order and elements, bit for bit. Nothing is unpickled. Pure."""

import math
import re
from typing import Any, Final, cast

from aiokv.caching.packing import MAX_CONTENT_BYTES, check_size
from aiokv.caching.padding import bytes_of
from aiokv.caching.unpackable import Unpackable

# The other kinds hold pointers.
_KINDS: Final = frozenset("biufcmMSUV")
_PLAIN_DTYPE = re.compile(
    r"[<>|](b1|[iu][1248]|[qQ]|f(2|4|8|12|16)|c(8|16|24|32)|[mM]8(\[\d{0,9}[A-Za-z]{1,2}(/\d{1,9})?\])?|[SUV]\d{1,9})"
)
_MAX_CODE_POINT = 0x10FFFF
_MAX_FIELDS = 1000
_OBJECTS = "convert it to a dtype without objects, such as with astype"


def describe_array(array: Any, numpy: Any) -> tuple[list[Any], list[Any]]:
    """Describe an array, and give its bytes.

    Args:
        array: A `numpy.ndarray` or `numpy.memmap`.
        numpy: The module.

    Returns:
        Its description for JSON, and one buffer.

    Raises:
        Unpackable: It is of another subclass, or of a dtype that bytes do not hold.
    """
    if type(array) is not numpy.ndarray and type(array) is not numpy.memmap:
        raise Unpackable(
            f"is of type {type(array).__qualname__}, not numpy.ndarray", "return np.asarray(...) of it", is_type=True
        )
    dtype = array.dtype
    described = describe_dtype(dtype, numpy)
    # Before anything is copied: a view may be far larger than its memory.
    check_size(int(array.size) * int(dtype.itemsize))
    is_fortran = bool(array.flags.f_contiguous and not array.flags.c_contiguous)
    array = array.T if is_fortran else array
    shape = [int(length) for length in (array.T if is_fortran else array).shape]
    content = bytes_of(array, numpy)
    return [described, shape, "F" if is_fortran else "C"], [content.data]


def restore_array(described: Any, body: memoryview, numpy: Any) -> Any:
    """Make the array that `describe_array` described, which its caller may write to.

    Args:
        described: The description, or anything else.
        body: The bytes.
        numpy: The module.

    Returns:
        A new array that owns its memory.

    Raises:
        ValueError: The description fits no array, or not the bytes.
        TypeError: Likewise.
    """
    dtype_text, shape, order = described
    if order not in {"C", "F"} or type(shape) is not list or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError("the stored array has no shape")
    dtype = restore_dtype(dtype_text, numpy)
    if math.prod(shape) * dtype.itemsize != len(body) or (dtype.itemsize == 0 and math.prod(shape) > MAX_CONTENT_BYTES):
        raise ValueError("the shape of the stored array does not fit its bytes")
    source = numpy.ndarray(tuple(shape), dtype, buffer=body, order=order)
    if dtype.names is None:
        array = source.copy(order=order)
    else:
        # numpy copies fields alone. What is between them would be memory that was used before.
        array = numpy.zeros(source.shape, dtype, order=order)
        _copy_fields(array, source)
    _check_elements(array, numpy)
    return array


def describe_dtype(dtype: Any, numpy: Any) -> Any:
    """Describe a dtype.

    Args:
        dtype: A `numpy.dtype`.
        numpy: The module.

    Returns:
        What JSON holds.

    Raises:
        Unpackable: It holds objects, or JSON cannot describe it.
    """
    if dtype.kind not in _KINDS or dtype.hasobject:
        raise Unpackable(f"has the dtype {dtype.name}, which is not made of plain bytes", _OBJECTS, is_type=True)
    if dtype.metadata is not None:
        raise Unpackable("has a dtype with metadata", "return it with a dtype without", is_type=False)
    if dtype.subdtype is not None:
        return {"base": describe_dtype(dtype.subdtype[0], numpy), "shape": list(map(int, dtype.subdtype[1]))}
    if dtype.names is None:
        text = dtype.str
        if dtype.type in {numpy.longlong, numpy.ulonglong}:
            # A class of its own, of which numpy's text says that of `int64`.
            text = text[0] + dtype.char
        if dtype.itemsize and not (_PLAIN_DTYPE.fullmatch(text) and numpy.dtype(text) == dtype and _is_own(dtype, numpy)):
            raise Unpackable(f"has the dtype {dtype.name}, which is not one of numpy's own", _OBJECTS, is_type=True)
        return text
    if dtype.type not in {numpy.void, numpy.record}:
        raise Unpackable(f"has a dtype of the class {dtype.type.__qualname__}", "return it with a plain dtype", is_type=True)
    return {
        "fields": [
            [name, describe_dtype(field, numpy), int(offset), *_checked_titles(title)]
            for name, (field, offset, *title) in ((name, dtype.fields[name]) for name in dtype.names)
        ],
        "size": int(dtype.itemsize),
        "aligned": bool(dtype.isalignedstruct),
        "record": dtype.type is numpy.record,
    }


def restore_dtype(described: Any, numpy: Any) -> Any:
    """Make the dtype that `describe_dtype` described.

    Args:
        described: The description, or anything else.
        numpy: The module.

    Returns:
        A dtype of plain bytes.

    Raises:
        ValueError: It is no such description.
        TypeError: Likewise.
    """
    if isinstance(described, str):
        if not _PLAIN_DTYPE.fullmatch(described):
            raise ValueError("the stored dtype is none of plain bytes")
        return numpy.dtype(described)
    if "base" in described:
        return numpy.dtype((restore_dtype(described["base"], numpy), tuple(described["shape"])))
    fields = described["fields"]
    if len(fields) > _MAX_FIELDS:
        raise ValueError("the stored dtype has too many fields")
    spec = {
        "names": [name for name, *_ in fields],
        "formats": [restore_dtype(field, numpy) for _, field, *_ in fields],
        "offsets": [offset for _, _, offset, *_ in fields],
        "itemsize": described["size"],
    }
    if any(title for _, _, _, *title in fields):
        spec["titles"] = [title[0] if title else None for _, _, _, *title in fields]
    dtype = numpy.dtype(spec, align=described["aligned"])
    if dtype.hasobject:
        raise ValueError("the stored dtype holds objects")
    return numpy.dtype((numpy.record, dtype)) if described["record"] else dtype


def arrays_are_same(one: Any, other: Any, numpy: Any) -> bool:
    """Return whether two arrays have one dtype and shape, and elements of the same bits.

    Args:
        one: An array.
        other: Another.
        numpy: The module.
    """
    if one.shape != other.shape or describe_dtype(one.dtype, numpy) != describe_dtype(other.dtype, numpy):
        return False
    return bool(numpy.array_equal(bytes_of(one, numpy), bytes_of(other, numpy)))


def _copy_fields(to: Any, source: Any) -> None:
    if to.dtype.names is None:
        to[...] = source
        return
    for name in to.dtype.names:
        _copy_fields(to[name], source[name])


def _check_elements(array: Any, numpy: Any) -> None:
    """Refuse bytes that are no elements of their dtype, which numpy takes as they are."""
    if array.dtype.names is not None:
        for name in array.dtype.names:
            _check_elements(array[name], numpy)
    elif array.size and array.dtype.kind == "b":
        if array.view(numpy.uint8).max() > 1:
            raise ValueError("a stored bool is neither 0 nor 1")
    elif array.size and array.dtype.kind == "U" and array.dtype.itemsize:
        points = numpy.ascontiguousarray(array).reshape(-1).view(array.dtype.byteorder.replace("|", "=") + "u4")
        if points.max() > _MAX_CODE_POINT:
            raise ValueError("a stored text is not of Unicode")


def _is_own(dtype: Any, numpy: Any) -> bool:
    # Several types of other packages, such as bfloat16, have the code of one of numpy's.
    return dtype.type in {numpy.longlong, numpy.ulonglong} or cast("Any", numpy.dtype(dtype.str)).type is dtype.type


def _checked_titles(titles: list[Any]) -> list[Any]:
    if any(type(title) is not str for title in titles):
        raise Unpackable("has a dtype with titles that are not text", "return it with a dtype without")
    return titles
