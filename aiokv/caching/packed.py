"""Which types are stored as binary content rather than as JSON: arrays and scalars of numpy, tables of pandas and Arrow."""

import sys
import types
import typing
from typing import Any, Protocol

from aiokv.caching.ambiguity import PACKED
from aiokv.caching.annotation import rebuild, without_alias
from aiokv.caching.numpy_forms import ArrayForm, ScalarForm
from aiokv.caching.unpackable import Unpackable

_ADVICE = "return it in a simpler form"
_PYDANTIC_SAYS = "Error serializing to JSON: PydanticSerializationError: Error calling function `write_packed`: Unpackable: "


class Form(Protocol):
    """How values of one annotated type are stored."""

    def dump(self, value: Any) -> bytes:
        """Make the JSON text of a value; raise `Unpackable` where that cannot hold it."""
        ...

    def load(self, json: bytes | str) -> Any:
        """Make a new value of a JSON text, or raise."""
        ...

    def is_same(self, back: Any, value: Any) -> bool:
        """Return whether a value came back as it was, bit for bit."""
        ...


class Packed:
    """Store a field of a model or a dataclass as binary content: `pixels: Annotated[np.ndarray, Packed]`.

    Return annotations of cached functions need it only inside such classes.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Return how pydantic reads and writes the field."""
        from pydantic_core import core_schema  # noqa: PLC0415 (an extra, and it is here when this is called)

        source = without_alias(source)
        try:
            form = find_form(source)
        except Unpackable as fault:
            raise TypeError(f"a field that {fault.reason} cannot be stored; {fault.advice}") from None
        if form is None:
            raise TypeError(
                "Packed marks one array or scalar of numpy, or one table or series of pandas or pyarrow; in a union or a "
                "container mark that part, such as Annotated[np.ndarray, Packed] | None"
            )

        def read(text: str) -> Any:
            try:
                return form.load(f'"{text}"')
            except Exception:  # noqa: BLE001 (other packages fail in their own ways, and pydantic wants one)
                raise ValueError("the stored content is not of the annotated type") from None

        def write_packed(value: Any) -> str:
            return dump_checked(form, value)[1:-1].decode()

        return core_schema.json_or_python_schema(
            json_schema=core_schema.no_info_after_validator_function(read, core_schema.str_schema()),
            python_schema=core_schema.is_instance_schema(typing.get_origin(source) or source),
            metadata={PACKED: True},
            serialization=core_schema.plain_serializer_function_ser_schema(
                write_packed, return_schema=core_schema.str_schema(), when_used="json"
            ),
        )


def find_form(returns: Any) -> Form | None:
    """Find how values of a type are stored.

    Args:
        returns: The annotated type.

    Returns:
        The form, or None where the type is none of numpy, pandas and pyarrow.

    Raises:
        Unpackable: The type is one of them, and its values cannot be stored.
    """
    while True:
        if typing.get_origin(returns) is typing.Annotated:
            returns = typing.get_args(returns)[0]
        elif hasattr(returns, "__supertype__"):
            returns = returns.__supertype__
        elif (plain := without_alias(returns)) is not returns:
            returns = plain
        else:
            break
    kind = typing.get_origin(returns) or returns
    if not isinstance(kind, type):
        return None
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and issubclass(kind, numpy.ndarray):
        return ArrayForm(returns)
    if numpy is not None and issubclass(kind, numpy.generic):
        return ScalarForm(returns)
    if "pandas" in sys.modules or "pyarrow" in sys.modules:
        from aiokv.caching.tables import find_table_form  # noqa: PLC0415 (most programs have no tables)

        return find_table_form(kind)
    return None


def with_packed(returns: Any) -> Any:
    """Mark the arrays and tables in a type for pydantic.

    Args:
        returns: The annotated type.

    Returns:
        The type, where each of them is `Annotated[..., Packed]`; as it is where there is none.

    Raises:
        Unpackable: See `find_form`.
    """
    if typing.get_origin(returns) is typing.Literal or any(item is Packed for item in getattr(returns, "__metadata__", ())):
        return returns
    # Such as numpy's `NDArray`, which is an alias from numpy 2.5 on.
    plain = without_alias(returns)
    if isinstance(typing.get_origin(plain) or plain, type | types.UnionType) and find_form(plain) is not None:
        return typing.Annotated[plain, Packed]
    return rebuild(returns, with_packed)


def dump_checked(form: Form, value: Any) -> bytes:
    """Make the JSON text of a value, and check that the same value comes back.

    Args:
        form: How values of its annotated type are stored.
        value: The value.

    Returns:
        The text for `form.load`.

    Raises:
        Unpackable: It would not come back as it is.
    """
    step = "described"
    try:
        text = form.dump(value)
        step = "read back"
        is_same = form.is_same(form.load(text), value)
    except Unpackable:
        raise
    except Exception as error:  # noqa: BLE001 (other packages fail in their own ways, and the caller gets the value all the same)
        raise Unpackable(f"cannot be {step} ({type(error).__qualname__})", _ADVICE) from None
    if not is_same:
        raise Unpackable("comes back as another value", _ADVICE)
    return text


def fault_of(text: str) -> tuple[str, bool] | None:
    """Find why a value could not be packed in the text of pydantic's error.

    Args:
        text: The text.

    Returns:
        The reason, and whether it holds for each value of its type; None where the error is another.
    """
    if not text.startswith(_PYDANTIC_SAYS):
        return None
    kind, _, reason = text.removeprefix(_PYDANTIC_SAYS).partition(", ")
    if kind == "size":
        # The advice is that for results of any kind.
        reason = reason.rpartition(" (")[0]
    return f"holds a value that {reason}", kind == "type"


def packed_is_same(back: Any, value: Any) -> bool:
    """Return whether a value of numpy, pandas or pyarrow came back as it was."""
    form = find_form(type(back))
    return form is not None and form.is_same(back, value)
