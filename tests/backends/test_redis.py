"""A store on one Redis server: what goes wrong, and what becomes of the calls that meet it."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest
from helpers import REPOSITORY, all_texts
from redis_servers import RedisServer, needs_server, running_redis

from aiokv import (
    AsyncKVStore,
    AuthenticationError,
    CallTimeoutError,
    ConnectError,
    CorruptValueError,
    RedisOptions,
    RejectedError,
    RetryPolicy,
    StorageFullError,
    StoreClosedError,
    UnavailableError,
)
from aiokv.backends.base import is_patient
from aiokv.backends.capabilities import OMITTED, Entry
from aiokv.backends.redis.backend import RedisBackend
from aiokv.backends.redis.calls import Command
from aiokv.backends.redis.names import entry_key
from aiokv.backends.redis.nodes import pack
from aiokv.backends.redis.urls import parse_url
from aiokv.backends.watching import Alive, Changed, Lost, Watch

pytestmark = needs_server

Opener = Callable[..., RedisBackend]
QUICK = RetryPolicy(total_timeout=1.0)


async def next_of(watch: Watch, kind: type) -> Any:
    async with asyncio.timeout(10):
        async for event in watch:
            if isinstance(event, kind):
                return event
    raise AssertionError("the watch ended")


async def test_store_of_a_url_sets_and_gets(server: RedisServer) -> None:
    async with AsyncKVStore("db", url=f"redis://{server.address}") as store:
        await store.set("k", "v", 60)
        assert await store.get("k") == "v"
        assert 59_000 < server.ask("PTTL", entry_key("db", "k")) <= 60_000


async def test_entry_expires_by_itself(server: RedisServer, open_redis: Opener) -> None:
    backend = open_redis(server)
    await backend.set_many("db", [Entry("short", "v", 1), Entry("long", "v", 60)])
    assert await backend.get_many("db", ["short", "long"]) == ["v", "v"]
    await asyncio.sleep(1.05)
    assert await backend.get_many("db", ["short", "long"]) == [None, "v"]
    assert [info.key for info in (await backend.scan("db")).infos] == ["long"]


async def test_valkey_url_is_the_same_store(server: RedisServer) -> None:
    async with (
        AsyncKVStore("db", url=f"redis://{server.address}") as one,
        AsyncKVStore("db", url=f"valkey://{server.address}/0") as other,
    ):
        await one.set("k", "v", 60)
        assert await other.get("k") == "v"


async def test_databases_of_one_server_are_apart(server: RedisServer, open_redis: Opener) -> None:
    zero, one = open_redis(server), open_redis(server, "/1")
    await zero.set("db", "k", "zero", 60)
    assert await one.get("db", "k") is None


async def test_namespace_with_a_slash_is_apart_from_a_key_with_one(server: RedisServer, open_redis: Opener) -> None:
    backend = open_redis(server)
    await backend.set("a/b", "c", "1", 60)
    await backend.set("a", "b/c", "2", 60)
    await backend.set("a%2Fb", "c", "3", 60)
    assert [await backend.get(*name) for name in (("a/b", "c"), ("a", "b/c"), ("a%2Fb", "c"))] == ["1", "2", "3"]


class TestValues:
    async def test_bytes_that_are_no_text_are_a_corrupt_value(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server)
        server.ask("SET", entry_key("db", "k"), b"\xff secret")
        with pytest.raises(CorruptValueError) as caught:
            await backend.get("db", "k")
        assert "secret" not in all_texts(caught.value)
        await backend.set("db", "k", "v", 60)
        assert await backend.get("db", "k") == "v"

    async def test_list_of_another_program_is_a_corrupt_value_that_a_set_replaces(
        self, server: RedisServer, open_redis: Opener
    ) -> None:
        backend = open_redis(server)
        server.ask("RPUSH", entry_key("db", "k"), "item")
        await backend.set("db", "other", "v", 60)
        with pytest.raises(CorruptValueError):
            await backend.get("db", "k")
        outcome, other = await backend.get_many("db", ["k", "other"])
        assert isinstance(outcome, CorruptValueError)
        assert other == "v"
        assert [info.key for info in (await backend.scan("db")).infos] == ["other"]
        await backend.set("db", "k", "v", 60)
        assert await backend.get("db", "k") == "v"

    async def test_damaged_value_fails_in_a_batch_alone(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server)
        keys = [f"k{i}" for i in range(10)]
        await backend.set_many("db", [Entry(key, key, 60) for key in keys])
        server.ask("SET", entry_key("db", "k3"), b"\xff")
        outcomes = await backend.get_many("db", keys)
        assert isinstance(outcomes[3], CorruptValueError)
        assert [outcome for i, outcome in enumerate(outcomes) if i != 3] == [key for key in keys if key != "k3"]

    async def test_values_that_would_not_fit_an_answer_are_not_asked_for(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server)
        value = "x" * 1_800_000
        keys = [f"k{i}" for i in range(12)]
        for key in keys:
            await backend.set("db", key, value, 60)
        before = server.ask("INFO", "stats")["total_net_output_bytes"]
        outcomes = await backend.get_many("db", keys)
        assert outcomes.count(OMITTED) == 8
        assert server.ask("INFO", "stats")["total_net_output_bytes"] - before < 9_000_000


class TestRefusals:
    async def test_missing_or_wrong_password_is_an_authentication_error_at_once(
        self, open_redis: Opener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with running_redis("--requirepass", "hunter2") as server:
            for credentials in (None, "default:wrong"):
                with pytest.raises(AuthenticationError) as caught:
                    await open_redis(server, credentials=credentials).set("db", "k", "v", 60)
                assert (caught.value.attempts, caught.value.maybe_applied, caught.value.transient) == (1, False, False)
                assert "wrong or missing" in str(caught.value)
            await open_redis(server, credentials="default:hunter2").set("db", "k", "v", 60)
            monkeypatch.setenv("AIOKV_REDIS_PASSWORD", "hunter2")
            assert await open_redis(server).get("db", "k") == "v"

    async def test_user_without_rights_is_told_so(self, server: RedisServer, open_redis: Opener) -> None:
        server.ask("ACL", "SETUSER", "reader", "on", ">pw", "~aiokv*", "+get", "+hello")
        backend = open_redis(server, credentials="reader:pw")
        assert await backend.get("db", "k") is None
        with pytest.raises(AuthenticationError, match="ACL"):
            await backend.set("db", "k", "v", 60)
        watch = backend.watch("db")
        with pytest.raises(AuthenticationError):
            await next_of(watch, Lost)

    async def test_rights_that_the_documentation_names_are_enough(self, server: RedisServer, open_redis: Opener) -> None:
        text = (REPOSITORY / "docs" / "redis.md").read_text()
        found = re.search(r"An ACL user needs: `(.*?)`, and `(.*?)`", text, re.DOTALL)
        assert found is not None
        rights = [found[1], *found[2].split()]
        if server.ask("INFO", "server")["redis_version"] < "7":
            rights = [right.split("|")[0] for right in rights]
        server.ask("ACL", "SETUSER", "narrow", "reset", "on", ">pw", *rights)
        backend = open_redis(server, credentials="narrow:pw")
        async with backend.watch("db") as watch:
            await next_of(watch, Alive)
            await backend.set_many("db", [Entry(f"k{i}", "v", 60) for i in range(9)])
            await next_of(watch, Changed)
        assert await backend.get("db", "k1") == "v"
        assert await backend.get_many("db", [f"k{i}" for i in range(9)]) == ["v"] * 9
        assert len((await backend.scan("db")).infos) == 9
        assert (await backend.claim("db", "k", "me", 5)).is_held
        assert (await backend.renew("db", "k", "me", 5)).is_held
        assert await backend.release("db", "k", "me")
        await backend.delete("db", "k1")
        assert (await backend.count("db"), await backend.clear("db"), await backend.health()) == (8, (8, None), None)
        with pytest.raises(AuthenticationError):
            await open_redis(server, "/1", credentials="narrow:pw", policy=QUICK)._caller.run_one(
                Command("set", "db", "k", 0, pack(b"FLUSHALL")), QUICK
            )

    async def test_full_memory_is_a_full_store_and_deletes_go_on(self, open_redis: Opener) -> None:
        with running_redis("--maxmemory-policy", "noeviction") as server:
            backend = open_redis(server)
            await backend.set("db", "old", "v", 60)
            server.ask("CONFIG", "SET", "maxmemory", "1mb")
            with pytest.raises(StorageFullError) as caught:
                await backend.set("db", "k", "x" * 500_000, 60)
            assert not caught.value.maybe_applied
            assert await backend.health() is not None
            await backend.delete("db", "old")
            assert await backend.get("db", "old") is None

    async def test_replica_is_waited_for_and_then_refused(self, server: RedisServer, open_redis: Opener) -> None:
        with running_redis("--replicaof", "127.0.0.1", str(server.port)) as replica:
            with pytest.raises(UnavailableError, match="replica") as caught:
                await open_redis(replica, policy=QUICK).set("db", "k", "v", 60)
            assert caught.value.attempts > 4
            assert not caught.value.maybe_applied

    async def test_database_that_is_not_there_is_refused(self, server: RedisServer, open_redis: Opener) -> None:
        with pytest.raises(RejectedError, match="has no database 99"):
            await open_redis(server, "/99").get("db", "k")

    @pytest.mark.parametrize("scheme", ["redis+cluster://{}", "redis+sentinel://{}/main"])
    async def test_wrong_password_is_found_out_at_once_by_whoever_looks_for_the_primaries(self, scheme: str) -> None:
        with running_redis("--requirepass", "secret", "--cluster-enabled", "yes") as locked:
            backend = RedisBackend(parse_url(scheme.format(locked.address)), credentials="default:wrong")
            with pytest.raises(AuthenticationError, match="user or password is wrong") as caught:
                await backend.set("db", "k", "v", 60)
            assert (caught.value.attempts, caught.value.maybe_applied) == (1, False)
            assert "user or password is wrong" in (await backend.health() or "")
            with pytest.raises(AuthenticationError, match="user or password is wrong"):
                await next_of(backend.watch("db"), Lost)
            await backend.aclose()

    async def test_url_of_a_cluster_that_is_one_server_names_the_scheme_at_once(self, server: RedisServer) -> None:
        backend = RedisBackend(parse_url(f"redis+cluster://{server.address}"))
        with pytest.raises(RejectedError, match="no cluster; write redis://") as caught:
            await backend.get("db", "k")
        assert caught.value.attempts == 1
        assert "no cluster" in (await backend.health() or "")
        with pytest.raises(RejectedError, match="no cluster"):
            await next_of(backend.watch("db"), Lost)
        await backend.aclose()


class TestFaults:
    async def test_nobody_at_the_port_means_that_nothing_was_sent(self, open_redis: Opener) -> None:
        nobody = RedisServer.__new__(RedisServer)
        nobody.port = 1
        with pytest.raises(ConnectError) as caught:
            await open_redis(nobody, policy=QUICK).set("db", "k", "v", 60)
        assert not caught.value.maybe_applied
        assert caught.value.attempts > 3
        assert caught.value.elapsed is not None
        assert caught.value.elapsed <= 1.5

    async def test_caller_without_patience_fails_at_once(self, open_redis: Opener) -> None:
        nobody = RedisServer.__new__(RedisServer)
        nobody.port = 1
        token = is_patient.set(False)
        try:
            with pytest.raises(ConnectError) as caught:
                await open_redis(nobody).get("db", "k")
        finally:
            is_patient.reset(token)
        assert caught.value.attempts == 1

    async def test_one_attempt_is_one_attempt(self, open_redis: Opener) -> None:
        nobody = RedisServer.__new__(RedisServer)
        nobody.port = 1
        with pytest.raises(ConnectError) as caught:
            await open_redis(nobody, policy=RetryPolicy.none()).get("db", "k")
        assert caught.value.attempts == 1

    async def test_server_that_has_been_away_for_long_is_not_waited_for(self, open_redis: Opener) -> None:
        nobody = RedisServer.__new__(RedisServer)
        nobody.port = 1
        backend = open_redis(nobody, policy=RetryPolicy(total_timeout=0.5))
        with pytest.raises(ConnectError):
            await backend.get("db", "k")
        # A call ends before its time is up where its next wait would be too long.
        await asyncio.sleep(0.5)
        with pytest.raises(ConnectError) as caught:
            await backend.get("db", "k")
        assert caught.value.attempts == 1

    async def test_connections_that_the_server_has_closed_cost_no_call(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server, policy=RetryPolicy.none())
        await asyncio.gather(*(backend.set("db", f"k{i}", "v", 60) for i in range(20)))
        server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await asyncio.sleep(0.05)
        assert await asyncio.gather(*(backend.get("db", f"k{i}") for i in range(20))) == ["v"] * 20

    async def test_connections_that_are_cut_under_load_fail_no_call(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server)
        is_over = False

        async def work(number: int) -> int:
            count = 0
            while not is_over:
                await backend.set("db", f"k{number}", str(count), 60)
                assert await backend.get("db", f"k{number}") == str(count)
                count += 1
            return count

        tasks = [asyncio.create_task(work(number)) for number in range(10)]
        for _ in range(10):
            await asyncio.sleep(0.03)
            await asyncio.to_thread(server.ask, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        is_over = True
        assert min(await asyncio.gather(*tasks)) > 0

    async def test_write_without_an_answer_may_be_applied_and_the_next_one_is_last(self, open_redis: Opener) -> None:
        with running_redis() as server:
            backend = open_redis(server, policy=QUICK)
            await backend.set("db", "k", "first", 60)
            server.pause()
            with pytest.raises(CallTimeoutError) as caught:
                await backend.set("db", "k", "unknown", 60)
            assert caught.value.maybe_applied
            server.resume()
            await backend.set("db", "k", "last", 60)
            await asyncio.sleep(0.2)
            assert await backend.get("db", "k") == "last"

    async def test_restart_of_the_server_fails_no_call(self, open_redis: Opener) -> None:
        with running_redis("--appendonly", "yes", "--appendfsync", "always") as server:
            backend = open_redis(server)
            await backend.set("db", "k", "v", 60)
            server.kill()
            reading = asyncio.create_task(backend.get("db", "k"))
            writing = asyncio.create_task(backend.set("db", "other", "w", 60))
            await asyncio.sleep(0.3)
            server.start()
            await writing
            assert (await reading, await backend.get("db", "other")) == ("v", "w")

    async def test_calls_beyond_the_cap_wait_for_a_connection(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server, options=RedisOptions(max_connections=3))
        before = server.ask("INFO", "clients")["connected_clients"]
        await asyncio.gather(*(backend.set("db", f"k{i}", "v", 60) for i in range(200)))
        assert server.ask("INFO", "clients")["connected_clients"] - before <= 3

    async def test_cancelled_calls_never_give_others_their_answers(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server, options=RedisOptions(max_connections=4))
        await backend.set_many("db", [Entry(f"k{i}", f"v{i}", 60) for i in range(100)])
        for round_number in range(5):
            tasks = [asyncio.create_task(backend.get("db", f"k{i}")) for i in range(100)]
            await asyncio.sleep(0.001 * round_number)
            for task in tasks[::3]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            kept = [(i, result) for i, result in enumerate(results) if not isinstance(result, asyncio.CancelledError)]
            assert all(result == f"v{i}" for i, result in kept)

    async def test_later_write_of_a_key_waits_for_an_earlier_one_that_is_tried_again(self, open_redis: Opener) -> None:
        with running_redis() as server:
            backend = open_redis(server, policy=RetryPolicy(attempt_timeout=0.3))
            await backend.set("db", "k", "zero", 60)
            server.pause()
            first = asyncio.create_task(backend.set("db", "k", "first", 60))
            await asyncio.sleep(0.05)
            second = asyncio.create_task(backend.set_many("db", [Entry("k", "second", 60), Entry("j", "second", 60)]))
            await asyncio.sleep(0.4)
            server.resume()
            await asyncio.gather(first, second)
            assert await backend.get("db", "k") == "second"


class TestClosing:
    async def test_calls_under_way_end_with_the_store_closed(self, open_redis: Opener) -> None:
        with running_redis() as server:
            backend = open_redis(server)
            await backend.set("db", "k", "v", 60)
            server.pause()
            reading = asyncio.create_task(backend.get("db", "k"))
            await asyncio.sleep(0.05)
            await backend.aclose()
            with pytest.raises(StoreClosedError):
                await reading
            with pytest.raises(StoreClosedError):
                await backend.get("db", "k")

    async def test_closing_waits_for_writes(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server)
        writes = [asyncio.create_task(backend.set("db", f"k{i}", "v", 60)) for i in range(50)]
        await asyncio.sleep(0)
        await backend.aclose()
        assert await asyncio.gather(*writes) == [None] * 50


class TestDurability:
    async def test_write_that_no_replica_has_may_be_applied(self, server: RedisServer, open_redis: Opener) -> None:
        options = RedisOptions(durability="replicated", replication_timeout=0.1)
        backend = open_redis(server, policy=QUICK, options=options)
        with pytest.raises(CallTimeoutError, match="replicas") as caught:
            await backend.set("db", "k", "v", 60)
        assert (caught.value.maybe_applied, caught.value.transient) == (True, True)
        assert await backend.get("db", "k") == "v"

    async def test_store_whose_writes_no_replica_has_is_not_well(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server, options=RedisOptions(durability="replicated", replication_timeout=0.1))
        assert "0 of 1 replicas" in (await backend.health() or "")
        assert await open_redis(server).health() is None
        with running_redis("--replicaof", "127.0.0.1", str(server.port)):
            async with asyncio.timeout(10):
                while await backend.health() is not None:
                    await asyncio.sleep(0.1)

    @pytest.mark.slow
    async def test_lack_of_replicas_that_lasts_is_not_waited_for(self, server: RedisServer, open_redis: Opener) -> None:
        backend = open_redis(server, options=RedisOptions(durability="replicated"))
        with pytest.raises(CallTimeoutError, match="but not 1 of its replicas") as caught:
            await backend.set("db", "k", "v", 60)
        assert caught.value.attempts > 1
        assert caught.value.elapsed is not None
        assert caught.value.elapsed < 8
        # A get does not mean that there is a replica again.
        assert await backend.get("db", "k") == "v"
        with pytest.raises(CallTimeoutError) as caught:
            await backend.set("db", "k", "v", 60)
        assert caught.value.attempts == 1

    async def test_write_succeeds_once_a_replica_has_it(self, server: RedisServer, open_redis: Opener) -> None:
        with running_redis("--replicaof", "127.0.0.1", str(server.port)) as replica:
            backend = open_redis(server, options=RedisOptions(durability="replicated"))
            async with asyncio.timeout(15):
                while await backend.health() is not None:
                    await asyncio.sleep(0.05)
            await backend.set("db", "k", "v", 60)
            assert replica.ask("GET", entry_key("db", "k")) == b"v"
            await backend.set_many("db", [Entry(f"k{i}", "v", 60) for i in range(100)])
            assert await backend.delete_many("db", ["k", "k0"]) == [None, None]
            assert replica.ask("EXISTS", entry_key("db", "k"), entry_key("db", "k99")) == 1

    async def test_option_travels_with_the_store(self, server: RedisServer) -> None:
        url = f"redis://{server.address}"
        strict = RedisOptions(durability="replicated", replication_timeout=0.1)
        async with AsyncKVStore("db", url=url, redis=strict) as store:
            with pytest.raises(CallTimeoutError, match="replicas"):
                await store.with_options(timeout=0.5).set("k", "v", 60)
