"""How arrays and scalars of numpy are stored, by the annotated type."""

import sys
import types
import typing
from typing import Any, Final

from aiokv.caching.numpy_values import arrays_are_same, describe_array, restore_array
from aiokv.caching.packing import pack_content, unpack_content
from aiokv.caching.unpackable import Unpackable

_ARRAY: Final = "array"
_SCALAR: Final = "scalar"
_EXACTLY = "make the return annotation say exactly what is returned, or pass returns="


class ArrayForm:
    """Arrays of one annotation, such as `npt.NDArray[np.float32]`.

    Args:
        returns: The annotation.

    Raises:
        Unpackable: It is a subclass of `numpy.ndarray`, or asks for objects.
    """

    def __init__(self, returns: Any) -> None:
        self._numpy: Any = sys.modules["numpy"]
        kind = typing.get_origin(returns) or returns
        if kind is not self._numpy.ndarray:
            raise Unpackable(
                f"is a {kind.__module__}.{kind.__qualname__}, of which only the array can be stored",
                "return np.asarray(...) of it, annotated np.ndarray",
                is_type=True,
            )
        shape, dtype = (*typing.get_args(returns), Any, Any)[:2]
        lengths = typing.get_args(shape)
        self._dimensions = None if not lengths or ... in lengths else len(lengths)
        # Classes of elements and classes of dtypes; empty for any.
        self._elements = self._classes_in(dtype)
        if any(element is self._numpy.object_ for element in self._elements):
            raise Unpackable("is an array of objects", "return one of another dtype", is_type=True)

    def dump(self, value: Any) -> bytes:
        """Make the JSON text of an array; raise `Unpackable` where it would not come back."""
        described, body = describe_array(value, self._numpy)
        reason = self._find_mismatch(value)
        if reason is not None:
            raise Unpackable(reason, _EXACTLY, is_type=True)
        return pack_content([_ARRAY, *described], body)

    def load(self, json: bytes | str) -> Any:
        """Make a new array; raise `ValueError` or `TypeError` where the text is none of this annotation."""
        (kind, *described), body = unpack_content(json)
        if kind != _ARRAY:
            raise ValueError("the stored content is no array")
        array = restore_array(described, body, self._numpy)
        if self._find_mismatch(array) is not None:
            raise ValueError("the stored array is not of the annotated type")
        return array

    def is_same(self, back: Any, value: Any) -> bool:
        """Return whether an array came back as it was."""
        return arrays_are_same(back, value, self._numpy)

    def _find_mismatch(self, array: Any) -> str | None:
        if self._elements and not any(
            isinstance(array.dtype, element)
            if issubclass(element, self._numpy.dtype)
            else issubclass(array.dtype.type, element)
            for element in self._elements
        ):
            return f"is an array of the dtype {array.dtype.type.__name__}, and another is annotated"
        if self._dimensions is not None and array.ndim != self._dimensions:
            return f"is an array of {array.ndim} dimensions, and {self._dimensions} are annotated"
        return None

    def _classes_in(self, dtype: Any) -> tuple[Any, ...]:
        if typing.get_origin(dtype) is self._numpy.dtype:
            dtype = typing.get_args(dtype)[0]
        if isinstance(dtype, typing.TypeVar):
            dtype = typing.Union[dtype.__constraints__ or (dtype.__bound__ or Any,)]  # noqa: UP007 (of parts that are not known here)
        is_union = typing.get_origin(dtype) in {typing.Union, types.UnionType}
        # Of np.integer[Any] the class.
        parts = tuple(typing.get_origin(part) or part for part in (typing.get_args(dtype) if is_union else (dtype,)))
        is_any = any(part is Any or part is self._numpy.dtype or not isinstance(part, type) for part in parts)
        return () if is_any else parts


class ScalarForm:
    """Scalars of one class of numpy, or of any class below it.

    Args:
        returns: The class.
    """

    def __init__(self, returns: Any) -> None:
        self._numpy: Any = sys.modules["numpy"]
        self._class: type = typing.get_origin(returns) or returns
        if issubclass(self._class, self._numpy.object_):
            raise Unpackable("is an object", "return a value of another type", is_type=True)

    def dump(self, value: Any) -> bytes:
        """Make the JSON text of a scalar; raise `Unpackable` where it would not come back."""
        kind = type(value)
        if not isinstance(value, self._class) or kind.__module__.partition(".")[0] != "numpy":
            raise Unpackable(
                f"is of type {kind.__module__}.{kind.__qualname__}, not numpy.{self._class.__qualname__}",
                _EXACTLY,
                is_type=True,
            )
        described, body = describe_array(self._numpy.asarray(value), self._numpy)
        return pack_content([_SCALAR, *described], body)

    def load(self, json: bytes | str) -> Any:
        """Make a new scalar; raise `ValueError` or `TypeError` where the text is none of this class."""
        (kind, *described), body = unpack_content(json)
        if kind != _SCALAR or described[1] != []:
            raise ValueError("the stored content is no scalar")
        scalar = restore_array(described, body, self._numpy)[()]
        if not isinstance(scalar, self._class):
            raise ValueError("the stored scalar is not of the annotated type")  # noqa: TRY004 (of stored data)
        return scalar

    def is_same(self, back: Any, value: Any) -> bool:
        """Return whether a scalar came back as it was."""
        if type(back) is not type(value):
            return False
        if isinstance(value, str | bytes):
            # numpy leaves out zeros at the end.
            return bool(back == value)
        return arrays_are_same(self._numpy.asarray(back), self._numpy.asarray(value), self._numpy)
