"""A client of the extensions that sees every byte, and one that reads a watch."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import orjson
from server_clients import Answer, connected, head

from aiokv.backends.watching import Alive, Changed, WatchEvent
from aiokv.event_wire import EventParser
from aiokv.server.access import AccessFile
from aiokv.server.access_file import add_key

# Words, since a `Lost` and an `Alive` are equal.
LOST, ALIVE = "lost", "alive"
Seen = Changed | str | None

EXTENSIONS = "batch, scan, claims, renew, watch"


def post(db_name: str, body: object, *headers: str) -> bytes:
    """Return the request of a batch."""
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return head("POST", f"/batch/{db_name}", f"Content-Length: {len(data)}", *headers) + data


def content(answer: Answer, status: int = 200) -> dict[str, object]:
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    value: dict[str, object] = orjson.loads(answer.body)
    return value


def bearer(path: Path, account: str, *, read_only: bool = False, db_patterns: tuple[str, ...] | None = None) -> str:
    """Make a key, and return the header of a token for it."""
    key = add_key(path, account, read_only=read_only, db_patterns=db_patterns)
    issued = AccessFile(path).issue_token(f"Key {key}")
    assert issued is not None
    return f"Authorization: Bearer {issued.token}"


class Stream:
    """A watch: its head, and its events one after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.status = 0
        self.headers: dict[str, str] = {}
        self.parser = EventParser()
        self.is_ended = False
        self._events: list[WatchEvent] = []

    async def begin(self) -> None:
        async with asyncio.timeout(15):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("ascii").rstrip("\r\n").split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): text for name, _, text in (line.partition(": ") for line in lines)}

    async def chunk(self) -> bytes:
        """Read one chunk; b"" at a clean end of the body."""
        async with asyncio.timeout(15):
            size = int(await self.reader.readline(), 16)
            data = await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
        return data

    async def next(self) -> Seen:
        """Return the next event but `ALIVE`; None at a clean end."""
        while (event := await self.next_of_all()) == ALIVE:
            pass
        return event

    async def next_of_all(self) -> Seen:
        while not self._events:
            data = await self.chunk()
            if not data:
                self.is_ended = True
                return None
            self._events = self.parser.feed(data)
        event = self._events.pop(0)
        return event if isinstance(event, Changed) else ALIVE if isinstance(event, Alive) else LOST

    async def take(self, count: int) -> Sequence[Seen]:
        return [await self.next() for _ in range(count)]


@contextlib.asynccontextmanager
async def watching(address: str, db_name: str, *headers: str, limit: int = 64 * 1024) -> AsyncGenerator[Stream]:
    host, _, port = address.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=limit)
    stream = Stream(reader, writer)
    writer.write(head("GET", f"/watch/{db_name}", *headers))
    try:
        await stream.begin()
        yield stream
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def ask(address: str, *parts: bytes) -> Answer:
    async with connected(address) as client:
        return await client.ask(*parts)
