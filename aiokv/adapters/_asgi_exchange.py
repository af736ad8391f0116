"""One call of an ASGI application by the cache: its response becomes known as text, or goes on to the client."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from aiokv.adapters._asgi_responses import Message, Rules, Send

logger = logging.getLogger("aiokv")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# The loop holds its tasks weakly.
_running: "set[asyncio.Task[None]]" = set()


class Exchange:
    """One call of the application: its response is kept to be shared, or passed on as it comes."""

    def __init__(self, app: App, scope: Scope, receive: Receive, send: Send, rules: Rules) -> None:
        self._app = app
        self._scope = scope
        self._receive_on = receive
        self._send_on = send
        self._rules = rules
        self._has_received = False
        self._start: Message = {}
        self._body: list[bytes] = []
        self._size_bytes = 0
        self._passes = False
        self._session = ""
        self._known = asyncio.Event()
        # Whether the caller takes a response that is passed on; it knows only when its call of the cache has ended.
        self._taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self.text: str | None = None
        # Whether its caller got an older response.
        self.is_behind = False

    async def begin(self) -> str:
        """Call the application; return its response as text, or "" where it is not to be shared, as soon as that is known."""
        self._session = _session_of(self._scope)
        task = self.task = asyncio.create_task(self._call(), name="aiokv response")
        _running.add(task)
        task.add_done_callback(self._end)
        try:
            await self._known.wait()
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            raise
        if self.text is None:
            # It failed, or ended without a response.
            self.text = ""
            await task
        return self.text

    @property
    def status(self) -> int:
        """The response's status, 0 where there is none yet."""
        status: int = self._start.get("status", 0)
        return status

    def take(self, is_taken: bool) -> None:  # noqa: FBT001 (a fact)
        """Say whether the caller takes what is passed on; the first word counts."""
        if not self._taken.done():
            self._taken.set_result(is_taken)

    async def _call(self) -> None:
        await self._app(self._scope, self._receive, self._send)

    def _end(self, task: "asyncio.Task[None]") -> None:
        _running.discard(task)
        self._known.set()
        is_left = self._taken.done() and not self._taken.result()
        if is_left and not task.cancelled() and (error := task.exception()) is not None:
            logger.error("an application failed whose response nobody waits for: %s", type(error).__qualname__)

    async def _receive(self) -> Message:
        if not self._has_received:
            self._has_received = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._known.wait()
        if not self._passes:
            # The response is not this caller's alone, so the end of its connection does not matter.
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
        if not await asyncio.shield(self._taken):
            return {"type": "http.disconnect"}
        message = await self._receive_on()
        # The first one is the request, which the application has.
        return await self._receive_on() if message["type"] == "http.request" else message

    async def _send(self, message: Message) -> None:
        if self._passes:
            await self._pass(message)
        elif message["type"] == "http.response.start":
            headers = [(bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())]
            self._start = {**message, "headers": headers}
            if self._fresh_seconds(is_whole=False) is None:
                await self._pass_on()
        elif message["type"] == "http.response.body":
            self._body.append(message.get("body", b""))
            self._size_bytes += len(self._body[-1])
            is_last = not message.get("more_body", False)
            seconds = self._fresh_seconds(is_whole=is_last)
            if seconds is None:
                await self._pass_on()
                await self._pass({"type": "http.response.body", "body": b"".join(self._body), "more_body": not is_last})
                self._body.clear()
            elif is_last:
                self.text = self._rules.write(self.status, self._start["headers"], b"".join(self._body), seconds)
                self._known.set()

    def _fresh_seconds(self, *, is_whole: bool) -> float | None:
        if _session_of(self._scope) != self._session:
            # The session is this client's alone, and the body may depend on it.
            return None
        return self._rules.fresh_seconds(self.status, self._start["headers"], self._size_bytes, is_whole=is_whole)

    async def _pass_on(self) -> None:
        self._passes = True
        self.text = ""
        self._known.set()
        await self._pass(self._start)

    async def _pass(self, message: Message) -> None:
        if await asyncio.shield(self._taken):
            await self._send_on(message)
        elif self.task is not None and message.get("more_body", False):
            # Nobody reads it, and it may have no end.
            self.task.cancel()
            await asyncio.sleep(0)


def _session_of(scope: Scope) -> str:
    """Return a text that is another one where the session has changed; one that is empty is as good as none."""
    return repr(scope.get("session") or {})
