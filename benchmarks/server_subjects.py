"""Servers that answer every request with one constant: a bare protocol, and an ASGI app for other servers to run."""

import argparse
import asyncio
import importlib.util
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httptools

BODY = b'{"value":"%b"}' % (b"x" * 100)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)

Message = MutableMapping[str, Any]


async def hello(scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:  # noqa: ARG001 (ASGI)
    """Answer as the smallest ASGI app does."""
    if scope["type"] == "http":
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": BODY})


class Floor(asyncio.Protocol):
    """The least that a server in Python does: it parses a request, and looks at nothing of it."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; called by the loop."""
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Parse; called by the loop."""
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Answer; called by the parser."""
        self.transport.write(ANSWER)


async def serve(port: int) -> None:
    """Serve until the process is ended."""
    server = await asyncio.get_running_loop().create_server(Floor, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    """Run the floor, on uvloop where it is installed and wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--no-uvloop", action="store_true")
    options = parser.parse_args()
    factory = None
    if importlib.util.find_spec("uvloop") is not None and not options.no_uvloop:
        from uvloop import new_event_loop as factory  # noqa: PLC0415 (an extra)
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(options.port))


if __name__ == "__main__":
    main()
