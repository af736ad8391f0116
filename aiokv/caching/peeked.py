"""What is stored of a call."""

from typing import Generic, NamedTuple, TypeVar

R = TypeVar("R")


class Peeked(NamedTuple, Generic[R]):
    """What is stored of a call.

    Args:
        value: The result.
        age: Seconds since its computation began.
        fresh: Whether a call would be served with it without a thought.
    """

    value: R
    age: float
    fresh: bool
