"""The listings of a Redis store."""

import asyncio
from collections.abc import Callable

import pytest
from redis_servers import RedisServer, needs_server, running_redis

from aiokv.backends.capabilities import Entry
from aiokv.backends.redis.backend import RedisBackend
from aiokv.testing.contract.scan import clearing

pytestmark = needs_server

Opener = Callable[..., RedisBackend]


class TestScan:
    async def test_page_of_one_key_at_a_time_lists_everything(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server)
        await backend.set_many("db", [Entry(f"k{i}", "v", 60) for i in range(300)])
        await backend.set_many("other", [Entry(f"k{i}", "v", 60) for i in range(300)])
        cursor: str | None = None
        keys: list[str] = []
        while True:
            page = await backend.scan("db", "k1", cursor, 1)
            assert len(page.infos) <= 1
            keys += [info.key for info in page.infos]
            cursor = page.cursor
            if cursor is None:
                break
        assert sorted(keys) == sorted(f"k{i}" for i in range(300) if f"k{i}".startswith("k1"))

    async def test_cursor_of_another_run_of_the_server_begins_anew(self, open_redis: Opener) -> None:
        with running_redis("--appendonly", "yes", "--appendfsync", "always") as server:
            backend = open_redis(server)
            keys = {f"k{i}" for i in range(200)}
            await backend.set_many("db", [Entry(key, "v", 60) for key in keys])
            page = await backend.scan("db", "", None, 50)
            assert page.cursor is not None
            server.kill()
            server.start()
            await asyncio.to_thread(server.wait)
            found, cursor = {info.key for info in page.infos}, page.cursor
            while cursor is not None:
                page = await backend.scan("db", "", cursor, 50)
                found |= {info.key for info in page.infos}
                cursor = page.cursor
            assert found == keys

    @pytest.mark.parametrize(
        "cursor", ["", "x", "1", "0.zz.1", "99999.aa.1", "16384.aa.1", f"0.aa.{2**64}", "0.aa.-1", "0.aa.1.é"]
    )
    async def test_foreign_cursor_is_refused(self, server: RedisServer, open_redis: Opener, cursor: str) -> None:
        with pytest.raises(ValueError, match="cursor"):
            await open_redis(server).scan("db", "", cursor)
        with pytest.raises(ValueError, match="cursor"):
            await open_redis(server).clear("db", "", cursor)
        with pytest.raises(ValueError, match="cursor"):
            await open_redis(server).clear("db", "", f"1/{cursor}")

    async def test_largest_cursor_of_a_server_is_taken(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server)
        assert await backend.scan("db", "", f"0.aa.{2**64 - 1}") == ([], None)

    async def test_many_keys_are_cleared_in_steps(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server)
        for start in range(0, 5_000, 1_000):
            await backend.set_many("db", [Entry(f"k{start + i}", "v", 60) for i in range(1_000)])
        await backend.set("other", "k", "v", 60)
        steps = [step async for step in clearing(backend, "db", "", 1_000)]
        assert sum(step.deleted for step in steps) == 5_000
        # Each goes on where the one before has ended.
        assert len(steps) < 10
        assert (await backend.count("db"), await backend.count("other")) == (0, 1)
