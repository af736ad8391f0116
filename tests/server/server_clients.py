"""A client that sends exactly what it is given, and what it was answered."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import NamedTuple

import orjson

from aiokv.backends.base import Backend, WouldWaitError
from aiokv.backends.memory import MemoryBackend
from aiokv.server import running_server
from aiokv.server.options import ServerOptions

CHUNKED = "Transfer-Encoding: chunked"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def value(self) -> object:
        assert (self.status, self.headers["content-type"]) == (200, "application/json")
        return orjson.loads(self.body)["value"]

    def error(self) -> str:
        """Return the message of an error, whose form is the same for all."""
        assert self.status >= 400
        assert self.headers["content-type"] == "application/json"
        content = orjson.loads(self.body)
        assert list(content) == ["error"]
        assert isinstance(content["error"], str)
        assert content["error"]
        return content["error"]


class Connection:
    """A client that sends exactly what it is given."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self._writer.write(part)
        await self._writer.drain()

    async def answer(self) -> Answer:
        async with asyncio.timeout(15):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("ascii")
            first, *lines = head.rstrip("\r\n").split("\r\n")
            headers = {name.lower(): text for name, _, text in (line.partition(": ") for line in lines)}
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        return Answer(int(first.split()[1]), headers, body)

    async def ask(self, *parts: bytes) -> Answer:
        await self.send(*parts)
        return await self.answer()

    async def rest(self) -> bytes:
        """Read until the server closes."""
        async with asyncio.timeout(15):
            return await self._reader.read()


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncGenerator[Connection]:
    host, _, port = address.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(backend: Backend, **bounds: float) -> AsyncGenerator[str]:
    """Serve with other bounds than the defaults."""
    async with running_server(backend, drain_seconds=1, options=ServerOptions(**bounds)) as address:
        yield address


def head(method: str, target: str | bytes, *headers: str, host: str = "localhost") -> bytes:
    raw_target = target if isinstance(target, bytes) else target.encode("ascii")
    rest = "".join(f"{line}\r\n" for line in (f"Host: {host}", *headers))
    return b"%s %s HTTP/1.1\r\n%s\r\n" % (method.encode(), raw_target, rest.encode())


def put(target: str | bytes, body: bytes, *headers: str) -> bytes:
    return head("PUT", target, f"Content-Length: {len(body)}", *headers) + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class SlowBackend(MemoryBackend):
    """A backend whose reads wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.let_go = asyncio.Event(), asyncio.Event()

    def get_now(self, db_name: str, key: str) -> str | None:  # noqa: ARG002
        raise WouldWaitError

    async def get(self, db_name: str, key: str) -> str | None:
        self.begun.set()
        await self.let_go.wait()
        return MemoryBackend.get_now(self, db_name, key)
