"""HTTP/1.1 requests out of bytes, by llhttp: no socket, no clock, and a bound for every part of a head.

Source: RFC 9112 for the messages; https://github.com/MagicStack/httptools for the parser's callbacks.
"""

from typing import Any, Protocol

import httptools

from aiokv.server.answers import Answer

MAX_HEADERS = 100
BODY_VERBS = frozenset({"set", "batch"})
"""Requests whose body is kept; that of others is thrown away as it comes."""

MAX_LINE_BYTES = 8_190
"""Longest request target or header, as of most servers and proxies."""

# The headers that decide something; the rest is counted and forgotten.
_KNOWN = frozenset(
    {
        b"host",
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"transfer-encoding",
        b"expect",
        b"origin",
        b"sec-fetch-site",
        b"x-request-id",
        b"last-event-id",
    }
)
_IGNORED = (b"accept", b"accept-encoding", b"accept-language", b"connection", b"content-type", b"user-agent")
# Most clients spell a header in one of two ways; a look-up costs less than making it lower-case.
_NAMES = {
    spelling: name if name in _KNOWN else b""
    for name in (*_KNOWN, *_IGNORED)
    for spelling in (name, b"-".join(map(bytes.capitalize, name.split(b"-"))))
}


class MalformedRequestError(Exception):
    """What arrived is no request that can be answered; the connection cannot be used any more.

    Args:
        status: The HTTP status that says so.
        message: The rule, without a piece of what arrived.
        reason: A word for the figures: `malformed` or `head_too_large`.
    """

    def __init__(self, status: int, message: str, reason: str = "malformed") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason


class Request:
    """One request, from its head on.

    Args:
        method: As it was sent.
        target: The first line's second word, as it was sent. Without scheme, host and query once an absolute one is admitted.
        fields: The headers that decide something, each once, by lower-case name.
        keep_alive: Whether the client can use the connection further.
        is_http_1_0: Whether the client speaks HTTP/1.0, which knows neither chunks nor interim answers.

    Attributes:
        content_length: Bytes of the body, or None where it comes in chunks.
        expects_continue: Whether the client waits for an interim answer before it sends the body.
        verb: `get`, `set`, `delete`, `token`, `other`, or one of an extension; "" until it is known.
        account: Whose request it is; "" where there are no accounts.
        db_name: The namespace, the account included.
        key: The key; of a `token` or `other` the client's address.
        ttl_seconds: Of a set.
        parsed: What the query of an extension's request says.
        body: What has arrived of the body.
        received_bytes: Bytes of the body that have arrived.
        seen_bytes: Those that had arrived when the client was last found fast enough.
        held_bytes: Bytes that it holds of the budget.
        counted_set: The number by which a set counts for its account's quota while it is under way; None where it has none.
        refusal: The answer of a request whose body is not wanted.
        started: When it was complete, by `time.perf_counter`.
        is_tls: Whether it came by TLS.
        id: What its log line and its answer bear; "" where neither is wanted.
    """

    verb = ""
    account = ""
    db_name = ""
    key = ""
    ttl_seconds = 0
    parsed: Any = None
    body: bytes | bytearray = b""
    received_bytes = 0
    seen_bytes = 0
    held_bytes = 0
    counted_set: int | None = None
    refusal: Answer | None = None
    started = 0.0
    is_tls = False
    id = ""
    expects_continue = False

    def __init__(
        self,
        method: bytes,
        target: bytes,
        fields: dict[bytes, bytes],
        *,
        keep_alive: bool = True,
        is_http_1_0: bool = False,
    ) -> None:
        self.method = method
        self.target = target
        self.fields = fields
        self.keep_alive = keep_alive
        self.is_http_1_0 = is_http_1_0
        self.content_length: int | None = 0
        if b"content-length" in fields:
            self.content_length = int(fields[b"content-length"])
        elif b"transfer-encoding" in fields:
            self.content_length = None
        if b"expect" in fields:
            self.expects_continue = fields[b"expect"].lower() == b"100-continue" and not is_http_1_0


class Sink(Protocol):
    """What a parser tells of."""

    def head_received(self, request: Request) -> None:
        """Take a request whose head is complete."""
        ...

    def body_received(self, data: bytes) -> None:
        """Take a piece of the body."""
        ...

    def request_received(self) -> None:
        """Take note that the request is complete."""
        ...


class RequestParser:
    """Bytes of one connection in, its requests out.

    Args:
        sink: Is told of each step.
        max_head_bytes: Bytes of a request's first line and headers.
    """

    def __init__(self, sink: Sink, max_head_bytes: int) -> None:
        self._sink = sink
        self._max_head_bytes = max_head_bytes
        self.in_head = True
        """Whether the next byte belongs to a head."""
        self.is_fresh = True
        """Whether no byte of the next request has arrived."""
        self._target = b""
        self._fields: dict[bytes, bytes] = {}
        self._head_bytes = self._header_count = 0
        self._has_body_grown = False
        """Whether a byte of the body came by the present piece."""
        self._framing: bytes | None = None
        """The header that gives the length of a body behind the offer of another protocol."""
        self._parser = httptools.HttpRequestParser(self)

    def feed(self, data: bytes | memoryview) -> None:
        """Parse what arrived.

        Args:
            data: The next bytes of the connection.

        Raises:
            MalformedRequestError: They make no request; the parser is of no use any more.
        """
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            # The offer is ignored, as a server may. What follows could be of either protocol: `keep_alive` is false.
            framing, self._framing = self._framing, None
            if framing is not None:
                self._go_on_with_body(framing, data[offer.args[0] :])
            return
        except httptools.HttpParserCallbackError as error:
            if isinstance(error.__context__, MalformedRequestError):
                raise error.__context__ from None
            raise
        except httptools.HttpParserError:
            coding = self._fields.get(b"transfer-encoding") if self.in_head else None
            if coding is not None and coding.lower() != b"chunked":
                raise _foreign_coding() from None
            raise MalformedRequestError(400, "the request is not well-formed HTTP, or its head is too long") from None
        if not self.is_fresh:
            if self.in_head or not self._has_body_grown:
                self._count_head(len(data))
            self._has_body_grown = False

    def _go_on_with_body(self, framing: bytes, data: bytes | memoryview) -> None:
        """Let a new parser read the body: the first one takes what follows the offer of another protocol for that protocol."""
        self._parser = httptools.HttpRequestParser(_BodyAlone(self))
        self._parser.feed_data(b"PUT / HTTP/1.1\r\nConnection: close\r\n%b\r\n\r\n" % framing)
        if len(data):
            self.feed(data)

    def close(self) -> None:
        """Let go of the sink, so that nothing waits for the garbage collector."""
        del self._parser, self._sink

    def on_message_begin(self) -> None:
        """Take note of a request's first byte; called by the parser."""
        self.is_fresh = False

    def on_url(self, url: bytes) -> None:
        """Take a piece of the target; called by the parser."""
        self._target = self._target + url if self._target else url
        if len(url) > MAX_LINE_BYTES or len(self._target) > MAX_LINE_BYTES:
            raise MalformedRequestError(400, f"the request's target is longer than {MAX_LINE_BYTES:,} bytes", "head_too_large")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; called by the parser."""
        if len(value) > MAX_LINE_BYTES:
            raise _too_many_headers()
        known = _NAMES.get(name)
        if known is None:
            known = self._look_up(name)
        if not known:
            return
        if known in self._fields or not self.in_head:
            raise MalformedRequestError(400, f"the header {known.decode()} stands twice, or behind the body")
        self._fields[known] = value

    def _look_up(self, name: bytes) -> bytes:
        self._header_count += 1
        if self._header_count > MAX_HEADERS or len(name) > MAX_LINE_BYTES:
            raise _too_many_headers()
        name = name.lower()
        return name if name in _KNOWN else b""

    def on_headers_complete(self) -> None:
        """Take note of the head's end; called by the parser."""
        parser, fields = self._parser, self._fields
        version = parser.get_http_version()
        is_http_1_0 = version == "1.0"
        if not is_http_1_0 and version != "1.1":
            raise MalformedRequestError(505, "this server speaks HTTP/1.1")
        if not is_http_1_0 and b"host" not in fields:
            raise MalformedRequestError(400, "the request has no Host header")
        if b"transfer-encoding" in fields:
            _check_coding(fields, is_http_1_0=is_http_1_0)
        method = parser.get_method()
        if method == b"CONNECT":
            raise MalformedRequestError(501, "this server is no proxy")
        offers_upgrade = parser.should_upgrade()
        if offers_upgrade:
            self._framing = _framing_of(fields)
        keep_alive = parser.should_keep_alive() and not offers_upgrade
        request = Request(method, self._target, fields, keep_alive=keep_alive, is_http_1_0=is_http_1_0)
        self.in_head = False
        self._sink.head_received(request)

    def on_body(self, data: bytes) -> None:
        """Take a piece of the body; called by the parser."""
        self._has_body_grown = True
        self._head_bytes = 0
        self._sink.body_received(data)

    def on_message_complete(self) -> None:
        """Take note of the request's end; called by the parser."""
        if self.in_head or self._framing is not None:
            return
        self.in_head = self.is_fresh = True
        self._target = b""
        self._fields = {}
        self._head_bytes = self._header_count = 0
        self._sink.request_received()

    def _count_head(self, size_bytes: int) -> None:
        # Counted by what is fed, since no callback tells of a header, a trailer or a chunk's extension that never ends.
        self._head_bytes += size_bytes
        if self._head_bytes > self._max_head_bytes:
            raise MalformedRequestError(
                431, f"the request's head, or its trailer, is larger than {self._max_head_bytes:,} bytes", "head_too_large"
            )


class _BodyAlone:
    """What a parser tells of a body whose head has been taken already."""

    def __init__(self, parser: RequestParser) -> None:
        self.on_body = parser.on_body
        self.on_message_complete = parser.on_message_complete


def _too_many_headers() -> MalformedRequestError:
    return MalformedRequestError(
        400, f"a header is longer than {MAX_LINE_BYTES:,} bytes, or there are more than {MAX_HEADERS}", "head_too_large"
    )


def _check_coding(fields: dict[bytes, bytes], *, is_http_1_0: bool) -> None:
    if fields[b"transfer-encoding"].lower() != b"chunked":
        raise _foreign_coding()
    if is_http_1_0 or b"content-length" in fields:
        raise MalformedRequestError(400, "the request's body has no length that two parsers would agree on")


def _framing_of(fields: dict[bytes, bytes]) -> bytes | None:
    """Return the header that gives the length of a body; None where there is none."""
    if b"transfer-encoding" in fields:
        return b"Transfer-Encoding: chunked"
    length = fields.get(b"content-length", b"0")
    return b"Content-Length: " + length if length.strip(b"0") else None


def _foreign_coding() -> MalformedRequestError:
    return MalformedRequestError(501, "the body must be sent without Transfer-Encoding, or with chunked alone")
