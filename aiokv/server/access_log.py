"""The access log: one line of JSON for each request, without values, queries or secrets."""

import logging
import os
import random
import re
import select
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Final

import orjson

from aiokv import clock as process_clock
from aiokv.backends.base import Clock
from aiokv.errors import ConfigurationError

logger = logging.getLogger("aiokv.server")

STANDARD_OUTPUT: Final = "-"
"""The path that stands for standard output."""

_ACCEPTABLE_ID = re.compile(r"[ !#-&(-~]{1,128}")
_STDOUT_DESCRIPTOR = 1
_FILE_MODE = 0o640
# A batch of lines is one write, which no other worker's lines come into.
_FILE_BATCH_BYTES = 1024 * 1024
_PIPE_BATCH_BYTES = select.PIPE_BUF
_HURRY_BYTES = 256 * 1024
_SECONDS_BETWEEN_WARNINGS = 60.0


def request_id(offered: str | None) -> str:
    """Return the id of a request, for its line in the log and for the answer.

    Args:
        offered: The request's `X-Request-Id` header, or None.

    Returns:
        The client's id where it is 1 to 128 printable ASCII characters without quotes, else a new one of 32 hex digits.
    """
    if offered is not None and _ACCEPTABLE_ID.fullmatch(offered):
        return offered
    return f"{random.getrandbits(128):032x}"


class AccessLog:
    """A log of requests that a thread writes, so that neither a slow disk nor a full pipe delays an answer.

    Lines wait in memory for `flush_seconds`, so that many go out in one write. Where they cannot be written (a full disk, a
    closed pipe) or more than `max_buffered_bytes` wait, they are dropped and counted, and a warning says so once a minute.

    Args:
        path: The file, which is appended to and made where it is absent; `-` is standard output.
        log_keys: Whether a line names the key.
        flush_seconds: How long a line may wait for others.
        max_buffered_bytes: The most that may wait.
        on_dropped: Called with the number of lines that were dropped, from any thread; it must not block.
        clock: Returns the present as seconds since the epoch; None takes `aiokv.clock.now`, looked up at each use.

    Raises:
        ConfigurationError: The file cannot be opened.
    """

    def __init__(  # noqa: PLR0913 (keywords, each with a default that serves)
        self,
        path: str,
        *,
        log_keys: bool = False,
        flush_seconds: float = 0.5,
        max_buffered_bytes: int = 4 * 1024 * 1024,
        on_dropped: Callable[[int], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._path = path
        self._log_keys = log_keys
        self._flush_seconds = flush_seconds
        self._max_buffered_bytes = max_buffered_bytes
        self._on_dropped = on_dropped
        self._clock = clock
        self._second = -1
        self._second_text = ""
        self._changed = threading.Condition()
        self._lines: list[bytes] = []
        self._buffered_bytes = 0
        self._reopening = self._closing = False
        self._dropped = 0
        self._next_warning = -float("inf")
        try:
            self._descriptor = _open(path)
        except OSError as error:
            raise ConfigurationError(f"access log {path} cannot be opened: {error.strerror}") from error
        self._is_torn = False
        self._thread = threading.Thread(target=self._run, name="aiokv-access-log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """How many lines were dropped."""
        return self._dropped

    def write(  # noqa: PLR0913 (keywords, one for each member of the line)
        self,
        *,
        request_id: str,
        address: str | None,
        account: str | None,
        verb: str,
        db_name: str | None,
        key: str | None,
        status: int,
        bytes_in: int,
        bytes_out: int,
        seconds: float,
        path: str | None = None,
    ) -> None:
        """Log one request that was answered; never block, never fail.

        Args:
            request_id: The id in the answer's `X-Request-Id`.
            address: The address of the client.
            account: The account of the token, or None.
            verb: One of `aiokv.server.statistics.VERBS`.
            db_name: The namespace, without the account, or None where the request has none.
            key: The key, or None; it is left out unless keys are logged.
            status: The status of the answer.
            bytes_in: The size of the request's body.
            bytes_out: The size of the answer's body.
            seconds: How long the request took.
            path: The path of a page of the server, or None; left out then.
        """
        members = {
            "time": self._time(),
            "request_id": request_id,
            "address": address,
            "account": account,
            "verb": verb,
            "db": db_name,
            "status": status,
            "bytes_in": bytes_in,
            "bytes_out": bytes_out,
            "ms": round(seconds * 1_000, 3),
        }
        if path is not None:
            members["path"] = path
        if self._log_keys:
            members["key"] = key
        try:
            line = orjson.dumps(members, option=orjson.OPT_APPEND_NEWLINE)
        except orjson.JSONEncodeError:
            self._drop(1, "a text is not valid Unicode")
            return
        with self._changed:
            fits = self._buffered_bytes + len(line) <= self._max_buffered_bytes and not self._closing
            if fits:
                self._lines.append(line)
                self._buffered_bytes += len(line)
                if len(self._lines) == 1 or self._buffered_bytes >= _HURRY_BYTES:
                    self._changed.notify()
        if not fits:
            self._drop(1, "what waits to be written is too much")

    def reopen(self) -> None:
        """Open the file anew, after it was renamed; return at once. Lines written before this call go to the old file."""
        with self._changed:
            self._reopening = True
            self._changed.notify()

    def close(self, timeout_seconds: float = 2.0) -> None:
        """Write what waits and close the file; safe to call twice.

        Args:
            timeout_seconds: How long the writing may take; what is left then is lost.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            with self._changed:
                lost, self._lines = len(self._lines), []
            self._drop(lost, "the last ones could not be written in time")

    def _time(self) -> str:
        now = process_clock.now() if self._clock is None else self._clock()
        second = int(now)
        if second != self._second:
            self._second, self._second_text = second, datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._second_text}.{int((now - second) * 1_000):03d}Z"

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._is_urgent())
                self._changed.wait_for(self._is_urgent, self._flush_seconds)
                lines, self._lines, self._buffered_bytes = self._lines, [], 0
                reopening, self._reopening = self._reopening, False
                closing = self._closing
            self._write_lines(lines)
            if reopening and self._path != STANDARD_OUTPUT:
                self._open_anew()
            if closing:
                if self._descriptor != _STDOUT_DESCRIPTOR:
                    os.close(self._descriptor)
                return

    def _is_urgent(self) -> bool:
        return self._reopening or self._closing or self._buffered_bytes >= _HURRY_BYTES

    def _open_anew(self) -> None:
        try:
            descriptor = _open(self._path)
        except OSError as error:
            logger.warning("access log %s cannot be opened anew, the old file is written on: %s", self._path, error.strerror)
            return
        os.close(self._descriptor)
        self._descriptor, self._is_torn = descriptor, False

    def _write_lines(self, lines: list[bytes]) -> None:
        limit = _PIPE_BATCH_BYTES if stat.S_ISFIFO(os.fstat(self._descriptor).st_mode) else _FILE_BATCH_BYTES
        written_lines = 0
        for batch in _batches(lines, limit):
            # The end of a line of which only a part could be written.
            data = b"\n" + batch if self._is_torn else batch
            written = 0
            try:
                while written < len(data):
                    written += os.write(self._descriptor, data[written:])
            except OSError as error:
                written_lines += data.count(b"\n", self._is_torn, written)
                self._is_torn = data[written - 1 : written] != b"\n" if written else self._is_torn
                self._drop(len(lines) - written_lines, error.strerror)
                return
            written_lines += batch.count(b"\n")
            self._is_torn = False

    def _drop(self, count: int, reason: str | None) -> None:
        if not count:
            return
        with self._changed:
            self._dropped += count
            if self._on_dropped is not None:
                self._on_dropped(count)
            now = process_clock.monotonic()
            warns = now >= self._next_warning
            if warns:
                self._next_warning = now + _SECONDS_BETWEEN_WARNINGS
        if warns:
            logger.warning("access log %s loses lines, %d by now: %s", self._path, self._dropped, reason)


def _open(path: str) -> int:
    if path == STANDARD_OUTPUT:
        return _STDOUT_DESCRIPTOR
    # A pipe without a reader is an error now, not a wait for one.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, _FILE_MODE)
    os.set_blocking(descriptor, True)
    return descriptor


def _batches(lines: list[bytes], limit_bytes: int) -> Iterator[bytes]:
    """Yield the lines joined, as many at a time as fit the limit, at least one."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        if batch and size + len(line) > limit_bytes:
            yield b"".join(batch)
            batch, size = [], 0
        batch.append(line)
        size += len(line)
    if batch:
        yield b"".join(batch)
