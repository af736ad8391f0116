"""`Watches`: one watch of the backend for each namespace, told to any number of clients.

Nothing is queued for a client. A namespace keeps its events of late, within bounds, and each client has a place among them; one
that falls behind what is kept is told that it lost some. A client that comes back goes on from its place, too.
"""

import asyncio
import contextlib
import random
import socket
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final

from aiokv.backends.capabilities import WatchBackend
from aiokv.backends.watching import HEARTBEAT_SECONDS, MAX_QUEUED_CHANGES, Alive, Lost, Watch
from aiokv.errors import StoreClosedError
from aiokv.event_wire import ALIVE, RETRY, changed_event, lost_event
from aiokv.server.answers import RETRY_SOON, Answer, refusal

LINGER_SECONDS: Final = 30.0
"""How long a namespace that nobody watches any more is still listened to, for clients that come back."""

_MAX_LINGERING = 64
_MAX_KEPT_EVENTS = MAX_QUEUED_CHANGES
_MAX_KEPT_BYTES = 1024 * 1024
# Of all namespaces together; beyond it each has a share of it.
_MAX_ALL_KEPT_BYTES = 32 * 1024 * 1024
# What an object of the interpreter takes beside its bytes.
_EVENT_BYTES = 48
_PIECE_BYTES = 32 * 1024
_EVENTS_AT_ONCE = 64
_REFUSED_SECONDS = 1.0
_MAX_ID_DIGITS = 18


class Watcher(Answer):
    """The answer of a watch: events until the client leaves, or `end`.

    Args:
        account: Whose watch it is.
        may_go_on: Returns whether the client may still watch; asked every few seconds.

    Attributes:
        place: The number of the event that was sent last; -1 where none was.
        sent_bytes: Bytes of events.
    """

    def __init__(self, account: str, may_go_on: Callable[[], bool]) -> None:
        super().__init__(200, b"")
        self.account = account
        self.may_go_on = may_go_on
        self.place = -1
        self.sent_bytes = 0
        self._namespace: _Namespace | None = None
        self._transport: asyncio.Transport | None = None
        self._is_full: Callable[[], bool] = bool
        self._on_end: Callable[[], object] = bool

    def join(self, namespace: "_Namespace", place: int) -> None:
        """Take a place in a namespace; events come once `begin` is called."""
        self._namespace, self.place = namespace, place
        namespace.watchers[self] = None

    def begin(self, transport: asyncio.Transport, is_full: Callable[[], bool], on_end: Callable[[], None]) -> None:
        """Send events from now on; the head has been written.

        Args:
            transport: The client's.
            is_full: Returns whether the client has to read first; call `send` when it has.
            on_end: Called once the last byte is written, where the server ends the watch.
        """
        self._transport, self._is_full, self._on_end = transport, is_full, on_end
        _expect_signs_of_life(transport)
        self._write(RETRY)
        if self._namespace is None:
            # It has ended meanwhile.
            self.end()
        else:
            self.send()

    def send(self) -> None:
        """Send what the client has not got, as far as it reads."""
        namespace = self._namespace
        if namespace is None or self._transport is None:
            return
        while self.place < namespace.number and not self._is_full():
            self.place, events = namespace.events_after(self.place)
            self._write(events)

    def send_alive(self) -> None:
        """Tell a client that has everything that nothing is missing."""
        namespace = self._namespace
        if self._transport is not None and namespace is not None and self.place == namespace.number and not self._is_full():
            self._write(ALIVE)

    def leave(self) -> None:
        """Give up the place; safe to call twice."""
        namespace, self._namespace = self._namespace, None
        self._transport = None
        if namespace is not None:
            namespace.left(self)

    def end(self) -> None:
        """End the stream, so that the client comes again or goes elsewhere."""
        transport, on_end = self._transport, self._on_end
        self.leave()
        if transport is not None:
            transport.write(b"0\r\n\r\n")
            on_end()

    def _write(self, events: bytes) -> None:
        if self._transport is not None:
            self.sent_bytes += len(events)
            self._transport.write(b"%x\r\n%b\r\n" % (len(events), events))


class Watches:
    """The watches of one process.

    Args:
        backend: What tells of changes; None where it cannot.
        max_watches: Watches at once.
        max_watches_per_account: Watches of one account at once.
        answer_fault: Logs an error of the backend, and makes the answer of it.
    """

    def __init__(
        self,
        backend: WatchBackend | None,
        max_watches: int,
        max_watches_per_account: int,
        answer_fault: Callable[[Exception], Answer],
    ) -> None:
        self._backend = backend
        self._answer_fault = answer_fault
        self._max_watches = max_watches
        self._max_of_account = max_watches_per_account
        self._by_account: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.namespaces: dict[str, _Namespace] = {}
        self.count = 0
        """How many watches there are."""
        self.kept_bytes = 0
        """Bytes of events that the namespaces keep."""
        self.is_closed = False

    def open(self, account: str, db_name: str, last_event_id: str, may_go_on: Callable[[], bool]) -> Answer:
        """Begin a watch.

        Args:
            account: Whose it is.
            db_name: The namespace, the account included.
            last_event_id: The id of the event after which it shall go on; "" where there is none.
            may_go_on: Returns whether the client may still watch.

        Returns:
            A `Watcher`, to `begin` or to `leave`; or the refusal where there are as many as there may be, or the backend cannot
            tell of changes now.
        """
        if self.is_closed or self._backend is None:
            return refusal(503, "the server is stopping; come again", RETRY_SOON, closes=True)
        if self.count >= self._max_watches:
            return refusal(503, f"the server has its {self._max_watches:,} watches", RETRY_SOON, reason="watches")
        of_account = self._by_account.get(account, 0)
        if of_account >= self._max_of_account:
            return refusal(429, f"the account has its {self._max_of_account:,} watches", RETRY_SOON, reason="watches")
        namespace = self.namespaces.get(db_name)
        if namespace is None:
            try:
                watch = self._backend.watch(db_name)
            except Exception as error:  # noqa: BLE001 (every fault becomes an answer)
                return self._answer_fault(error)
            namespace = self.namespaces[db_name] = _Namespace(self, db_name)
            namespace.task = asyncio.get_running_loop().create_task(namespace.read(watch))
            self._tasks.add(namespace.task)
            namespace.task.add_done_callback(self._tasks.discard)
        if namespace.refusal is not None:
            return namespace.refusal
        self.count += 1
        self._by_account[account] = of_account + 1
        watcher = Watcher(account, may_go_on)
        watcher.join(namespace, namespace.place_of(last_event_id))
        return watcher

    def left(self, account: str) -> None:
        """Take note that a watch has ended; called by its namespace."""
        self.count -= 1
        of_account = self._by_account[account] - 1
        if of_account:
            self._by_account[account] = of_account
        else:
            del self._by_account[account]

    def share_bytes(self) -> int:
        """Return how many bytes of events a namespace may keep."""
        if self.kept_bytes <= _MAX_ALL_KEPT_BYTES:
            return _MAX_KEPT_BYTES
        return min(_MAX_KEPT_BYTES, _MAX_ALL_KEPT_BYTES // len(self.namespaces))

    def linger(self, namespace: "_Namespace") -> None:
        """Listen on for a while where nobody watches a namespace any more."""
        idle = [other for other in self.namespaces.values() if not other.watchers]
        if self.is_closed or len(idle) > _MAX_LINGERING:
            self.discard(namespace)
        else:
            namespace.expire_after(LINGER_SECONDS)

    def fail(self, namespace: "_Namespace", error: Exception) -> None:
        """End the watches of a namespace whose changes are no longer told of; refuse others for a moment."""
        namespace.refusal = self._answer_fault(error)
        namespace.forget_events()
        namespace.end_all()
        namespace.expire_after(_REFUSED_SECONDS)

    def discard(self, namespace: "_Namespace") -> None:
        """Listen to a namespace no more."""
        if self.namespaces.get(namespace.db_name) is namespace:
            del self.namespaces[namespace.db_name]
        namespace.close()

    def close(self) -> None:
        """End every watch; safe to call twice."""
        self.is_closed = True
        for namespace in list(self.namespaces.values()):
            namespace.end_all()
            self.discard(namespace)

    async def aclose(self) -> None:
        """End every watch, and wait until the backend's watches are closed."""
        self.close()
        if self._tasks:
            await asyncio.wait(self._tasks)


class _Namespace:
    """A namespace that is watched: its events of late, and who gets them."""

    def __init__(self, watches: Watches, db_name: str) -> None:
        self._watches = watches
        self.db_name = db_name
        self.watchers: dict[Watcher, None] = {}
        self.number = -1
        """The number of the last event; -1 until the backend's watch has begun."""
        self.refusal: Answer | None = None
        """What new watches are answered with, where the backend's watch has ended."""
        self.task: asyncio.Task[None] | None = None
        self._id = f"{random.getrandbits(64):016x}"  # Not of this process alone: another one's numbers mean nothing here.
        self._events: deque[bytes] = deque()
        self._kept_bytes = 0
        self._piece = (-2, -2, b"")
        self._is_alive = False
        self._check_at = 0.0
        self._flushing: asyncio.Handle | None = None
        self._expiring: asyncio.TimerHandle | None = None

    async def read(self, watch: Watch) -> None:
        """Pass on what the backend tells, until its watch ends."""
        error: Exception = StoreClosedError("the store tells of no more changes")
        try:
            async with watch:
                read = 0
                async for event in watch:
                    if isinstance(event, Alive):
                        self._is_alive = True
                    elif isinstance(event, Lost):
                        self.forget_events()
                        self.number += 1
                    else:
                        self.number += 1
                        self._keep(changed_event(event, f"{self._id}-{self.number}"))
                    if self._flushing is None:
                        self._flushing = asyncio.get_running_loop().call_soon(self._flush)
                    read += 1
                    if not read % _EVENTS_AT_ONCE:
                        await asyncio.sleep(0)
        except Exception as failure:  # noqa: BLE001 (every fault becomes the end of the streams)
            error = failure
        self._watches.fail(self, error)

    def place_of(self, event_id: str) -> int:
        """Return the number of an event that is known here, else -1."""
        name, _, number = event_id.rpartition("-")
        if name != self._id or not number.isdigit() or len(number) > _MAX_ID_DIGITS:
            return -1
        place = int(number)
        return place if max(0, self._first()) <= place <= self.number else -1

    def events_after(self, place: int) -> tuple[int, bytes]:
        """Return what comes behind a place, at most a piece of it, and the place behind that."""
        first = self._first()
        if place < first:
            return self.number, lost_event(f"{self._id}-{self.number}")
        start, end, piece = self._piece
        if start != place:
            events, size = [], 0
            for event in islice(self._events, place - first, None):
                events.append(event)
                size += len(event)
                if size >= _PIECE_BYTES:
                    break
            end, piece = place + len(events), b"".join(events)
            self._piece = place, end, piece
        return end, piece

    def left(self, watcher: Watcher) -> None:
        """Take note that a watcher has left."""
        del self.watchers[watcher]
        self._watches.left(watcher.account)
        if not self.watchers and self.refusal is None:
            self._watches.linger(self)

    def expire_after(self, seconds: float) -> None:
        """Be discarded later, where nobody watches then."""
        if self._expiring is not None:
            self._expiring.cancel()
        self._expiring = asyncio.get_running_loop().call_later(seconds, self._expire)

    def end_all(self) -> None:
        """End the streams of all watchers."""
        for watcher in list(self.watchers):
            watcher.end()

    def forget_events(self) -> None:
        """Keep nothing: a watcher that is behind has lost something."""
        self._events.clear()
        self._watches.kept_bytes -= self._kept_bytes
        self._kept_bytes = 0
        self._piece = (-2, -2, b"")

    def close(self) -> None:
        """Listen no more."""
        self.forget_events()
        for handle in (self._flushing, self._expiring):
            if handle is not None:
                handle.cancel()
        if self.task is not None:
            self.task.cancel()

    def _first(self) -> int:
        """Return the first place after which nothing is missing."""
        return self.number - len(self._events)

    def _keep(self, event: bytes) -> None:
        self._events.append(event)
        self._add_bytes(len(event) + _EVENT_BYTES)
        most = self._watches.share_bytes()
        while self._kept_bytes > most or len(self._events) > _MAX_KEPT_EVENTS:
            self._add_bytes(-len(self._events.popleft()) - _EVENT_BYTES)

    def _add_bytes(self, size: int) -> None:
        self._kept_bytes += size
        self._watches.kept_bytes += size

    def _flush(self) -> None:
        self._flushing = None
        is_alive, self._is_alive = self._is_alive, False
        now = asyncio.get_running_loop().time()
        is_time_to_check = now >= self._check_at
        if is_time_to_check:
            self._check_at = now + HEARTBEAT_SECONDS
        for watcher in list(self.watchers):
            if is_time_to_check and not watcher.may_go_on():
                watcher.end()
                continue
            watcher.send()
            if is_alive:
                watcher.send_alive()

    def _expire(self) -> None:
        if not self.watchers:
            self._watches.discard(self)


def _expect_signs_of_life(transport: asyncio.Transport) -> None:
    """Have the system end a connection whose other end no longer confirms what it gets."""
    connected = transport.get_extra_info("socket")
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if connected is not None and option is not None:
        with contextlib.suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, option, int(LINGER_SECONDS * 1_000))
