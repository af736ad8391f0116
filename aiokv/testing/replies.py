"""The answers of a `ScriptedService`, and its record of the requests."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Self

from aiokv.wire import error_body, value_body

RetryAfter = int | str | datetime


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a `ScriptedService`.

    Args:
        status: The HTTP status, 200 to 599.
        body: The body.
        headers: Its headers; `Content-Type` is `application/json` where they name none.
        delay_seconds: How long the service waits before it answers.

    Raises:
        ValueError: The status or the delay is outside its range.
    """

    status: int = 200
    body: bytes = field(default=b'{"ok":true}', repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)
    delay_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 200 <= self.status <= 599:  # noqa: PLR2004 (RFC 9110 section 15, without the interim ones)
            raise ValueError(f"status must be from 200 to 599, not {self.status!r}")
        if not self.delay_seconds >= 0:
            raise ValueError(f"delay_seconds must be 0 or more, not {self.delay_seconds!r}")

    @classmethod
    def value(cls, value: str) -> Self:
        """Return the answer of a `get` that finds a value.

        Args:
            value: The value.

        Returns:
            A 200.
        """
        return cls(body=value_body(value))

    @classmethod
    def done(cls) -> Self:
        """Return the answer of a `set` or `delete` that succeeds; nothing is stored.

        Returns:
            A 200.
        """
        return cls()

    @classmethod
    def error(cls, status: int, message: str = "scripted", *, retry_after: RetryAfter | None = None) -> Self:
        """Return an error of the service.

        Args:
            status: The HTTP status, 400 to 599.
            message: The text under `error`.
            retry_after: Seconds, a moment with a time zone, or the header's text as it is; None leaves the header out.

        Returns:
            The error, as JSON.

        Raises:
            ValueError: The status is outside its range, or the moment has no time zone.
        """
        if not 400 <= status <= 599:  # noqa: PLR2004 (RFC 9110 section 15)
            raise ValueError(f"the status of an error must be from 400 to 599, not {status!r}")
        headers = {} if retry_after is None else {"Retry-After": _retry_after_text(retry_after)}
        return cls(status, error_body(message), headers)

    @classmethod
    def throttled(cls, retry_after: RetryAfter | None = 1) -> Self:
        """Return a 429.

        Args:
            retry_after: As for `error`.

        Returns:
            The error.
        """
        return cls.error(429, "too many requests", retry_after=retry_after)

    @classmethod
    def unavailable(cls, retry_after: RetryAfter | None = None) -> Self:
        """Return a 503.

        Args:
            retry_after: As for `error`.

        Returns:
            The error.
        """
        return cls.error(503, "the service is down", retry_after=retry_after)

    @classmethod
    def unauthorized(cls) -> Self:
        """Return a 401, as for a token or a key that is refused.

        Returns:
            The error.
        """
        return cls.error(401, "the credentials were refused")

    @classmethod
    def html(cls, status: int = 502) -> Self:
        """Return the page that a gateway shows in place of the service's answer.

        Args:
            status: The HTTP status; a 200 is that of a captive portal.

        Returns:
            The page.
        """
        page = b"<!DOCTYPE html><html><head><title>Bad Gateway</title></head><body><h1>Bad Gateway</h1></body></html>"
        return cls(status, page, {"Content-Type": "text/html; charset=utf-8"})

    @classmethod
    def redirect(cls, location: str, status: int = 307) -> Self:
        """Return a redirect.

        Args:
            location: The address.
            status: The HTTP status, 300 to 399.

        Returns:
            The redirect.

        Raises:
            ValueError: The status is outside its range.
        """
        if not 300 <= status <= 399:  # noqa: PLR2004 (RFC 9110 section 15)
            raise ValueError(f"the status of a redirect must be from 300 to 399, not {status!r}")
        return cls(status, b"", {"Location": location})

    @classmethod
    def broken_json(cls) -> Self:
        """Return a 200 whose JSON is cut in the middle, though HTTP calls the body complete.

        Returns:
            The answer.
        """
        return cls(body=b'{"value": "cut in the mid')


@dataclass(slots=True)
class ServiceRequest:
    """One request that a `ScriptedService` received; `repr` shows neither its headers nor its body.

    Args:
        number: Its number among all requests of the service, from 1.
        method: Its method.
        path: Its path and query, as they were sent.
        is_exchange: Whether it is for the token endpoint.
        headers: Its headers, as they were sent.
        body: Its body, or None where it was not read or the real service read it.
        reply: The scripted answer, or None where the real service answered.
        status: The answer's status, or None where there is none yet.
    """

    number: int
    method: str
    path: str
    is_exchange: bool
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes | None = field(default=None, repr=False)
    reply: Reply | None = None
    status: int | None = None


Replies = Reply | Iterable[Reply | None] | Callable[[ServiceRequest], Reply | None] | None
"""How the coming requests are answered.

None is as the real service answers. A `Reply` answers every request. An iterable, such as a list, has an item for each request;
after its end the real service answers. A function is called with each request.
"""


def check_reply(reply: object) -> None:
    """Check an item of a script.

    Args:
        reply: A `Reply` or None.

    Raises:
        TypeError: It is neither.
    """
    if reply is not None and not isinstance(reply, Reply):
        raise TypeError(f"a reply must be a Reply or None, not {type(reply).__name__}")


def _retry_after_text(retry_after: RetryAfter) -> str:
    if not isinstance(retry_after, datetime):
        return str(retry_after)
    if retry_after.tzinfo is None:
        raise ValueError("retry_after must have a time zone, as of datetime.now(UTC)")
    return format_datetime(retry_after.astimezone(UTC), usegmt=True)
