"""One connection of the server: what arrives is parsed, served in its order and answered, within the bounds.

A connection reads into a buffer that all share, and keeps nothing while it is idle. The server looks at each connection about
once a second (`look`) and ends those that take too long: no request sets a timer.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Coroutine
from typing import cast

from aiokv.event_wire import EVENT_STREAM
from aiokv.server.access_log import request_id
from aiokv.server.answers import INTERIM, Answer, refusal, stream_head
from aiokv.server.budget import SMALL_BYTES
from aiokv.server.owner import Owner
from aiokv.server.requests import BODY_VERBS, MalformedRequestError, Request, RequestParser
from aiokv.server.watches import Watcher

_SLICE_BYTES = 4 * 1024
"""Parsed at once: so few requests can be in it that those that wait for their turn need little room."""
_TURN_BYTES = 32 * 1024
"""Of a body in chunks, of which each may be a byte, taken in one step."""
_MAX_WAITING_BYTES = 64 * 1024
_LINGER_SECONDS = 2.0
_MAX_LINGER_BYTES = 4 * 1024 * 1024
# Counted and logged, but never sent.
_ABANDONED = refusal(503, "the client has left", closes=True)
_CLOSE = b"Connection: close\r\n"
_KEEP_ALIVE = b"Connection: keep-alive\r\n"


class Connection(asyncio.BufferedProtocol):
    """A client's connection.

    Args:
        listener: What all connections share.
        address: The client's address.
    """

    def __init__(self, listener: Owner, address: str) -> None:
        self._listener = listener
        self.address = address
        self.is_tls = False
        self._transport: asyncio.Transport | None = None
        self._parser = RequestParser(self, listener.options.max_head_bytes)
        self._seconds = 0.0
        """How long the present state lasts, as far as `look` has counted."""
        self._body: Request | None = None
        """The request whose body is arriving."""
        self._answering = False
        """Whether a request is being served that has to be waited for, or the other connections have their turn."""
        self._is_full = False
        """Whether answers wait in the transport for the client to read them."""
        self._is_reading = True
        self._is_closing = False
        """Whether no further request is taken."""
        self._is_half_closed = False
        """Whether the client sends nothing more, but reads."""
        self._lingered_bytes = -1
        """Bytes thrown away since everything was answered that will be; -1 before."""
        self._queue: deque[Request] | None = None
        """Requests that wait for their turn."""
        self._waiting: bytearray | None = None
        """Bytes that are parsed once there is a turn for what is in them."""
        self._watch: tuple[Request, Watcher] | None = None
        """The watch that is being served."""
        self._listing: asyncio.Task[None] | None = None
        """The listing, count or clear that is being served."""
        self._unread: list[Request] | None = None
        """Requests with large answers that the client has not read."""
        self._unread_bytes = 0
        """Bytes that the client had not read when it last read fast enough."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; called by the loop."""
        self._transport = cast("asyncio.Transport", transport)
        self.is_tls = transport.get_extra_info("sslcontext") is not None
        self._listener.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (the loop's call)
        """End; called by the loop."""
        self._transport = None
        self._is_closing = True
        self._waiting = None
        service = self._listener.service
        if self._body is not None:
            service.admission.release(self._body)
            self._body = None
        self._forget_queue()
        self._give_back()
        self._end_watch()
        if self._listing is not None:
            # It can take long, and nobody wants its answer. A clear would delete what its client sets next.
            self._listing.cancel()
        self._parser.close()
        self._listener.lost(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 (the loop's call)
        """Return the buffer that all connections share: what is in it is taken in the same step."""
        return self._listener.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take what arrived; called by the loop."""
        if self._is_closing:
            self._linger(nbytes)
            return
        listener = self._listener
        data = listener.buffer[:nbytes]
        if self._answering or self._is_full or self._waiting:
            self._wait_with(data)
            return
        if self._parser.is_fresh:
            # What came before was idleness, and not a part of the head's time.
            self._seconds = 0.0
            if nbytes <= _SLICE_BYTES and listener.short_way is not None and self._transport is not None:
                answer = listener.short_way.answer(data, listener.date, self)
                if answer:
                    self._transport.write(answer)
                    return
                if answer is not None:
                    self._answering = True
                    return
        if nbytes <= _SLICE_BYTES:
            self._feed(data)
        else:
            self._feed_slices(data)

    def take_answer(self, answer: bytes) -> bool:
        """Send an answer; see `Asker.take_answer`."""
        self._answering = False
        self._seconds = 0.0
        if self._transport is None:
            return False
        self._transport.write(answer)
        if self._waiting or self._is_half_closed or not self._is_reading:
            # What came meanwhile; there is no queue, since nothing was under way before.
            self._take_turn()
        return True

    def take_long_way(self, data: bytes) -> None:
        """Serve a request; see `Asker.take_long_way`."""
        self._answering = False
        if not self._is_closing:
            self._feed(data)
            if not self._answering:
                self._take_turn()

    def eof_received(self) -> bool:
        """Answer what is complete to a client that sends nothing more; called by the loop."""
        # TLS cannot be half closed.
        if (
            self.is_tls
            or self._lingered_bytes >= 0
            or self._watch is not None
            or self._listing is not None
            or not self._has_turns()
        ):
            return False
        self._is_half_closed = True
        return True

    def pause_writing(self) -> None:
        """Serve nothing further until the client has read; called by the loop."""
        self._is_full = True
        self._seconds = 0.0
        if self._transport is not None:
            self._unread_bytes = self._transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        """Go on; called by the loop."""
        self._is_full = False
        self._seconds = 0.0
        self._give_back()
        if self._watch is not None:
            self._watch[1].send()
        if not self._answering:
            self._go_on()

    def look(self, seconds: float) -> None:
        """End the connection where it takes too long.

        Args:
            seconds: The time since the last look.
        """
        transport, options = self._transport, self._listener.options
        if transport is None:
            return
        self._seconds += seconds
        if self._is_full:
            self._look_at_reader(transport)
        elif self._lingered_bytes >= 0:
            if self._seconds > (options.grace_seconds if transport.get_write_buffer_size() else _LINGER_SECONDS):
                transport.abort()
        elif self._answering:
            self._seconds = 0.0
        elif self._body is not None:
            self._look_at_sender(self._body)
        elif self._seconds > (options.idle_timeout_seconds if self._parser.is_fresh else options.head_timeout_seconds):
            if not self._parser.is_fresh:
                self._listener.operation.refused("head_timeout")
            self._end(lingers=False)

    def unread_bytes(self) -> int:
        """Return the bytes that wait for a client that does not read, without those that are held of the budget."""
        if not self._is_full or self._unread or self._transport is None:
            return 0
        return self._transport.get_write_buffer_size() + len(self._waiting or b"")

    def is_idle(self) -> bool:
        """Return whether no request is under way and nothing is left to be read by the client."""
        return self._parser.is_fresh and self._body is None and not self._has_turns()

    def close_if_idle(self, idle_seconds: float) -> None:
        """Close the connection where no request came for some time.

        Args:
            idle_seconds: That time.
        """
        if self._transport is not None and self.is_idle() and self._seconds >= idle_seconds:
            self._end(lingers=False)

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    def head_received(self, request: Request) -> None:
        """Admit or refuse a request; called by the parser."""
        if self._is_closing:
            return
        self._seconds = 0.0
        if self.is_tls:
            request.is_tls = True
        self._body = request
        refused = self._listener.service.admit(request, self.address)
        if refused is not None:
            self._refuse(request, refused)
        elif request.expects_continue and self._transport is not None and request.content_length != 0:
            self._transport.write(INTERIM)

    def body_received(self, data: bytes) -> None:
        """Take a piece of a body; called by the parser."""
        request = self._body
        if request is None:
            return
        request.received_bytes += len(data)
        if request.refusal is not None:
            return
        is_kept = request.verb in BODY_VERBS
        if request.content_length is None or not is_kept:
            refused = self._listener.service.admission.hold_more(request, len(data))
            if refused is not None:
                self._refuse(request, refused)
                return
        if not is_kept:
            return
        if not request.body:
            request.body = data
        else:
            if isinstance(request.body, bytes):
                request.body = bytearray(request.body)
            request.body += data

    def request_received(self) -> None:
        """Serve a complete request, or have it wait for its turn; called by the parser."""
        request, self._body = self._body, None
        self._seconds = 0.0
        if request is None:
            return
        if not request.keep_alive:
            self._is_closing = True
        if request.refusal is None:
            request.started = time.perf_counter()
            if self._answering or self._is_full or self._queue:
                self._enqueue(request)
            else:
                self._serve(request)

    def _feed(self, data: memoryview | bytes) -> None:
        try:
            self._parser.feed(data)
        except MalformedRequestError as error:
            self._refuse_malformed(error)

    def _feed_slices(self, data: memoryview | bytes) -> None:
        """Feed a long piece; what comes behind a request that has to wait waits, too."""
        start = 0
        while start < len(data):
            if self._is_closing:
                self._linger(len(data) - start)
                return
            if self._answering or self._is_full:
                self._wait_with(data[start:])
                return
            if start and self._has_had_its_turn(start):
                self._wait_with(data[start:])
                self._yield_turn()
                return
            # Of a body all that is there: no request can hide in it.
            body = self._body
            missing = 0 if body is None or body.content_length is None else body.content_length - body.received_bytes
            end = start + max(_SLICE_BYTES, missing)
            self._feed(data[start:end])
            start = end

    def _has_had_its_turn(self, taken_bytes: int) -> bool:
        body = self._body
        return body is None or (body.content_length is None and taken_bytes >= _TURN_BYTES)

    def _yield_turn(self) -> None:
        """Let the other connections go on first: one client's pipeline must not hold them up for as long as it goes on."""
        self._answering = True
        asyncio.get_running_loop().call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._answering = False
        if not self._is_full:
            self._go_on()

    def _wait_with(self, data: memoryview | bytes) -> None:
        if self._waiting is None:
            self._waiting = bytearray()
        self._waiting += data
        if len(self._waiting) > _MAX_WAITING_BYTES and self._is_reading and self._transport is not None:
            self._is_reading = False
            self._transport.pause_reading()

    def _refuse(self, request: Request, answer: Answer) -> None:
        """Answer a request whose body is not wanted, and throw the body away where it is short."""
        request.refusal = answer
        request.body = b""
        request.started = time.perf_counter()
        is_long = request.content_length is None or request.content_length > SMALL_BYTES
        # After "Expect" the client may send the body or not, so the next bytes could be a body or a request.
        if b"expect" in request.fields or is_long or answer.closes:
            request.keep_alive = False
            self._is_closing = True
        self._enqueue(request)

    def _refuse_malformed(self, error: MalformedRequestError) -> None:
        if self._is_closing:
            return
        request, self._body = self._body, None
        if request is None or request.refusal is not None:
            request = Request(b"", b"", {}, keep_alive=False, is_http_1_0=False)
        self._refuse(request, refusal(error.status, error.message, closes=True, reason=error.reason))

    def _look_at_sender(self, request: Request) -> None:
        options = self._listener.options
        if request.received_bytes - request.seen_bytes >= max(1.0, options.min_bytes_per_second * self._seconds):
            self._seconds, request.seen_bytes = 0.0, request.received_bytes
        elif self._seconds > options.grace_seconds:
            self._give_up_body(request)

    def _look_at_reader(self, transport: asyncio.Transport) -> None:
        options, unread_bytes = self._listener.options, transport.get_write_buffer_size()
        if self._unread_bytes - unread_bytes >= options.min_bytes_per_second * self._seconds:
            self._seconds, self._unread_bytes = 0.0, unread_bytes
        elif self._seconds > options.grace_seconds:
            self._listener.operation.refused("slow_reader")
            transport.abort()

    def _give_up_body(self, request: Request) -> None:
        grace = self._listener.options.grace_seconds
        rate = self._listener.options.min_bytes_per_second
        self._body = None
        if request.refusal is not None:
            self.abort()
            return
        message = f"the body did not arrive: it may stand still for {grace:g} s, and must bring {rate:,} bytes a second"
        self._refuse(request, refusal(408, message, closes=True, reason="body_timeout"))

    def _enqueue(self, request: Request) -> None:
        if self._answering or self._is_full or self._queue:
            if self._queue is None:
                self._queue = deque()
            self._queue.append(request)
        else:
            self._serve(request)

    def _serve(self, request: Request) -> None:
        service = self._listener.service
        if request.refusal is not None:
            self._send(request, request.refusal)
            return
        result = service.answer(request) if request.verb != "set" else service.begin_set(request, self._finish)
        if isinstance(result, Answer):
            self._send(request, result)
            if len(result.body) > SMALL_BYTES and not self._is_closing:
                self._yield_turn()
            return
        self._answering = True
        if result is not None:
            task = self._listener.run(self._serve_later(request, result))
            if request.verb == "keys":
                self._listing = task

    async def _serve_later(self, request: Request, answering: Coroutine[None, None, Answer]) -> None:
        try:
            try:
                answer = await answering
            except asyncio.CancelledError:
                if self._transport is None:
                    self._send(request, _ABANDONED)
                raise
            finally:
                self._listing = None
            if isinstance(answer, Watcher):
                self._begin_watch(request, answer)
            else:
                self._finish(request, answer)
        except BaseException:
            # Its client learns at once that there is no answer, in place of waiting for one.
            self._answering = False
            self._listener.service.admission.release(request)
            self.abort()
            raise

    def _begin_watch(self, request: Request, watcher: Watcher) -> None:
        """Answer with events, while what comes behind the request waits."""
        listener, transport = self._listener, self._transport
        self._watch = request, watcher
        if transport is None:
            self._end_watch()
            return
        connection = b""
        if listener.operation.access_log is not None or b"x-request-id" in request.fields:
            request.id = request_id(request.fields.get(b"x-request-id", b"").decode("latin-1"))
            connection = b"X-Request-Id: %b\r\n" % request.id.encode()
        transport.write(stream_head(listener.date, connection, EVENT_STREAM))
        watcher.begin(transport, lambda: self._is_full, self._end_watch)

    def _end_watch(self) -> None:
        """Count a watch that has ended, and close its connection."""
        if self._watch is None:
            return
        (request, watcher), self._watch = self._watch, None
        watcher.leave()
        seconds = time.perf_counter() - request.started
        self._listener.operation.answered(request, watcher, self.address, seconds, is_sent=True, bytes_out=watcher.sent_bytes)
        self._answering = False
        self._end(lingers=False)

    def _finish(self, request: Request, answer: Answer) -> None:
        """Send an answer that had to be waited for, and go on."""
        self._answering = False
        self._seconds = 0.0
        self._send(request, answer)
        if not self._is_full:
            self._go_on()

    def _go_on(self) -> None:
        """Serve what has waited for its turn, then parse what has."""
        while self._queue and not (self._answering or self._is_full):
            self._serve(self._queue.popleft())
        if self._answering or self._is_full or self._transport is None:
            return
        self._queue = None
        waiting, self._waiting = self._waiting, None
        if waiting:
            self._feed_slices(bytes(waiting))
        if self._is_half_closed and not self._has_turns():
            self._end(lingers=False)
        if not self._is_reading and len(self._waiting or b"") <= _MAX_WAITING_BYTES:
            self._is_reading = True
            if self._transport is not None:
                self._transport.resume_reading()

    def _send(self, request: Request, answer: Answer) -> None:
        listener, transport = self._listener, self._transport
        operation = listener.operation
        if request.held_bytes:
            # A set's body is stored, or was refused: nothing of it is held here any more.
            listener.service.admission.release(request)
        if transport is None:
            operation.answered(request, answer, self.address, time.perf_counter() - request.started, is_sent=False)
            return
        if len(answer.body) > SMALL_BYTES:
            answer = listener.service.admission.hold_answer(request, answer)
        closes, connection = False, b""
        if not request.keep_alive or answer.closes or listener.is_draining:
            # A stopping server answers what has come already.
            closes = not (request.keep_alive and not answer.closes and (self._queue or self._waiting))
            connection = _CLOSE if closes else b""
        elif request.is_http_1_0:
            connection = _KEEP_ALIVE
        if operation.access_log is not None or b"x-request-id" in request.fields:
            request.id = request_id(request.fields.get(b"x-request-id", b"").decode("latin-1"))
            connection += b"X-Request-Id: %b\r\n" % request.id.encode()
        answer.write(transport, listener.date, connection, without_body=request.method == b"HEAD")
        if request.held_bytes:
            if self._is_full:
                self._unread = [*(self._unread or ()), request]
            else:
                listener.service.admission.release(request)
        operation.answered(request, answer, self.address, time.perf_counter() - request.started, is_sent=True)
        if closes:
            self._end(lingers=answer.closes or listener.is_draining or self._body is not None or bool(self._waiting))

    def _end(self, *, lingers: bool) -> None:
        """Close once the client has read everything; until it closes, too, throw away what it sends, so that it can read."""
        self._is_closing = True
        transport = self._transport
        if transport is None or self._lingered_bytes >= 0:
            return
        self._seconds = 0.0
        self._lingered_bytes = 0
        self._forget_queue()
        if not lingers:
            transport.close()
            return
        self._waiting = None
        if not self._is_reading:
            self._is_reading = True
            transport.resume_reading()
        if transport.can_write_eof():
            with contextlib.suppress(OSError):
                transport.write_eof()

    def _linger(self, size_bytes: int) -> None:
        if self._lingered_bytes < 0:
            # An earlier request is not answered yet.
            return
        self._lingered_bytes += size_bytes
        if self._lingered_bytes > _MAX_LINGER_BYTES:
            self.abort()

    def _forget_queue(self) -> None:
        for request in self._queue or ():
            self._listener.service.admission.release(request)
        self._queue = None

    def _give_back(self) -> None:
        unread, self._unread = self._unread, None
        for request in unread or ():
            self._listener.service.admission.release(request)

    def _has_turns(self) -> bool:
        """Return whether something is being served or waits for its turn."""
        return bool(self._answering or self._is_full or self._queue or self._waiting)
