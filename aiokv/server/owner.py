"""`Owner`: what a connection belongs to."""

from asyncio import Task
from collections.abc import Coroutine
from typing import Any, Protocol

from aiokv.server.operation import Operation
from aiokv.server.options import ServerOptions
from aiokv.server.service import Service
from aiokv.server.short_way import ShortWay


class Owner(Protocol):
    """What all connections of one process share; the listener is one.

    Attributes:
        service: Answers the requests.
        operation: Counts and logs what happens.
        options: The bounds.
        buffer: What every connection reads into.
        short_way: The short way of plain requests; None where all go the long way.
        date: The lines that every answer bears: its date, and the extensions.
        is_draining: Whether every answer closes its connection.
    """

    service: Service
    operation: Operation
    options: ServerOptions
    buffer: memoryview
    short_way: ShortWay | None
    date: bytes
    is_draining: bool

    def run(self, serving: Coroutine[None, None, None]) -> Task[None]:
        """Serve in a task what has to be waited for; return the task."""
        ...

    def opened(self, connection: Any) -> None:
        """Take note of a connection."""
        ...

    def lost(self, connection: Any) -> None:
        """Take note of a connection's end."""
        ...
