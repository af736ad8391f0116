"""One account that floods the server, and another that is served all the same."""

import asyncio
from pathlib import Path

import orjson
import pytest
from helpers import served_process
from server_clients import CHUNKED, Answer, Connection, chunk, connected, head, put

from aiokv.server.access_file import add_key, change_limits

pytestmark = pytest.mark.slow


class Account:
    """A client with a token of its own, on one connection."""

    def __init__(self, connection: Connection, token: str) -> None:
        self.connection = connection
        self.token = f"Authorization: Bearer {token}"

    async def set(self, key: str, value: bytes = b"v") -> Answer:
        return await self.connection.ask(put(f"/set/db/{key}", value, self.token))

    async def get(self, key: str) -> Answer:
        return await self.connection.ask(head("GET", f"/get/db/{key}", self.token))

    async def delete(self, key: str) -> Answer:
        return await self.connection.ask(head("DELETE", f"/delete/db/{key}", self.token))


async def account(connection: Connection, key: str) -> Account:
    answer = await connection.ask(head("POST", "/storage/auth/token", f"Authorization: Key {key}", "Content-Length: 0"))
    assert answer.status == 200
    return Account(connection, orjson.loads(answer.body)["token"])


async def test_flood_of_requests_is_refused_for_its_account_alone_until_its_limit_is_lifted(tmp_path: Path) -> None:
    file = tmp_path / "access"
    keys = [add_key(file, "greedy"), add_key(file, "modest")]
    change_limits(file, "greedy", {"requests-per-second": "5"})
    arguments = ("--store", f"sqlite:///{tmp_path}/kv.db", "--access-file", str(file))
    with served_process(*arguments, home=tmp_path) as (_, address):
        async with connected(address) as first, connected(address) as second:
            greedy, modest = await account(first, keys[0]), await account(second, keys[1])
            flood = [await greedy.get("none") for _ in range(200)]
            refused = [answer for answer in flood if answer.status == 429]
            assert len(refused) >= 150
            assert {answer.headers["retry-after"] for answer in refused} == {"1"}
            assert refused[0].error()
            for number in range(50):
                assert (await modest.set(f"key{number}")).status == 200
            # Without a restart.
            change_limits(file, "greedy", {"requests-per-second": "none"})
            async with asyncio.timeout(10):
                while 429 in {(await greedy.get("none")).status for _ in range(50)}:
                    await asyncio.sleep(0.05)


async def test_flood_of_bytes_is_refused_with_the_name_of_the_quota_and_the_other_account_stores_on(tmp_path: Path) -> None:
    file = tmp_path / "access"
    keys = [add_key(file, "greedy"), add_key(file, "modest")]
    change_limits(file, "greedy", {"max-bytes": "500k"})
    arguments = ("--store", f"sqlite:///{tmp_path}/kv.db", "--access-file", str(file))
    with served_process(*arguments, home=tmp_path) as (_, address):
        async with connected(address) as first, connected(address) as second:
            greedy, modest = await account(first, keys[0]), await account(second, keys[1])
            answers = [await greedy.set(f"key{number}", b"v" * 50_000) for number in range(20)]
            assert [answer.status for answer in answers] == [200] * 10 + [507] * 10
            assert "max-bytes of account greedy is 500,000 bytes" in answers[-1].error()
            assert (await modest.set("key", b"v" * 50_000)).status == 200
            assert (await greedy.get("key0")).status == 200
            assert (await greedy.set("key0", b"v" * 49_999)).status == 200
            assert (await greedy.delete("key1")).status == 200
            assert (await greedy.set("new", b"v" * 50_000)).status == 200
            change_limits(file, "greedy", {"max-bytes": "1M"})
            async with asyncio.timeout(10):
                while (await greedy.set("more", b"v" * 50_000)).status == 507:
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("limit", ["max-entries", "max-bytes"])
async def test_sets_at_the_same_time_do_not_pass_a_quota_together(tmp_path: Path, limit: str, *, is_chunked: bool) -> None:
    file = tmp_path / "access"
    key = add_key(file, "greedy")
    change_limits(file, "greedy", {limit: "10" if limit == "max-entries" else "10k"})
    arguments = ("--store", f"sqlite:///{tmp_path}/kv.db", "--access-file", str(file))
    with served_process(*arguments, home=tmp_path) as (_, address):
        async with connected(address) as connection:
            token = (await account(connection, key)).token

        async def set_one(number: int) -> int:
            async with connected(address) as connection:
                if is_chunked:
                    request = head("PUT", f"/set/db/key{number}", token, CHUNKED) + chunk(b"v" * 1_000) + chunk(b"")
                else:
                    request = put(f"/set/db/key{number}", b"v" * 1_000, token)
                return (await connection.ask(request)).status

        statuses = await asyncio.gather(*(set_one(number) for number in range(100)))
        assert set(statuses) == {200, 507}
        assert 1 <= statuses.count(200) <= 10
        # One after the other, all that fits does fit.
        assert [await set_one(number) for number in range(100, 110)].count(200) == 10 - statuses.count(200)


async def test_keys_that_may_read_only_or_use_some_namespaces_are_held_to_that(tmp_path: Path) -> None:
    file = tmp_path / "access"
    keys = [add_key(file, "alice"), add_key(file, "alice", read_only=True), add_key(file, "alice", db_patterns=("cache-*",))]
    stranger = add_key(file, "bob")
    with served_process("--store", "memory://", "--access-file", str(file), home=tmp_path) as (_, address):
        async with connected(address) as connection:
            owner, reader, cacher = [await account(connection, key) for key in keys]
            other = await account(connection, stranger)
            assert (await owner.set("key", b"secret")).status == 200
            assert [(await call).status for call in (reader.set("key"), reader.get("key"), reader.delete("key"))] == [
                403,
                200,
                403,
            ]
            assert (await cacher.get("key")).status == 403
            assert (await connection.ask(put("/set/cache-1/key", b"v", cacher.token))).status == 200
            for path in ("/get/db/key", "/get/alice:db/key", "/get/alice%3Adb/key", "/get/..%2Falice:db/key"):
                assert (await connection.ask(head("GET", path, other.token))).status in {400, 404}
            assert (await other.delete("key")).status == 200
            assert (await owner.get("key")).value() == "secret"
