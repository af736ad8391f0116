"""What closing a store does to calls that are under way, and to its connections."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from aiokv import AsyncKVStore
from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.http.retry import RetryPolicy
from aiokv.errors import CallError, StoreClosedError
from aiokv.testing import ScriptedService


async def half_an_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Apply a write, say so in the head, and keep the body back."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n")
    await reader.read()
    writer.close()


async def test_write_that_was_answered_is_not_called_unapplied_where_the_store_closes_in_that_moment() -> None:
    server = await asyncio.start_server(half_an_answer, "127.0.0.1", 0)
    backend = RemoteBackend(URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    session = backend._transport._session
    request: Callable[..., Any] = session.request

    async def request_while_another_task_closes(*arguments: Any, **options: Any) -> Any:
        response = await request(*arguments, **options)
        await backend.aclose()
        return response

    session.request = request_while_another_task_closes  # type: ignore[assignment,method-assign]
    with pytest.raises(StoreClosedError) as caught:
        await backend.set("db", "k", "v", 60)
    server.close()
    assert caught.value.maybe_applied


async def test_closing_ends_a_call_whose_answer_has_begun_at_once() -> None:
    began = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        began.set()
        await half_an_answer(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    backend = RemoteBackend(URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    call = asyncio.create_task(backend.get("db", "k"))
    await began.wait()
    # Until the head is there and the body is waited for.
    await asyncio.sleep(0.1)
    await backend.aclose()
    done, _ = await asyncio.wait([call], timeout=3)
    if not done:
        call.cancel()
        await asyncio.wait([call])
    server.close()
    assert done, "the call goes on until its attempt's 10 s are over"
    assert isinstance(call.exception(), StoreClosedError)


@pytest.mark.parametrize("view_lives", [False, True])
async def test_connections_are_given_back_though_the_other_store_was_not_closed(*, view_lives: bool) -> None:
    """`with_options` says that the other store need not be closed."""
    connections: set[Any] = set()

    async def serve(request: web.BaseRequest) -> web.StreamResponse:
        connections.add(request.transport)
        return web.json_response({"value": "v"})

    async with ScriptedService(handler=serve) as scripted:
        url = scripted.url
        store = AsyncKVStore("db", url=url)
        other = store.with_options(timeout=5)
        await other.get("k")
        if view_lives:
            await store.get("k")
        else:
            del other
        await store.aclose()
        async with asyncio.timeout(2):
            while not all(transport is None or transport.is_closing() for transport in connections):
                await asyncio.sleep(0.01)


async def test_write_under_way_while_its_store_closes_may_have_been_applied() -> None:
    gate = asyncio.Event()

    async def hold(_request: web.BaseRequest) -> web.StreamResponse:
        await gate.wait()
        return web.json_response({"status": "ok"})

    async with ScriptedService(handler=hold) as recorded:
        url = recorded.url
        backend = RemoteBackend(URL(url))
        write = asyncio.create_task(backend.set("db", "k", "v", 60))
        while not recorded.requests:
            await asyncio.sleep(0.001)
        await backend.aclose()
        with pytest.raises(StoreClosedError) as caught:
            await write
        gate.set()
    assert caught.value.maybe_applied


async def test_connections_are_closed_though_whoever_closes_is_cancelled() -> None:
    async def hold(_request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.json_response({})

    class Stubborn:
        """Ends some time after it was told to."""

        async def authorization(self) -> str:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.2)
            return "Key id:secret"

    async with ScriptedService(handler=hold) as scripted:
        url = scripted.url
        backend = RemoteBackend(URL(url), credentials=Stubborn())
        call = asyncio.create_task(backend.get("db", "k"))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(backend.aclose())
        await asyncio.sleep(0.01)
        closing.cancel()
        await asyncio.wait([closing])
        assert backend._transport._session.closed
        await asyncio.wait([call])
        assert isinstance(call.exception(), StoreClosedError)


async def test_closing_in_the_moment_in_which_a_call_runs_out_of_time_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = RemoteBackend(URL("http://127.0.0.1:1"), policy=RetryPolicy.none())

    async def connect_for_ever(*_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    session = backend._transport._session
    close = session.close

    async def close_as_time_runs_out() -> None:
        await close()
        # As its timer does, in the same turn of the loop: the call has had none since.
        bound._expire()

    monkeypatch.setattr(session, "request", connect_for_ever)
    monkeypatch.setattr(session, "close", close_as_time_runs_out)
    call = asyncio.create_task(backend.get("db", "k"))
    await asyncio.sleep(0)
    (bound,) = backend._transport._deadlines.values()
    await backend.aclose()
    with pytest.raises(CallError):
        await call
