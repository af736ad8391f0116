"""The stream of `GET /watch/{db_name}` on the wire: server-sent events, for both sides.

Source: the HTML standard, section "Server-sent events", for the form.
"""

import re
from typing import Final

import orjson

from aiokv.backends.watching import Alive, Changed, Lost, WatchEvent

EVENT_STREAM: Final = "text/event-stream"
"""The media type."""

LAST_EVENT_ID: Final = "Last-Event-ID"
"""The header that says after which event the stream shall go on."""

RETRY: Final = b"retry: 1000\n\n"
"""What a stream begins with: how long a client waits before it connects again, in milliseconds."""

ALIVE: Final = b"event: alive\ndata: {}\n\n"
"""The event that comes where nothing has changed for a while."""

MAX_EVENT_BYTES: Final = 64 * 1024
"""Largest event: a key takes at most 16,000 bytes as JSON."""

_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")
_EVENT_ID = re.compile(r"[!-~]{1,128}")


def is_event_id(text: str) -> bool:
    """Return whether a text can be an event's id: 1 to 128 printable characters of ASCII without spaces."""
    return _EVENT_ID.fullmatch(text) is not None


def changed_event(change: Changed, event_id: str) -> bytes:
    """Build the event of a change.

    Args:
        change: What changed.
        event_id: The id of the event.

    Returns:
        The event, with its empty line.
    """
    data = orjson.dumps({"key": change.key, "delete": True} if change.is_delete else {"key": change.key})
    return b"id: %b\nevent: changed\ndata: %b\n\n" % (event_id.encode(), data)


def lost_event(event_id: str) -> bytes:
    """Build the event that says that changes may be missing.

    Args:
        event_id: The id after which the stream goes on.

    Returns:
        The event, with its empty line.
    """
    return b"id: %b\nevent: lost\ndata: {}\n\n" % event_id.encode()


class EventParser:
    """Bytes of a stream in, its events out.

    Attributes:
        last_event_id: The id to send as `Last-Event-ID` when the stream breaks; "" where there was none. It is that of the
            last event that was returned.
        retry_seconds: How long the server asks to wait before that; None where it did not say.
    """

    def __init__(self) -> None:
        self.last_event_id = ""
        self.retry_seconds: float | None = None
        self._rest = b""
        self._is_first = True
        self._size_bytes = 0
        self._event = b""
        self._data: list[bytes] = []
        self._next_id = ""

    def feed(self, data: bytes) -> list[WatchEvent]:
        """Parse what arrived.

        Args:
            data: The next bytes of the stream.

        Returns:
            The events that are complete; unknown ones and comments are left out.

        Raises:
            ValueError: It is no such stream, or an event is too large; the parser is of no use any more.
        """
        if b"\n" not in data and b"\r" not in data and len(self._rest) + len(data) <= MAX_EVENT_BYTES:
            self._rest += data
            return []
        *lines, self._rest = _LINE_END.split(self._rest + data)
        if self._is_first and (lines or self._rest[:1] not in {b"", b"\xef"}):
            self._is_first = False
            if lines:
                lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        events: list[WatchEvent] = []
        for line in lines:
            self._size_bytes += len(line) + 1
            if self._size_bytes > MAX_EVENT_BYTES:
                break
            if line:
                self._take_field(line)
            else:
                event = self._finish()
                if event is not None:
                    events.append(event)
        if self._size_bytes + len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of the stream is larger than {MAX_EVENT_BYTES:,} bytes")
        return events

    def _take_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value
        elif name == b"id":
            text = value.decode("latin-1")
            self._next_id = text if is_event_id(text) else ""
        elif name == b"retry" and value.isdigit() and len(value) < 6:  # noqa: PLR2004 (below 100 seconds)
            self.retry_seconds = int(value) / 1_000

    def _finish(self) -> WatchEvent | None:
        kind, data = self._event, b"\n".join(self._data)
        self._event, self._data, self._size_bytes = b"", [], 0
        event: WatchEvent | None = None
        if kind == b"changed":
            event = _parse_changed(data)
        elif kind == b"lost":
            event = Lost()
        elif kind == b"alive":
            event = Alive()
        self.last_event_id = self._next_id
        return event


def _parse_changed(data: bytes) -> Changed:
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        parsed = None
    key, is_delete = (parsed.get("key"), parsed.get("delete", False)) if isinstance(parsed, dict) else (None, False)
    if not isinstance(key, str) or not key or not isinstance(is_delete, bool):
        raise ValueError("an event of the stream must name the key that changed")
    return Changed(key, is_delete)
