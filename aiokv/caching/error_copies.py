"""Copies of an error, for callers that share a computation: none sees what another one has added to its own."""

import contextlib
import struct
from types import MemberDescriptorType
from typing import Any

_SLOT_BYTES = struct.calcsize("P")
_IS_PYTHON_CLASS = 1 << 9
# From Python 3.12 on: the list of weak references stands in front of the object.
_HAS_WEAK_REFERENCES_IN_FRONT = 1 << 3
# What every exception has beside its dictionary. The cause sets the last one.
_LINKS = ("__traceback__", "__cause__", "__context__", "__suppress_context__")


def copy_error(error: BaseException) -> BaseException:
    """Return a copy of an error: the same class, arguments, attributes, notes, cause, context and traceback.

    No code of its class runs: that may fail, make another error, or count it twice. The members of a group are copied, too.
    What its attributes refer to is shared, as are its cause and its context.

    Args:
        error: The error.

    Returns:
        The copy; the error itself where it may hold what cannot be seen from Python, as those of extension modules may.
    """
    kind = type(error)
    builtin = next(base for base in kind.__mro__ if not base.__flags__ & _IS_PYTHON_CLASS)
    members = [(base, one) for base in kind.__mro__ for one in vars(base).values() if isinstance(one, MemberDescriptorType)]
    slots = sum(bool(base.__flags__ & _IS_PYTHON_CLASS) for base, _ in members)
    if not kind.__flags__ & _HAS_WEAK_REFERENCES_IN_FRONT:
        slots += any("__weakref__" in vars(base) for base in kind.__mro__)
    if kind.__basicsize__ != builtin.__basicsize__ + slots * _SLOT_BYTES:
        return error
    try:
        given, arguments = _group_arguments(error) if isinstance(error, BaseExceptionGroup) else (error.args, error.args)
        made: Any = builtin.__new__(kind, *given)
        for _, member in members:
            # One that is not set may read as None; set to None, it would be printed. Some are set by the arguments alone.
            with contextlib.suppress(AttributeError, TypeError):
                if (value := member.__get__(error, kind)) is not None:
                    member.__set__(made, value)
        made.__dict__.update(error.__dict__)
        if isinstance(notes := made.__dict__.get("__notes__"), list):
            made.__dict__["__notes__"] = list(notes)
        BaseException.__dict__["args"].__set__(made, arguments)
        for name in _LINKS:
            BaseException.__dict__[name].__set__(made, getattr(error, name))
    except Exception:  # noqa: BLE001 (whatever it is, the error itself serves)
        return error
    same: BaseException = made
    return same


def _group_arguments(error: "BaseExceptionGroup[Any]") -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what makes a group of copies, and its `args`."""
    message, errors = (BaseExceptionGroup.__dict__[name].__get__(error) for name in ("message", "exceptions"))
    copies = tuple(copy_error(one) for one in errors)
    match error.args:
        case (first, list() | tuple() as members) if first is message:
            # They are printed in the form in which they were given.
            return (message, copies), (message, list(copies) if isinstance(members, list) else copies)
    # Its class has set others.
    return (message, copies), error.args
