"""The identity of a numpy array as an argument: shape, type and elements, not the layout in memory. Pure."""

import hashlib
from typing import Any

from aiokv.caching.naming import Unencodable, class_identity

# The other kinds hold pointers.
_KINDS = frozenset("biufcmMSUV")
_X87_MANTISSA_BITS = 63
_X87_BYTES = 10
_DIGEST_BYTES = 32


def array_identity(array: Any, numpy: Any) -> tuple[object, ...]:
    """Return what identifies an array.

    Args:
        array: A `numpy.ndarray`.
        numpy: The module.

    Returns:
        Its shape, what its elements are, and 256-bit digests of them.

    Raises:
        Unencodable: It holds objects or pointers, or its type has metadata.
    """
    return tuple(map(int, array.shape)), _describe(array.dtype), _digest(array, numpy)


def _describe(dtype: Any) -> object:
    if dtype.kind not in _KINDS or dtype.hasobject:
        raise Unencodable(type(dtype), "holds objects", ".dtype")
    if dtype.metadata is not None:
        raise Unencodable(type(dtype), "has metadata", ".dtype")
    if dtype.subdtype is not None:
        return "repeated", _describe(dtype.subdtype[0]), tuple(map(int, dtype.subdtype[1]))
    if dtype.names is None:
        # Several types of other packages, such as bfloat16, share one code.
        own = () if dtype.type.__module__ == "numpy" else class_identity(dtype.type)
        return dtype.newbyteorder("<").str, own
    fields = tuple((name, _describe(field), int(offset), title) for name, (field, offset, *title) in _fields(dtype))
    return "record", dtype.type.__qualname__, int(dtype.itemsize), bool(dtype.isalignedstruct), fields


def _fields(dtype: Any) -> list[tuple[str, Any]]:
    return [(name, dtype.fields[name]) for name in dtype.names]


def _digest(array: Any, numpy: Any) -> bytes:
    if array.dtype.names is not None:
        # Field by field, since the bytes between fields are arbitrary.
        return b"".join(_digest(array[name], numpy) for name in array.dtype.names)
    # The machine's byte order does not count, the elements do.
    array = numpy.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    if not array.nbytes:
        return hashlib.blake2b(digest_size=_DIGEST_BYTES).digest()
    content = array.view(numpy.uint8)
    if array.dtype.type in {numpy.longdouble, numpy.clongdouble}:
        info = numpy.finfo(numpy.longdouble)
        if info.nmant == _X87_MANTISSA_BITS:
            # The rest of each number is padding, whose bytes are arbitrary.
            content = numpy.ascontiguousarray(content.reshape(-1, info.dtype.itemsize)[:, :_X87_BYTES])
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
