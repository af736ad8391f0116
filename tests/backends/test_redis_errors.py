"""What each exception of redis-py becomes."""

import inspect

import pytest
import redis.exceptions as theirs

from aiokv import (
    AuthenticationError,
    CallError,
    CallTimeoutError,
    ConnectError,
    CorruptValueError,
    RejectedError,
    ResponseError,
    StorageFullError,
    TransportError,
    UnavailableError,
)
from aiokv.backends.redis.errors import MEANINGS, call_error, meaning_of

ALL = [kind for _, kind in inspect.getmembers(theirs, inspect.isclass) if issubclass(kind, BaseException)]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_exception_of_redis_py_is_in_the_table(kind: type[BaseException]) -> None:
    assert kind in MEANINGS


def mapped(error: BaseException, *, write: bool = True, was_sent: bool = True) -> CallError:
    return call_error(error, meaning_of(error, was_sent=was_sent), write=write)


@pytest.mark.parametrize(
    ("error", "kind", "transient", "maybe_applied"),
    [
        (theirs.ConnectionError("gone"), TransportError, True, True),
        (ConnectionResetError(), TransportError, True, True),
        (theirs.TimeoutError(), CallTimeoutError, True, True),
        (TimeoutError(), CallTimeoutError, True, True),
        (theirs.InvalidResponse(), ResponseError, False, True),
        (theirs.MovedError("1 127.0.0.1:7000"), UnavailableError, True, False),
        (theirs.AskError("1 127.0.0.1:7000"), UnavailableError, True, False),
        (theirs.ClusterDownError("down"), UnavailableError, True, False),
        (theirs.MasterDownError("down"), UnavailableError, True, False),
        (theirs.TryAgainError(), UnavailableError, True, False),
        (theirs.ReadOnlyError(), UnavailableError, True, False),
        (theirs.BusyLoadingError(), UnavailableError, True, False),
        (theirs.OutOfMemoryError(), StorageFullError, False, False),
        (theirs.AuthenticationError(), AuthenticationError, False, False),
        (theirs.NoPermissionError(), AuthenticationError, False, False),
        (theirs.ResponseError("NOREPLICAS Not enough good replicas to write."), UnavailableError, True, False),
        (theirs.ResponseError("MISCONF Redis is configured to save"), UnavailableError, True, False),
        (theirs.ResponseError("BUSY Redis is busy"), UnavailableError, True, False),
        (theirs.ResponseError("WRONGTYPE Operation against"), CorruptValueError, False, False),
        (theirs.ResponseError("syntax error"), RejectedError, False, False),
    ],
    ids=repr,
)
def test_error_says_whether_it_may_pass_and_whether_the_write_may_be_there(
    error: BaseException,
    kind: type[CallError],
    transient: bool,  # noqa: FBT001 (a row of the table)
    maybe_applied: bool,  # noqa: FBT001 (likewise)
) -> None:
    found = mapped(error)
    assert type(found) is kind
    assert (found.transient, found.maybe_applied) == (transient, maybe_applied)
    assert not mapped(error, write=False).maybe_applied


@pytest.mark.parametrize("error", [theirs.ConnectionError(), theirs.TimeoutError(), OSError(), TimeoutError()], ids=repr)
def test_nothing_is_applied_where_no_connection_was_made(error: BaseException) -> None:
    found = mapped(error, was_sent=False)
    assert type(found) is ConnectError
    assert (found.transient, found.maybe_applied) == (True, False)


def test_unknown_exception_has_the_meaning_of_its_base() -> None:
    class NewError(theirs.ReadOnlyError):
        pass

    assert type(mapped(NewError())) is UnavailableError


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_no_message_repeats_the_server_s_text(kind: type[BaseException]) -> None:
    text = "1 hunter2:7000" if issubclass(kind, theirs.AskError) else "ERR unknown command, with args: hunter2"
    assert "hunter2" not in str(mapped(kind(text)))
