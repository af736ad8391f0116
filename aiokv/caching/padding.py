"""The bytes of arrays, without what stands between their values: that is arbitrary memory of the process. Pure."""

import math
from typing import Any

_X87_MANTISSA_BITS = 63
_X87_BYTES = 10


def bytes_of(array: Any, numpy: Any) -> Any:
    """Return the elements of an array as bytes in C order, where padding is 0.

    Args:
        array: A `numpy.ndarray` without objects.
        numpy: The module.

    Returns:
        An array of `uint8` of one dimension, perhaps of the same memory.
    """
    dtype = array.dtype
    flat = numpy.ascontiguousarray(array).reshape(-1)
    if not flat.nbytes:
        return numpy.empty(0, numpy.uint8)
    content = flat.view(numpy.uint8)
    if dtype.names is None and dtype.type not in {numpy.longdouble, numpy.clongdouble}:
        return content
    mask = _mask_of(dtype, numpy)
    return content if mask.all() else (content.reshape(-1, dtype.itemsize) & mask).reshape(-1)


def _mask_of(dtype: Any, numpy: Any) -> Any:
    """Return 255 for each byte of an element that belongs to a value, and 0 for padding."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return numpy.tile(_mask_of(base, numpy), math.prod(shape))
    if dtype.names is not None:
        mask = numpy.zeros(dtype.itemsize, numpy.uint8)
        for field, offset, *_ in (dtype.fields[name] for name in dtype.names):
            mask[offset : offset + field.itemsize] |= _mask_of(field, numpy)
        return mask
    mask = numpy.full(dtype.itemsize, 255, numpy.uint8)
    if dtype.type in {numpy.longdouble, numpy.clongdouble}:
        info = numpy.finfo(numpy.longdouble)
        if info.nmant == _X87_MANTISSA_BITS:
            parts = mask.reshape(-1, info.dtype.itemsize)
            parts[:, _X87_BYTES:] = 0
            if dtype.newbyteorder("<") != dtype:
                # The other byte order puts the padding first.
                mask = numpy.ascontiguousarray(parts[:, ::-1]).reshape(-1)
    return mask
