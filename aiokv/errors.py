"""Every exception that aiokv raises on purpose.

```
AioKVError
├── ConfigurationError (ValueError)      a URL, option, access file or TLS setting that cannot work
│   └── CredentialsError                 credentials missing, malformed, or not for that host
├── DecodeError (ValueError)             get_json met a value that is not JSON
├── BatchError                           a part of a *_many call failed; holds the results of the rest
└── CallError                            a get, set or delete failed; has the fields below
    ├── ValueTooLargeError (ValueError)  over the limit, found before any I/O or answered as 413
    ├── ConnectError                     no connection was made, so nothing was sent
    ├── TransportError                   the connection broke while the request was under way
    ├── CallTimeoutError (TimeoutError)  no answer within the time allowed
    │   └── PoolTimeoutError             no connection of the pool came free in time; nothing was sent
    ├── AuthenticationError              401 or 403: the credentials were refused
    ├── ThrottledError                   429: too many requests
    ├── RejectedError                    any other refusal: 4xx, or a redirect
    ├── UnavailableError                 5xx: the service failed
    ├── ResponseError                    the answer is not of this protocol
    ├── UnsupportedError                 the store cannot list, claim or watch; nothing was changed
    ├── StorageError                     an embedded store cannot read or write its file
    │   ├── StorageFullError             its disk is full; nothing was stored
    │   └── CorruptValueError            the value it holds is damaged; set or delete the key
    └── StoreClosedError                 the store was closed while the call was under way
```

`StorageFullError` is one error for every lack of room: of a disk, of the memory of Redis, of an account's quota (also a 507).
It is an `UnavailableError` as well as a `StorageError`.

A bad argument is a plain `ValueError` or `TypeError`, raised before any I/O.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

MAX_PRINTED_KEY_CHARS = 100


class AioKVError(Exception):
    """The root of every exception that aiokv raises on purpose."""


class ConfigurationError(AioKVError, ValueError):
    """A URL, an option or a file that configures aiokv cannot work."""


class CredentialsError(ConfigurationError):
    """Credentials are missing, malformed, or not meant for the host."""


class DecodeError(AioKVError, ValueError):
    """A stored value is not the JSON that `get_json` expects; the message does not show the value."""


class CallError(AioKVError):
    """One get, set or delete failed; the fields hold everything that is known about it.

    Args:
        reason: The cause in one phrase, without a value, token or secret.
        verb: `"get"`, `"set"` or `"delete"`, or the name of another call; empty where the error is not of a single call.
        db_name: The store's namespace.
        key: The key, whole; the message shows at most 100 characters of it.
        host: Host and port of the service; empty for an embedded store.
        status: The HTTP status, or None where there was no answer.
        attempts: How often the call was tried; 0 where it failed before any I/O.
        elapsed: Seconds from the call's start to this error.
        retry_after: Seconds that the service asked to wait, or None.
        request_id: The service's identifier of the request, or None.
        maybe_applied: True on a write whose outcome is unknown: it may or may not be in the store.
        transient: Whether the same call may succeed later without a change; None takes the class's default.
    """

    transient_by_default: ClassVar[bool] = False

    def __init__(  # noqa: PLR0913 (each is a fact about the call)
        self,
        reason: str,
        *,
        verb: str = "",
        db_name: str = "",
        key: str = "",
        host: str = "",
        status: int | None = None,
        attempts: int = 0,
        elapsed: float | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
        maybe_applied: bool = False,
        transient: bool | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.verb = verb
        self.db_name = db_name
        self.key = key
        self.host = host
        self.status = status
        self.attempts = attempts
        self.elapsed = elapsed
        self.retry_after = retry_after
        self.request_id = request_id
        self.maybe_applied = maybe_applied
        self.transient = self.transient_by_default if transient is None else transient

    def __str__(self) -> str:
        # A file that cannot be opened knows no namespace.
        place = f" in db {truncated(self.db_name)}" if self.db_name else ""
        call = f"{self.verb} {truncated(self.key)}{place}" if self.verb else ""
        where = f"at {self.host}" if self.host else ""
        subject = " ".join(part for part in (call, where) if part)
        facts: list[str] = []
        if self.status is not None:
            facts.append(f"status {self.status}")
        if self.attempts > 1:
            facts.append(f"{self.attempts} attempts")
        if self.elapsed is not None:
            facts.append(f"{self.elapsed:.2f} s")
        if self.retry_after is not None:
            facts.append(f"the service asks to wait {self.retry_after:g} s")
        if self.request_id:
            facts.append(f"request {self.request_id}")
        if self.verb in {"set", "delete"} and self.attempts:
            facts.append(f"the {self.verb} {'may have been' if self.maybe_applied else 'was not'} applied")
        message = f"{subject}: {self.reason}" if subject else self.reason
        return f"{message} ({', '.join(facts)})" if facts else message


class ValueTooLargeError(CallError, ValueError):
    """The value is larger than the store accepts; nothing was stored."""


class ConnectError(CallError):
    """No connection could be made; nothing was sent."""

    transient_by_default = True


class TransportError(CallError):
    """The connection broke while the request was under way."""

    transient_by_default = True
    broke_with_host = False
    """Whether the whole host was lost, rather than one connection; then sending again draws on no quota."""


class CallTimeoutError(CallError, TimeoutError):
    """No answer came within the time allowed."""

    transient_by_default = True


class PoolTimeoutError(CallTimeoutError):
    """Every connection of the pool stayed busy until the deadline; nothing was sent."""

    transient_by_default = False


class AuthenticationError(CallError):
    """The service refused the credentials (401 or 403)."""


class ThrottledError(CallError):
    """The service asked to slow down (429)."""

    transient_by_default = True


class RejectedError(CallError):
    """The service refused the request (another 4xx, or a redirect, which is never followed)."""


class UnavailableError(CallError):
    """The service failed (5xx)."""


class ResponseError(CallError):
    """The answer is not of this protocol, such as a 200 that is not JSON."""


class UnsupportedError(CallError):
    """The store has no such ability, as to list its keys; the message names stores that have it."""


class StorageError(CallError):
    """An embedded store could not read or write its file."""


class StorageFullError(StorageError, UnavailableError):
    """The store has no room: its disk or memory, or an account's quota, is full (507 over HTTP); nothing was stored."""


class CorruptValueError(StorageError):
    """The stored value does not match its checksum; the key can be set anew or deleted."""


class StoreClosedError(CallError):
    """The store was closed while this call was under way."""


class BatchError(AioKVError):
    """A part of a `*_many` call failed; after the first failure no further key was started.

    Args:
        errors: Each failed key, or id of `kv_cached_many`, with its error; `maybe_applied` of a failed write is true where it
            may be in the store.
        results: Each key that succeeded, with its result (None for writes).
        not_attempted: The keys that were not started.
    """

    def __init__(
        self, errors: Mapping[Any, Exception], results: Mapping[Any, str | None], not_attempted: Sequence[Any]
    ) -> None:
        # Not as arguments of the exception: tools print those, and the results hold values.
        super().__init__()
        self.errors = dict(errors)
        self.results = dict(results)
        self.not_attempted = tuple(not_attempted)

    def __str__(self) -> str:
        first = next(iter(self.errors.values()), None)
        return (
            f"{len(self.errors)} of {len(self.errors) + len(self.results) + len(self.not_attempted)} keys failed, "
            f"{len(self.results)} succeeded, {len(self.not_attempted)} were not attempted; first failure: {first}"
        )

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        return type(self), (self.errors, self.results, self.not_attempted)

    def __repr__(self) -> str:
        return f"BatchError({self})"


def truncated(text: str) -> str:
    """Return a text quoted for a message, cut at 100 characters.

    Args:
        text: A key or a name of any length and content.

    Returns:
        Its `repr`, with an ellipsis where it was cut.
    """
    return repr(text) if len(text) <= MAX_PRINTED_KEY_CHARS else f"{text[:MAX_PRINTED_KEY_CHARS]!r}..."
