"""What a supervisor hands to a worker, and the bytes that the two exchange."""

import os
import socket
from collections.abc import MutableMapping
from typing import Any, Self

import orjson

from aiokv.record import Record
from aiokv.server.options import ServerOptions

READY = b"R"
"""Worker to supervisor: connections are accepted."""
ALIVE = b"."
"""Worker to supervisor, every `ALIVE_SECONDS`: the event loop turns."""
ALIVE_SECONDS = 1.0
OPEN = b"o"
"""Supervisor to worker: another worker has opened the store, so it is in order; open it too."""
DRAIN = b"d"
"""Supervisor to worker: finish what is under way, and end. The channel's end means the same: the supervisor is gone."""
ABORT = b"a"
"""Supervisor to worker: end at once."""
RELOAD = b"r"
"""Supervisor to worker: read access file and certificate again, open the log file again."""

_VARIABLE = "AIOKV_WORKER"


class Seat(Record):
    """A worker's place: everything but the options is a number of a descriptor or a row.

    Args:
        options: The server's options, as the supervisor has read them.
        channel: The worker's end of the channel.
        listeners: The listening sockets.
        statistics: A file in memory with a row of counters for each worker; None where there is none. Whoever maps it gives it
            its size.
        row: The worker's row; no other living process has it.
        rows: How many rows there are.
        waits: Whether the store is to be opened at `OPEN` alone.
    """

    options: dict[str, Any]
    channel: int
    listeners: tuple[int, ...]
    statistics: int | None
    row: int
    rows: int
    waits: bool = False

    def put(self, environment: MutableMapping[str, str]) -> None:
        """Write the seat into a worker's environment.

        Args:
            environment: The environment.
        """
        environment[_VARIABLE] = orjson.dumps(self.__dict__).decode()

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> Self | None:
        """Return this process's seat, and remove it from the environment: child processes do not see it.

        Args:
            environment: The environment.

        Returns:
            The seat, or None where this process is no worker.
        """
        text = environment.pop(_VARIABLE, None)
        if text is None:
            return None
        fields = orjson.loads(text)
        seat = cls(**{**fields, "listeners": tuple(fields["listeners"])})
        for descriptor in seat.descriptors:
            os.set_inheritable(descriptor, False)
        return seat

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptors that the worker inherits."""
        shared = () if self.statistics is None else (self.statistics,)
        return (self.channel, *self.listeners, *shared)

    @property
    def server_options(self) -> ServerOptions:
        """The server's options."""
        return ServerOptions(**self.options)

    def open_channel(self) -> socket.socket:
        """Return the worker's end of the channel, which never blocks."""
        channel = socket.socket(fileno=self.channel)
        channel.setblocking(False)
        return channel

    def open_listeners(self) -> list[socket.socket]:
        """Return the listening sockets."""
        return [socket.socket(fileno=descriptor) for descriptor in self.listeners]
