"""The listings of a Redis store."""

import asyncio
from collections.abc import Callable

import pytest
from redis_servers import RedisServer, needs_server, running_redis

from aiokv.backends.capabilities import Entry
from aiokv.backends.redis.backend import RedisBackend
from aiokv.errors import AuthenticationError
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
        server.ask("CONFIG", "RESETSTAT")
        steps = [step async for step in clearing(backend, "db", "", 1_000)]
        assert sum(step.deleted for step in steps) == 5_000
        calls = {name: figures["calls"] for name, figures in server.ask("INFO", "commandstats").items()}
        # The fewer, the less others can set meanwhile.
        assert calls["cmdstat_scan"] <= 3 * len(steps) + 8
        assert calls["cmdstat_unlink"] <= calls["cmdstat_scan"]
        # Each goes on where the one before has ended.
        assert len(steps) < 10
        assert (await backend.count("db"), await backend.count("other")) == (0, 1)

    @pytest.mark.parametrize("limit", [1, 7, 64, 1_000])
    async def test_every_step_of_clearing_gets_further_beside_writers(
        self, server: RedisServer, open_redis: Opener, limit: int
    ) -> None:
        backend = open_redis(server)
        keys = [f"k{i}" for i in range(min(300 * limit, 3_000) // 2)]
        for start in range(0, len(keys), 1_000):
            await backend.set_many("db", [Entry(key, "v", 60) for key in keys[start : start + 1_000]])
        steps = 0
        places: list[str] = []
        async for step in clearing(backend, "db", "", limit):
            steps += 1
            assert step.deleted <= limit
            places.append((step.cursor or "").partition("/")[2])
            await backend.set_many("db", [Entry(f"new {steps} {i}", "v", 60) for i in range(limit)])
            # What is set meanwhile makes the table grow, and the pass longer, but not without end.
            assert steps < 10 * len(keys) / limit + 50
        assert set(await backend.get_many("db", keys[:1_000])) == {None}
        # The smallest part of a table has a few keys, which a small step cannot take at once.
        assert limit < 64 or len({*places}) == len(places)

    async def test_clear_among_many_keys_of_others_goes_in_short_steps(
        self, server: RedisServer, open_redis: Opener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("aiokv.backends.redis.scan._CLEAR_SECONDS", 0.0)
        backend = open_redis(server)
        for start in range(0, 10_000, 1_000):
            await backend.set_many("other", [Entry(f"k{start + i}", "v", 60) for i in range(1_000)])
        await backend.set_many("db", [Entry(f"k{i}", "v", 60) for i in range(20)])
        steps = [step async for step in clearing(backend, "db", "", 1_000)]
        assert len(steps) > 5
        assert (sum(step.deleted for step in steps), await backend.count("db"), await backend.count("other")) == (20, 0, 10_000)
        monkeypatch.setattr("aiokv.backends.redis.scan._CLEAR_SECONDS", 60.0)
        monkeypatch.setattr("aiokv.backends.redis.scan._CLEAR_SCANS", 2)
        assert len([step async for step in clearing(backend, "db", "", 1_000)]) > 1

    async def test_errors_name_the_call_that_failed(self, server: RedisServer, open_redis: Opener) -> None:
        server.ask("ACL", "SETUSER", "noscan", "on", ">pw", "~*", "+@all", "-scan")
        backend = open_redis(server, credentials="noscan:pw")
        for verb, call in (
            ("scan", backend.scan("db")),
            ("count", backend.count("db")),
            ("clear", backend.clear("db")),
        ):
            with pytest.raises(AuthenticationError) as caught:
                await call
            assert (caught.value.verb, caught.value.maybe_applied) == (verb, False)
        server.ask("ACL", "SETUSER", "noscan", "+scan", "-unlink")
        await backend.set("db", "k", "v", 60)
        with pytest.raises(AuthenticationError) as caught:
            await backend.clear("db")
        assert (caught.value.verb, caught.value.maybe_applied) == ("clear", False)
        server.ask("ACL", "DELUSER", "noscan")
