"""A headless Chromium for tests, driven over its DevTools protocol.

Source: https://chromedevtools.github.io/devtools-protocol/
"""

import asyncio
import itertools
import re
import shutil
import subprocess
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_OPTIONS = (
    "--headless",
    # Tests may run as root, where Chromium's sandbox does not.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


@contextmanager
def running_chromium(profile: Path) -> Generator[str]:
    """Run Chromium; yield the host and port of its DevTools."""
    assert PROGRAM is not None
    with subprocess.Popen([PROGRAM, *_OPTIONS, f"--user-data-dir={profile}"], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = next(filter(None, (re.search(r"ws://([^/]+)/", line) for line in process.stderr)), None)
            assert found is not None, "Chromium ended before it printed its address"
            yield found[1]
        finally:
            process.kill()


class Page:
    """One page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol; keep the events that come meanwhile."""
        call_id = next(self._ids)
        await self._socket.send_json({"id": call_id, "method": method, "params": params})
        while True:
            message: dict[str, Any] = await self._socket.receive_json()
            if message.get("id") == call_id:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    async def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def wait_for(self, expression: str, is_right: Callable[[Any], bool] = bool) -> Any:
        """Wait until the value of an expression is right, and return it."""
        async with asyncio.timeout(12):
            while not is_right(value := await self.evaluate(expression)):
                await asyncio.sleep(0.02)
        return value

    async def show_as(self, width: int, *, dark: bool) -> None:
        """Take a width in pixels and a colour scheme."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)

    def complaints(self) -> list[dict[str, Any]]:
        """Return what the console shows: refused loads, exceptions, messages."""
        names = {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}
        return [event for event in self.events if event["method"] in names]

    def requested(self) -> list[str]:
        """Return the addresses that the page has asked for."""
        return [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]


@asynccontextmanager
async def opened_page(devtools: str) -> AsyncGenerator[Page]:
    """Open an empty page."""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://{devtools}/json/new?about:blank") as answer:
            target = await answer.json(content_type=None)
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            page = Page(socket)
            for domain in ("Log", "Runtime", "Page", "Network"):
                await page.call(f"{domain}.enable")
            yield page
        async with session.get(f"http://{devtools}/json/close/{target['id']}") as answer:
            await answer.read()
