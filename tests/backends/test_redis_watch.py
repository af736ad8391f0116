"""What a Redis store tells of changes, and of its health."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from redis_servers import RedisServer, needs_server, running_redis

from aiokv import clock
from aiokv.backends.base import CheckedBackend, HostedBackend
from aiokv.backends.redis.backend import RedisBackend
from aiokv.backends.redis.names import entry_key
from aiokv.backends.watching import Alive, Changed, Lost, Watch

pytestmark = needs_server

Opener = Callable[..., RedisBackend]


async def next_of(watch: Watch, kind: type) -> Any:
    async with asyncio.timeout(10):
        async for event in watch:
            if isinstance(event, kind):
                return event
    raise AssertionError("the watch ended")


class TestWatch:
    async def test_broken_connection_is_lost_and_the_watch_goes_on(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server)
        async with backend.watch("db") as watch:
            await next_of(watch, Lost)
            await next_of(watch, Alive)
            server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await next_of(watch, Lost)
            await next_of(watch, Alive)
            await backend.set("db", "k", "v", 60)
            assert await next_of(watch, Changed) == Changed("k")

    @pytest.mark.slow
    async def test_watches_that_begin_do_not_put_off_the_heartbeats_of_others(
        self, server: RedisServer, open_redis: Opener
    ) -> None:
        backend = open_redis(server)
        async with backend.watch("db") as watch:
            await next_of(watch, Alive)
            for number in range(30):
                async with backend.watch(f"db{number}") as other:
                    await next_of(other, Lost)
            # The end of the last one brings another heartbeat forward.
            await asyncio.sleep(0.5)
            while watch._queued:
                await anext(watch)
            async with asyncio.timeout(8):
                assert await anext(watch) == Alive()

    async def test_flush_of_the_server_is_lost(self, server: RedisServer, open_redis: Opener) -> None:
        async with open_redis(server).watch("db") as watch:
            await next_of(watch, Lost)
            server.ask("FLUSHALL")
            await next_of(watch, Lost)

    @pytest.mark.slow
    async def test_server_that_stands_still_says_nothing_and_is_lost(self, open_redis: Opener) -> None:
        with running_redis() as server:
            async with open_redis(server).watch("db") as watch:
                await next_of(watch, Alive)
                server.pause()
                await asyncio.sleep(0.1)
                while watch._queued:
                    await anext(watch)
                started = time.monotonic()
                assert isinstance(await anext(watch), Lost)
                assert time.monotonic() - started < 9
                server.resume()
                await next_of(watch, Lost)
                await next_of(watch, Alive)

    async def test_change_by_another_client_is_told(self, server: RedisServer, open_redis: Opener) -> None:
        async with open_redis(server).watch("db") as watch:
            await next_of(watch, Lost)
            server.ask("SET", entry_key("db", "k"), "v")
            assert await next_of(watch, Changed) == Changed("k")
            server.ask("DEL", entry_key("db", "k"))
            assert await next_of(watch, Changed) == Changed("k", is_delete=True)

    async def test_namespace_that_is_watched_later_joins_the_connection(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server)
        async with backend.watch("one") as one:
            await next_of(one, Lost)
            clients = server.ask("INFO", "clients")["connected_clients"]
            watches = [backend.watch(f"db{i}") for i in range(10)]
            for watch in watches:
                await next_of(watch, Lost)
            assert server.ask("INFO", "clients")["connected_clients"] == clients
            await backend.set("db3", "k", "v", 60)
            assert await next_of(watches[3], Changed) == Changed("k")
            for watch in watches:
                await watch.aclose()
            await backend.set("one", "k", "v", 60)
            assert await next_of(one, Changed) == Changed("k")

    async def test_last_watch_closes_its_connection(self, server: RedisServer, open_redis: Opener) -> None:
        clients = server.ask("INFO", "clients")["connected_clients"]
        backend = open_redis(server)
        watch = backend.watch("db")
        await next_of(watch, Lost)
        await watch.aclose()
        async with asyncio.timeout(5):
            while server.ask("INFO", "clients")["connected_clients"] != clients:
                await asyncio.sleep(0.02)

    async def test_server_that_was_never_there_is_warned_of_once_a_minute(
        self, open_redis: Opener, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def warnings() -> list[str]:
            return [record.getMessage() for record in caplog.records if "a watch" in record.getMessage()]

        async def until(count: int) -> None:
            async with asyncio.timeout(10):
                while len(warnings()) < count:
                    await asyncio.sleep(0.01)

        now = 1000.0
        monkeypatch.setattr(clock, "monotonic", lambda: now)
        with running_redis() as server, caplog.at_level(logging.WARNING, "aiokv"):
            backend = open_redis(server)
            server.kill()
            watch = backend.watch("db")
            await until(1)
            # Enough for several attempts.
            await asyncio.sleep(0.5)
            (line,) = warnings()
            assert f":{server.port}" in line
            assert "no connection could be made" in line
            assert "goes on trying" in line
            now += 61.0
            await until(2)
            server.start()
            await next_of(watch, Lost)
            now += 61.0
            server.kill()
            await next_of(watch, Lost)
            await asyncio.sleep(0.5)
            assert warnings() == [line, line]
            await watch.aclose()

    async def test_watch_waits_for_a_server_that_is_away(self, open_redis: Opener) -> None:
        with running_redis() as server:
            backend = open_redis(server)
            server.kill()
            watch = backend.watch("db")
            reading = asyncio.create_task(next_of(watch, Lost))
            await asyncio.sleep(0.2)
            assert not reading.done()
            server.start()
            await reading
            await watch.aclose()


class TestHealth:
    async def test_server_that_takes_writes_is_well(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server)
        assert await backend.health() is None
        assert isinstance(backend, CheckedBackend)
        assert not isinstance(backend, HostedBackend)

    async def test_server_that_is_away_or_full_is_not(self, open_redis: Opener) -> None:
        with running_redis() as server:
            backend = open_redis(server)
            server.ask("CONFIG", "SET", "maxmemory", "1")
            assert "takes no writes" in str(await backend.health())
            server.kill()
            assert "does not answer" in str(await backend.health())
