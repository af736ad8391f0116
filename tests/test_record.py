"""`Record`: what a frozen dataclass does, without its cost at import."""

import copy
import inspect
import pickle
import sys

import pytest

from aiokv import HedgePolicy, RetryPolicy, TokenRenewed
from aiokv.record import Record


class Point(Record):
    x: int
    y: int = 0

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError("x must be 0 or more")


class Named(Record, kw_only=True):
    name: str
    size: int = 1


def test_values_go_by_position_and_by_name_and_defaults_fill_the_rest() -> None:
    assert (Point(1).x, Point(1).y, Point(1, 2).y, Point(y=2, x=1).x) == (1, 0, 2, 1)
    assert (Named(name="a").name, Named(name="a").size) == ("a", 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Point(), "Point needs x"),  # type: ignore[call-arg]  # noqa: PLW0108
        (lambda: Point(1, 2, 3), "Point takes 2 values"),  # type: ignore[call-arg]
        (lambda: Point(1, x=2), "Point got 'x' twice"),  # type: ignore[misc]
        (lambda: Point(1, z=2), "Point has no 'z'; it has x, y"),  # type: ignore[call-arg]
        (lambda: Named("a"), "Named takes keywords alone"),  # type: ignore[misc]
    ],
)
def test_wrong_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()  # type: ignore[operator]


def test_equal_values_are_equal_and_hash_alike_only_within_one_class() -> None:
    class Other(Record):
        x: int
        y: int = 0

    assert Point(1, 2) == Point(y=2, x=1)
    assert hash(Point(1, 2)) == hash(Point(y=2, x=1))
    assert Point(1, 2) != Point(2, 1)
    assert Point(1, 2) != Other(1, 2)


def test_records_do_not_change() -> None:
    point = Point(1)
    with pytest.raises(AttributeError, match="a Point cannot be changed"):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match="a Point cannot be changed"):
        del point.x
    assert point == Point(1)


def test_replaced_values_are_checked_anew() -> None:
    assert RetryPolicy(attempts=2)._replace(connect_timeout=1.0) == RetryPolicy(attempts=2, connect_timeout=1.0)
    with pytest.raises(ValueError, match="x must be 0 or more"):
        Point(1)._replace(x=-1)
    if sys.version_info >= (3, 13):
        assert copy.replace(Point(1), y=3) == Point(1, 3)


def test_records_are_copied_and_pickled() -> None:
    policy = HedgePolicy(quantile=0.9)
    assert copy.copy(policy) == copy.deepcopy(policy) == pickle.loads(pickle.dumps(policy)) == policy


def test_repr_and_signature_and_match_show_the_values() -> None:
    assert repr(TokenRenewed("u", 0.5, None)) == "TokenRenewed(url='u', elapsed_seconds=0.5, error=None)"
    assert (
        str(inspect.signature(HedgePolicy)) == "(*, quantile: float = 0.95, max_extra: float = 0.05, min_wait: float = 0.001)"
    )
    match Point(1, 2):
        case Point(x, y):
            assert (x, y) == (1, 2)
