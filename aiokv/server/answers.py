"""Answers as bytes: every one is JSON unless it says otherwise, and every error is `{"error": "<message>"}`."""

import math
from asyncio import WriteTransport
from http import HTTPStatus

import orjson

from aiokv.limits import MAX_VALUE_BYTES
from aiokv.wire import TOKEN_PATH, error_body

JSON = b"application/json"

_START = {
    status.value: b"HTTP/1.1 %d %s\r\nServer: aiokv\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
    % (status.value, status.phrase.encode())
    for status in HTTPStatus
}
_JOINED_BYTES = 64 * 1024
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


class Answer:
    """What a request is answered with.

    Args:
        status: The HTTP status.
        body: The body.

    Attributes:
        headers: Further header lines, each with its line end.
        content_type: What the body is.
        closes: Whether the connection cannot be used further, as where the rest of a body is not read.
        reason: Why a request was refused, a word for the figures; "" where it was not, or the status says it all.
    """

    headers = b""
    content_type = JSON
    closes = False
    reason = ""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.body = body

    def head(self, date: bytes, connection: bytes = b"", body: bytes = b"") -> bytes:
        """Build the head.

        Args:
            date: The Date header's line.
            connection: The Connection header's line, where one is needed.
            body: What stands behind the head: the body, or nothing where it is sent by itself or not at all.

        Returns:
            The head with its empty line, and what stands behind it.
        """
        return b"%b%b%b%bContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (
            _START[self.status],
            date,
            connection,
            self.headers,
            self.content_type,
            len(self.body),
            body,
        )

    def write(self, transport: WriteTransport, date: bytes, connection: bytes, *, without_body: bool) -> None:
        """Write the answer.

        Args:
            transport: The connection's.
            date: The Date header's line.
            connection: The Connection header's line, where one is needed.
            without_body: Whether the client asked for the head alone.
        """
        body = self.body
        if without_body:
            transport.write(self.head(date, connection))
        elif len(body) <= _JOINED_BYTES:
            transport.write(self.head(date, connection, body))
        else:
            # A long body is not copied for the sake of one call less.
            transport.write(self.head(date, connection))
            transport.write(body)


RETRY_SOON = b"Retry-After: 1\r\n"
DONE = Answer(200, orjson.dumps({"ok": True}))
ABSENT = Answer(404, error_body("no such key, or it has expired"))


def refusal(status: int, message: str, headers: bytes = b"", *, closes: bool = False, reason: str = "") -> Answer:
    """Make the answer of an error.

    Args:
        status: The HTTP status, from 400 on.
        message: The cause and the remedy, without a value or a secret.
        headers: Further header lines.
        closes: Whether the connection is closed after it.
        reason: A word for the figures.

    Returns:
        The answer.
    """
    answer = Answer(status, error_body(message))
    answer.headers, answer.closes, answer.reason = headers, closes, reason
    return answer


def too_large(size_bytes: int | None, limit_bytes: int) -> Answer:
    """Refuse a body over its limit; its size is None where it was not declared."""
    noun = "value" if limit_bytes == MAX_VALUE_BYTES else "body"
    size = "more than that" if size_bytes is None else f"{size_bytes:,} bytes"
    return refusal(413, f"{noun} is {size}, over the limit of {limit_bytes:,} bytes", closes=True)


def no_room() -> Answer:
    """Refuse a body for which there is no room now."""
    return refusal(
        503, "the server holds as many bytes as it may; nothing was done", RETRY_SOON, closes=True, reason="bytes_in_flight"
    )


def wrong_method(method: bytes) -> Answer:
    """Refuse another method than the one that the path takes."""
    return refusal(405, f"this path takes {method.decode()}", b"Allow: %b\r\n" % method)


def unauthorized() -> Answer:
    """Refuse a request whose token lets nobody in."""
    return refusal(
        401,
        f"the token is missing, expired or not from here; exchange a key for one at POST {TOKEN_PATH}",
        b"WWW-Authenticate: Bearer\r\n",
        reason="unauthorized",
    )


def too_fast(wait_seconds: float) -> Answer:
    """Refuse a request of an account that has to wait."""
    return refusal(
        429,
        "the account's requests come faster than its limit",
        b"Retry-After: %d\r\n" % math.ceil(wait_seconds),
        reason="rate",
    )


def stream_head(date: bytes, connection: bytes, content_type: str) -> bytes:
    """Build the head of an answer whose body comes in chunks; proxies are asked to hold nothing of it back."""
    return b"%b%b%bContent-Type: %b\r\nX-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n\r\n" % (
        _START[200],
        date,
        connection,
        content_type.encode(),
    )
