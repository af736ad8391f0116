"""Watches over HTTP: changes as they come, `Lost` wherever some may be missing, and streams that are made again."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from aiohttp import web
from extension_service import ALL, ExtensionService, connected
from helpers import no_wait
from yarl import URL

from aiokv import clock
from aiokv.backends.http import watching
from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.http.options import HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.watching import Alive, Changed, Lost, Watch, WatchEvent
from aiokv.errors import AuthenticationError, CallError, ConnectError, CredentialsError, RejectedError, UnsupportedError
from aiokv.event_wire import ALIVE, EVENT_STREAM, changed_event, lost_event
from aiokv.extension_wire import EXTENSIONS_HEADER
from aiokv.server import running_server
from aiokv.testing import FaultProxy, ScriptedService
from aiokv.wire import TOKEN_PATH, error_body


class ScriptedStream:
    """A watch whose streams are written by a test; each ends where the script does."""

    def __init__(self, *plays: list[bytes]) -> None:
        self.plays = list(plays)
        self.last_event_ids: list[str | None] = []
        self.headers: list[dict[str, str]] = []
        self.status = 200
        # A stream whose script is empty at last stays open.
        self.content_type = EVENT_STREAM
        self.open = 0

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self.last_event_ids.append(request.headers.get("Last-Event-ID"))
        self.headers.append(dict(request.headers))
        response = web.StreamResponse(status=self.status, headers={"Content-Type": self.content_type, EXTENSIONS_HEADER: ALL})
        await response.prepare(request)
        if self.plays:
            for piece in self.plays.pop(0):
                await response.write(piece)
        else:
            self.open += 1
            await response.write(b": open\n\n")
            with contextlib.suppress(ConnectionError):
                while True:
                    await asyncio.sleep(0.01)
                    await response.write(b": open\n\n")
        return response


@contextlib.asynccontextmanager
async def watched(script: ScriptedStream, **named: Any) -> AsyncGenerator[Watch]:
    async with ScriptedService(handler=script) as scripted:
        backend = RemoteBackend(URL(scripted.url), sleep=no_wait, **named)
        try:
            yield backend.watch("db")
        finally:
            await backend.aclose()


async def take(watch: Watch, count: int) -> list[WatchEvent]:
    async with asyncio.timeout(10):
        return [await anext(watch) for _ in range(count)]


async def take_changes(watch: Watch, count: int) -> list[WatchEvent]:
    events: list[WatchEvent] = []
    while len(events) < count:
        events += [event for event in await take(watch, 1) if not isinstance(event, Alive)]
    return events


def change(key: str, event_id: str) -> bytes:
    return changed_event(Changed(key), event_id)


async def test_changes_of_the_real_server_come_in_order() -> None:
    store = MemoryBackend()
    async with running_server(store) as address:
        backend = RemoteBackend(URL(address))
        watch = backend.watch("db")
        assert await take_changes(watch, 1) == [Lost()]
        await backend.set("db", "a", "1", 60)
        await backend.set("other", "b", "1", 60)
        await backend.delete("db", "a")
        assert await take_changes(watch, 2) == [Changed("a"), Changed("a", is_delete=True)]
        await backend.aclose()
        assert [event async for event in watch] == []


async def test_stream_that_ends_is_opened_again_after_its_last_event() -> None:
    script = ScriptedStream(
        [lost_event("e1"), change("a", "e2")],
        [change("b", "e3"), ALIVE],
        [change("c", "e4")],
    )
    async with watched(script) as watch:
        assert await take(watch, 5) == [Lost(), Changed("a"), Changed("b"), Alive(), Changed("c")]
        async with asyncio.timeout(10):
            while len(script.last_event_ids) < 4:
                await asyncio.sleep(0.001)
    assert script.last_event_ids == [None, "e2", "e3", "e4"]


async def test_server_that_cannot_go_on_says_lost() -> None:
    script = ScriptedStream([lost_event("e1"), change("a", "e2")], [lost_event("f1"), change("b", "f2")])
    async with watched(script) as watch:
        # A reader that comes late is spared what came before the loss.
        events = await take(watch, 2)
        while events[-1] != Changed("b"):
            events += await take(watch, 1)
        assert events[-2] == Lost()
    assert script.last_event_ids[:2] == [None, "e2"]


@pytest.mark.parametrize("first", [change("a", "e1"), ALIVE], ids=["changed", "alive"])
async def test_watch_begins_with_lost_whatever_the_server_says(first: bytes) -> None:
    async with watched(ScriptedStream([first])) as watch:
        assert (await take(watch, 1)) == [Lost()]


async def test_stream_without_ids_is_lost_each_time_it_is_opened_again() -> None:
    without_id = b'event: changed\ndata: {"key": "a"}\n\n'
    async with watched(ScriptedStream([without_id], [without_id])) as watch:
        events = await take(watch, 2)
        assert events == [Lost(), Changed("a")]
        assert await take(watch, 2) == [Lost(), Changed("a")]


async def test_events_that_arrive_in_pieces_are_whole() -> None:
    stream = lost_event("e1") + change("kü", "e2") + change("b", "e3")
    async with watched(ScriptedStream([stream[at : at + 1] for at in range(len(stream))])) as watch:
        assert await take(watch, 3) == [Lost(), Changed("kü"), Changed("b")]


@pytest.mark.parametrize(
    "garbage",
    [b"event: changed\ndata: [1]\n\n", b"event: changed\ndata: {\n\n", b"data: " + b"x" * 100_000, b"<html>" * 20_000],
    ids=["no key", "no json", "endless line", "html"],
)
async def test_stream_that_cannot_be_read_is_opened_anew_with_lost(garbage: bytes) -> None:
    script = ScriptedStream([lost_event("e1"), change("a", "e2"), garbage], [change("b", "e9")])
    async with watched(script) as watch:
        events = await take(watch, 2)
        while events[-1] != Changed("b"):
            events += await take(watch, 1)
        assert events[-2] == Lost()
    assert script.last_event_ids[:2] == [None, None]


async def test_silence_is_lost_and_a_new_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SILENCE_SECONDS", 0.2)
    held = asyncio.Event()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": EVENT_STREAM, EXTENSIONS_HEADER: ALL})
        await response.prepare(request)
        opened.append(request.headers.get("Last-Event-ID"))
        if len(opened) == 1:
            await response.write(lost_event("e1") + change("a", "e2"))
        if len(opened) == 3:
            await response.write(change("b", "e3"))
        await held.wait()
        return response

    opened: list[str | None] = []
    async with ScriptedService(handler=answer) as scripted:
        backend = RemoteBackend(URL(scripted.url), sleep=no_wait)
        watch = backend.watch("db")
        assert await take(watch, 2) == [Lost(), Changed("a")]
        # One for the silence, however many streams are silent, and then what the third one knows.
        assert await take(watch, 2) == [Lost(), Changed("b")]
        assert opened == [None, "e2", "e2"]
        held.set()
        await backend.aclose()


async def test_outage_longer_than_the_silence_is_lost_at_once_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SILENCE_SECONDS", 0.1)
    store = MemoryBackend()
    async with running_server(store) as address, FaultProxy(address) as proxy:
        backend = RemoteBackend(URL(proxy.url), policy=RetryPolicy(wait_for_ready=0.2))
        watch = backend.watch("db")
        assert await take_changes(watch, 1) == [Lost()]
        async with proxy.outage():
            assert await take_changes(watch, 1) == [Lost()]
            await store.set("db", "missed", "1", 60)
        while True:
            await store.set("db", "seen", "1", 60)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    event = await anext(watch)
                    if isinstance(event, Changed):
                        break
        await backend.aclose()


async def test_connection_that_is_reset_loses_nothing_where_the_server_goes_on() -> None:
    store = MemoryBackend()
    async with running_server(store) as address, FaultProxy(address) as proxy:
        backend = RemoteBackend(URL(proxy.url), sleep=no_wait)
        watch = backend.watch("db")
        assert await take_changes(watch, 1) == [Lost()]
        await store.set("db", "a", "1", 60)
        assert await take_changes(watch, 1) == [Changed("a")]
        async with proxy.outage():
            await store.set("db", "b", "1", 60)
        events = await take_changes(watch, 1)
        assert events in ([Changed("b")], [Lost()])
        await backend.aclose()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, AuthenticationError),
        (403, AuthenticationError),
        (404, UnsupportedError),
        (405, UnsupportedError),
        (501, UnsupportedError),
        (400, RejectedError),
        (302, RejectedError),
    ],
)
async def test_refusal_for_good_fails_the_watch(status: int, kind: type[CallError]) -> None:
    service = ExtensionService()

    async def refuse(_: web.BaseRequest) -> web.Response:
        return service.respond(status, error_body("no"))

    async with connected(service) as backend:
        service.override = refuse
        with pytest.raises(kind) as caught:
            await anext(backend.watch("db"))
        assert (caught.value.verb, caught.value.db_name, caught.value.status) == ("watch", "db", status)
    assert len(service.asked) == 1


async def test_server_without_the_extension_fails_the_watch() -> None:
    service = ExtensionService(extensions="batch")
    async with connected(service) as backend:
        with pytest.raises(UnsupportedError, match="cannot tell of changes"):
            await anext(backend.watch("db"))


async def test_answer_of_another_type_fails_the_watch() -> None:
    script = ScriptedStream([b"{}"])
    script.content_type = "application/json"
    async with watched(script) as watch:
        with pytest.raises(CallError, match="event-stream"):
            await anext(watch)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
async def test_refusal_for_a_while_is_waited_for(status: int) -> None:
    service = ExtensionService()

    async def refuse(_: web.BaseRequest) -> web.Response | None:
        return web.Response(status=status) if len(service.asked) <= 3 else None

    async with connected(service) as backend:
        service.override = refuse
        watch = backend.watch("db")
        assert await take(watch, 1) == [Lost()]
    assert service.asked == ["GET watch"] * 4


async def test_host_that_restarts_is_waited_for() -> None:
    store = MemoryBackend()
    async with running_server(store) as address, FaultProxy(address) as proxy:
        backend = RemoteBackend(URL(proxy.url), policy=RetryPolicy(wait_for_ready=0.1))
        async with proxy.outage():
            watch = backend.watch("db")
            with pytest.raises(ConnectError):
                await backend.get("db", "k")
        assert await take_changes(watch, 1) == [Lost()]
        await backend.aclose()


async def test_token_is_sent_and_renewed_once_where_it_is_refused() -> None:
    service = ExtensionService()
    tokens: list[str] = []

    async def check(request: web.BaseRequest) -> web.Response | None:
        if request.path == TOKEN_PATH:
            tokens.append(f"t{len(tokens)}")
            return web.json_response({"token": tokens[-1], "token_type": "Bearer", "expires_at": "2100-01-01T00:00:00Z"})
        return None if request.headers["Authorization"] == "Bearer t1" else service.respond(401, error_body("old"))

    service.override = check
    async with ScriptedService(handler=service.answer) as scripted:
        backend = RemoteBackend(URL(scripted.url), credentials="id:secret", sleep=no_wait)
        assert await take(backend.watch("db"), 1) == [Lost()]
        assert tokens == ["t0", "t1"]
        service.ends_watches.set()
        await backend.aclose()


async def test_credentials_that_are_gone_fail_the_watch() -> None:
    class Gone:
        async def authorization(self) -> str:
            raise CredentialsError("the vault is locked")

    async with ScriptedService() as scripted:
        backend = RemoteBackend(URL(scripted.url), credentials=Gone())
        with pytest.raises(CredentialsError):
            await anext(backend.watch("db"))
        await backend.aclose()


async def test_watches_take_no_connection_of_the_pool() -> None:
    store = MemoryBackend()
    async with running_server(store) as address:
        backend = RemoteBackend(URL(address), options=HttpOptions(pool_size=1))
        watches = [backend.watch("db") for _ in range(5)]
        for watch in watches:
            assert await take_changes(watch, 1) == [Lost()]
        await backend.set("db", "k", "v", 60)
        for watch in watches:
            assert await take_changes(watch, 1) == [Changed("k")]
        await backend.aclose()


async def test_watch_that_is_closed_leaves_its_connection_and_the_others() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        first, second = backend.watch("db"), backend.watch("db")
        assert await take(first, 1) == await take(second, 1) == [Lost()]
        await first.aclose()
        async with asyncio.timeout(10):
            while len(backend._watches._open) > 1:
                await asyncio.sleep(0.001)
        await service.backend.set("db", "k", "v", 60)
        assert await take_changes(second, 1) == [Changed("k")]
        assert first.is_closed


async def test_closed_backend_ends_its_watches_and_those_of_its_views() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        watches = [backend.watch("db"), backend.with_options(RetryPolicy(), None).watch("db")]
        for watch in watches:
            await take(watch, 1)
        await backend.aclose()
        for watch in watches:
            with pytest.raises(StopAsyncIteration):
                await anext(watch)
        assert not backend._watches._open


async def test_host_that_was_never_there_is_warned_of_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(clock, "monotonic", lambda: now)
    attempts = 0

    async def no_wait_but_count(_: float) -> None:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(0)

    async def more_attempts() -> None:
        wanted = attempts + 10
        async with asyncio.timeout(10):
            while attempts < wanted:
                await asyncio.sleep(0.001)

    def warnings() -> list[str]:
        texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        return [text for text in texts if "a watch" in text]

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    backend = RemoteBackend(URL(f"http://127.0.0.1:{port}"), policy=RetryPolicy.none(), sleep=no_wait_but_count)
    watches = [backend.watch("db"), backend.watch("other")]
    await more_attempts()
    (line,) = warnings()
    assert f"127.0.0.1:{port}" in line
    assert "goes on trying" in line
    assert "no connection" in line
    now += 61.0
    await more_attempts()
    assert len(warnings()) == 2
    assert not any(watch.is_closed for watch in watches)
    await backend.aclose()


async def test_host_that_was_there_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    script = ScriptedStream([lost_event("e1")], [], [change("a", "e2")])
    async with watched(script) as watch:
        await take(watch, 1)
        script.status = 503
        async with asyncio.timeout(10):
            while len(script.last_event_ids) < 5:
                await asyncio.sleep(0.001)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and "a watch" in record.getMessage()]


@pytest.mark.parametrize("play", [[], [lost_event("e1")]], ids=["no event", "one event"])
async def test_stream_of_comments_alone_is_taken_for_broken(monkeypatch: pytest.MonkeyPatch, play: list[bytes]) -> None:
    monkeypatch.setattr(watching, "SILENCE_SECONDS", 0.2)
    script = ScriptedStream(*([play] if play else []))
    async with watched(script):
        async with asyncio.timeout(10):
            while script.open < 3:
                await asyncio.sleep(0.01)
    assert len(script.last_event_ids) >= 3
