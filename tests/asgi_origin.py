"""An ASGI application that says what it sends, and a client of ASGI applications."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import unquote

Headers = Iterable[tuple[str, str]]


class Origin:
    """An ASGI application that answers with what it is told to, and counts its calls."""

    def __init__(self, headers: Headers = (), status: int = 200, bodies: Iterable[bytes] = (b"body",)) -> None:
        self.headers = list(headers)
        self.status = status
        self.bodies = list(bodies)
        self.requests: list[dict[str, str]] = []
        self.gate: asyncio.Event | None = None
        self.after: Callable[[], Awaitable[None]] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests.append({name.decode(): value.decode() for name, value in scope["headers"]})
        number = len(self.requests)
        if self.gate is not None:
            await self.gate.wait()
        request = await receive()
        assert request["type"] == "http.request"
        headers = [(name.encode(), value.encode()) for name, value in [*self.headers, ("X-Call", str(number))]]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for index, body in enumerate(self.bodies):
            await send(
                {"type": "http.response.body", "body": body + request["body"], "more_body": index + 1 < len(self.bodies)}
            )
        if self.after is not None:
            await self.after()


class Answer:
    def __init__(self, messages: list[Any]) -> None:
        self.messages = messages
        (start,) = (one for one in messages if one["type"] == "http.response.start")
        self.status = start["status"]
        self.headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        self.body = b"".join(one.get("body", b"") for one in messages if one["type"] == "http.response.body")
        assert not messages[-1].get("more_body")


async def ask(app: Any, path: str = "/", headers: Headers = (), method: str = "GET", body: bytes = b"") -> Answer:
    target, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "scheme": "http",
        "path": unquote(target),
        "raw_path": target.encode(),
        "query_string": query.encode(),
        "headers": [(b"host", b"example.com"), *((name.encode(), value.encode()) for name, value in headers)],
        "extensions": {"http.response.pathsend": {}},
    }
    messages: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    await app(scope, receive, send)
    return Answer(messages)
