"""The map from redis-py's exceptions to this package's, and what each says of the call."""

import re
from typing import Final, NamedTuple

import redis.exceptions as theirs

from aiokv.backends.base import UncopiedError
from aiokv.errors import (
    AuthenticationError,
    CallError,
    CallTimeoutError,
    ConnectError,
    CorruptValueError,
    PoolTimeoutError,
    RejectedError,
    ResponseError,
    StorageFullError,
    TransportError,
    UnavailableError,
)


class NoDatabaseError(theirs.ResponseError):
    """The server has no database of the number that the URL names.

    Args:
        database: The number.
    """

    def __init__(self, database: int) -> None:
        super().__init__()
        self.database = database


class Meaning(NamedTuple):
    """What an exception says of the call that met it.

    Args:
        kind: The exception of this package.
        reason: The message.
        is_transient: Whether the same call may succeed later.
        may_be_applied: Whether a write that met it may be stored all the same.
        is_elsewhere: Whether another node may be the primary by now.
    """

    kind: type[CallError]
    reason: str
    is_transient: bool = False
    may_be_applied: bool = False
    is_elsewhere: bool = False


_LOST = Meaning(TransportError, "the connection broke", is_transient=True, may_be_applied=True, is_elsewhere=True)
_UNREACHED = Meaning(ConnectError, "no connection could be made; nothing was sent", is_transient=True, is_elsewhere=True)
_LATE = Meaning(CallTimeoutError, "no answer in time", is_transient=True, may_be_applied=True, is_elsewhere=True)
_REFUSED = Meaning(RejectedError, "the server refused the command")
_NOT_THIS = Meaning(RejectedError, "redis-py refused the command")
_LOGIN = Meaning(AuthenticationError, "user or password is wrong or missing: check credentials, or AIOKV_REDIS_PASSWORD")
_FORBIDDEN = Meaning(AuthenticationError, "the user may not run the command, or not on this key: check its ACL")
_MOVED = Meaning(UnavailableError, "the key is moving between nodes", is_transient=True, is_elsewhere=True)
_DOWN = Meaning(UnavailableError, "the cluster has no primary for the key now", is_transient=True, is_elsewhere=True)
_LOADING = Meaning(UnavailableError, "the server is loading its data", is_transient=True, is_elsewhere=True)
_READ_ONLY = Meaning(UnavailableError, "the server is a replica now", is_transient=True, is_elsewhere=True)
_FULL = Meaning(StorageFullError, "the server's memory is full (maxmemory); nothing was stored")
_NONSENSE = Meaning(ResponseError, "the answer is not of Redis's protocol", may_be_applied=True)
NO_CLUSTER: Final = Meaning(RejectedError, "the server that the URL names is no cluster; write redis://host:port")
"""What is said where a server that the URL calls a cluster is none."""
UNCOPIED: Final = Meaning(UncopiedError, "too few replicas have the write", is_transient=True, may_be_applied=True)
"""What is said of a write that the primary has, but not as many of its replicas as it should."""
_BUSY = Meaning(PoolTimeoutError, "every connection was busy; nothing was sent", is_transient=True, is_elsewhere=True)

MEANINGS: Final[dict[type[BaseException], Meaning]] = {
    theirs.RedisError: _NOT_THIS,
    theirs.ConnectionError: _LOST,
    theirs.TimeoutError: _LATE,
    theirs.AuthenticationError: _LOGIN,
    theirs.AuthorizationError: _LOGIN,
    theirs.AuthenticationWrongNumberOfArgsError: _LOGIN,
    theirs.ExternalAuthProviderError: _LOGIN,
    theirs.NoPermissionError: _FORBIDDEN,
    theirs.BusyLoadingError: _LOADING,
    theirs.InvalidResponse: _NONSENSE,
    theirs.ResponseError: _REFUSED,
    theirs.DataError: _NOT_THIS,
    theirs.PubSubError: _NOT_THIS,
    theirs.WatchError: _NOT_THIS,
    theirs.NoScriptError: _REFUSED,
    theirs.OutOfMemoryError: _FULL,
    theirs.ExecAbortError: _REFUSED,
    theirs.ReadOnlyError: _READ_ONLY,
    theirs.ModuleError: _REFUSED,
    theirs.NoSuchFieldsetError: _REFUSED,
    theirs.LockError: _NOT_THIS,
    theirs.LockNotOwnedError: _NOT_THIS,
    theirs.ChildDeadlockedError: _NOT_THIS,
    theirs.RedisClusterException: _DOWN,
    theirs.ClusterError: _DOWN,
    theirs.ClusterDownError: _DOWN,
    theirs.MasterDownError: _DOWN,
    theirs.SlotNotCoveredError: _DOWN,
    theirs.AskError: _MOVED,
    theirs.MovedError: _MOVED,
    theirs.TryAgainError: _MOVED,
    theirs.ClusterCrossSlotError: _REFUSED,
    theirs.MaxConnectionsError: _BUSY,
    theirs.CrossSlotTransactionError: _NOT_THIS,
    theirs.InvalidPipelineStack: _NOT_THIS,
    theirs.IncorrectPolicyType: _NOT_THIS,
    # Of the sockets beneath it.
    OSError: _LOST,
    TimeoutError: _LATE,
    EOFError: _LOST,
}
"""What each exception says; one that is not named says what its nearest base class says."""

# First words of error replies for which redis-py has no class.
_BY_CODE: Final[dict[str, Meaning]] = {
    "WRONGTYPE": Meaning(CorruptValueError, "the key holds no text: another program has set it to another type"),
    "NOREPLICAS": Meaning(
        UnavailableError, "the primary has too few replicas (min-replicas-to-write)", is_transient=True, is_elsewhere=True
    ),
    "MISCONF": Meaning(UnavailableError, "the server cannot write its data to disk and takes no writes", is_transient=True),
    "BUSY": Meaning(UnavailableError, "the server is busy with a script", is_transient=True),
    "UNBLOCKED": Meaning(UnavailableError, "the server is a replica now", True, True, True),
    "NOAUTH": _LOGIN,
    "FAILOVER": _DOWN,
}
_CODE = re.compile(r"[A-Z]{2,20}(?= |$)")
# What a server says that is none of a cluster's nodes.
_NO_CLUSTER: Final = "cluster support disabled"

CONNECTING: Final = frozenset({_LOST, _LATE, _UNREACHED})
"""What is said where a server was not reached, or lost."""


def unreached() -> Meaning:
    """Return what is said where no connection was made."""
    return _UNREACHED


def meaning_of(error: BaseException, *, was_sent: bool) -> Meaning:
    """Find what an exception says.

    Args:
        error: redis-py's, or one of the sockets beneath it.
        was_sent: Whether the command may have reached the server.

    Returns:
        Its meaning.
    """
    if isinstance(error, NoDatabaseError):
        return Meaning(RejectedError, f"the server has no database {error.database}; its setting `databases` says how many")
    meaning = next((MEANINGS[base] for base in type(error).__mro__ if base in MEANINGS), _NOT_THIS)
    if meaning is _REFUSED and (code := _CODE.match(str(error))):
        return _BY_CODE.get(code[0], meaning)
    if not was_sent and meaning in {_LOST, _LATE}:
        return _UNREACHED
    return meaning


def refusal_of(error: BaseException) -> Meaning | None:
    """Return what a server says that will not tell who the primaries are, however often it is asked.

    Args:
        error: Its answer, or why no connection was made.

    Returns:
        The meaning: user or password are wrong, the user may not ask, or the server is no cluster. None of any other error.
    """
    if _NO_CLUSTER in str(error):
        return NO_CLUSTER
    meaning = meaning_of(error, was_sent=False)
    return meaning if meaning in {_LOGIN, _FORBIDDEN} else None


def call_error(error: BaseException, meaning: Meaning, *, write: bool) -> CallError:
    """Make this package's exception.

    The server's own text is left out: it may repeat keys and values.

    Args:
        error: The exception that is mapped.
        meaning: Its meaning.
        write: Whether the call was a write.

    Returns:
        The exception, to be raised from None.
    """
    reason = meaning.reason
    if meaning in {_REFUSED, _NOT_THIS}:
        code = _CODE.match(str(error))
        reason += f" ({type(error).__name__ if code is None else code[0]})"
    return meaning.kind(reason, transient=meaning.is_transient, maybe_applied=write and meaning.may_be_applied)
