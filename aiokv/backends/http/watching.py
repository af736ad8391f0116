"""Watches over HTTP: server-sent events on connections of their own, which are made again whenever they break."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Protocol

from aiokv.backends.base import is_patient
from aiokv.backends.http.retry import has_backoff
from aiokv.backends.http.stream import Stream
from aiokv.backends.watching import Absence, Lost, Watch
from aiokv.errors import (
    AioKVError,
    CallError,
    ConfigurationError,
    ConnectError,
    ResponseError,
    StoreClosedError,
    UnsupportedError,
)
from aiokv.event_wire import EventParser
from aiokv.telemetry import detached
from aiokv.wire import TRANSIENT_STATUSES

logger = logging.getLogger("aiokv")

SILENCE_SECONDS = 10.0
"""After so long without a heartbeat, changes may be missing: the watch says `Lost` and makes a new connection."""

# How long to wait before a new connection at most, unless the server says otherwise; it doubles up to the cap.
_MIN_RETRY_SECONDS = 0.1
_RETRY_SECONDS = 1.0
_RETRY_CAP_SECONDS = 5.0
_SERVER_ERRORS = 500
_NOT_IMPLEMENTED = 501


class Streams(Protocol):
    """What opens the streams."""

    loop: asyncio.AbstractEventLoop
    host: str
    sleep: Callable[[float], Awaitable[None]]

    async def open_watch(self, db_name: str, last_event_id: str) -> Stream:
        """Open a stream of the changes of a namespace."""
        ...


class Watches:
    """The watches of one backend that have not ended."""

    def __init__(self) -> None:
        self._open: set[_RemoteWatch] = set()
        self._absence: Absence | None = None

    def begin(self, streams: Streams, db_name: str) -> Watch:
        """Begin a watch.

        Args:
            streams: Opens its streams.
            db_name: The namespace.

        Returns:
            The watch.
        """
        if self._absence is None:
            self._absence = Absence(logger, streams.host)
        remote = _RemoteWatch(streams, db_name, self._absence)
        self._open.add(remote)
        remote.task.add_done_callback(lambda _: self._open.discard(remote))
        return remote.watch

    async def aclose(self) -> None:
        """End every watch."""
        remotes = list(self._open)
        for remote in remotes:
            remote.watch.close()
        if remotes:
            await asyncio.wait([remote.task for remote in remotes])


class _RemoteWatch:
    """One watch: a task that reads its stream, and opens the next one."""

    def __init__(self, streams: Streams, db_name: str, absence: Absence) -> None:
        self._streams = streams
        self._db_name = db_name
        self._absence = absence
        # After which event the next stream shall go on; "" where the server has not named one.
        self._last_event_id = ""
        self._retry_seconds = _RETRY_SECONDS
        self._failures = 0
        # When the last event came; None before the first one.
        self._heard_at: float | None = None
        self._is_silent = False
        self._timer: asyncio.TimerHandle | None = None
        self.watch = Watch(on_close=self._end)
        self.task = streams.loop.create_task(self._run(), name="aiokv watch")

    def _end(self, _: Watch) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if asyncio.current_task() is not self.task:
            self.task.cancel()

    async def _run(self) -> None:
        # It lasts longer than the call that began it.
        is_patient.set(True)
        detached()
        try:
            while not self.watch.is_closed:
                error = await self._follow()
                if isinstance(error, StoreClosedError):
                    break
                if error is not None and _is_final(error):
                    self.watch.fail(error)
                    break
                await self._pause(error)
        except Exception as error:
            logger.exception("a watch failed")
            self.watch.fail(error)
        finally:
            self.watch.close()

    async def _follow(self) -> AioKVError | None:
        """Read a stream to its end; return why it broke or could not be opened, None where the server ended it."""
        try:
            stream = await self._streams.open_watch(self._db_name, self._last_event_id)
        except (CallError, ConfigurationError) as error:
            return error
        parser, must_say_lost, loop = EventParser(), not self._last_event_id, self._streams.loop
        heard_at = loop.time()
        try:
            # Comments and pieces of an event are no sign that the server tells of changes.
            while data := await stream.read(heard_at + SILENCE_SECONDS - loop.time()):
                events = parser.feed(data)
                if not events:
                    continue
                if must_say_lost and not isinstance(events[0], Lost):
                    # The server does not know what this watch has missed.
                    self.watch.notify(Lost())
                must_say_lost = False
                heard_at = loop.time()
                for event in events:
                    self.watch.notify(event)
                self._hear(parser)
        except CallError as error:
            return error
        except ValueError as error:
            # Asked for once more, the same events would come.
            self._last_event_id = ""
            return ResponseError(f"the stream of changes cannot be read: {error}", transient=True)
        finally:
            stream.close()
        return None

    def _hear(self, parser: EventParser) -> None:
        self._last_event_id = parser.last_event_id or self._last_event_id
        if parser.retry_seconds is not None:
            self._retry_seconds = max(parser.retry_seconds, _MIN_RETRY_SECONDS)
        self._failures = 0
        self._is_silent = False
        is_first, self._heard_at = self._heard_at is None, self._streams.loop.time()
        if is_first:
            self._check_silence()

    def _check_silence(self) -> None:
        """Say that changes may be missing where nothing has come for too long, whether or not there is a stream."""
        loop, heard_at = self._streams.loop, self._heard_at or 0.0
        silent_at = heard_at + SILENCE_SECONDS
        if loop.time() < silent_at:
            self._timer = loop.call_at(silent_at, self._check_silence)
            return
        if not self._is_silent:
            self._is_silent = True
            self.watch.notify(Lost())
        self._timer = loop.call_later(SILENCE_SECONDS, self._check_silence)

    async def _pause(self, error: AioKVError | None) -> None:
        """Wait before the next stream, at random: a server that restarts has many watches."""
        self._failures += 1
        bound = min(self._retry_seconds * 2.0 ** min(self._failures - 1, 16), max(_RETRY_CAP_SECONDS, self._retry_seconds))
        asked = error.retry_after if isinstance(error, CallError) else None
        if error is not None and self._heard_at is None:
            self._absence.warn(error.reason if isinstance(error, CallError) else str(error))
        seconds = (asked or 0.0) + random.uniform(0.0, bound)  # noqa: S311 (spreads load, guards nothing)
        logger.debug("a watch connects again in %.2f s: %s", seconds, error or "the server ended the stream")
        await self._streams.sleep(seconds if has_backoff() else 0.0)


def _is_final(error: AioKVError) -> bool:
    """Return whether another stream would fail, too."""
    if not isinstance(error, CallError) or isinstance(error, UnsupportedError):
        return True
    if error.status is None:
        # Such as a certificate that is not trusted.
        return isinstance(error, ConnectError) and not error.transient
    return error.status == _NOT_IMPLEMENTED or (error.status < _SERVER_ERRORS and error.status not in TRANSIENT_STATUSES)
