"""Servers on Redis: several before one cluster, and what a server says of a store that it cannot reach."""

import asyncio
import contextlib
import http.client
import json
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from helpers import clean_environment, served_process
from redis_servers import RedisCluster, RedisServer, may_start_cluster, needs_server, running_redis

from aiokv import AsyncKVStore
from aiokv.server import add_key
from aiokv.wire import TOKEN_PATH

pytestmark = [needs_server, may_start_cluster]


class Balancer:
    """One port in front of several servers, of which it takes the next one that accepts a connection."""

    def __init__(self) -> None:
        self.upstreams: list[int] = []
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        ends = [writer]
        try:
            for _ in self.upstreams:
                self._count += 1
                with contextlib.suppress(OSError):
                    port = self.upstreams[self._count % len(self.upstreams)]
                    answers, upstream = await asyncio.open_connection("127.0.0.1", port)
                    ends.append(upstream)
                    await asyncio.gather(_pump(reader, upstream), _pump(answers, writer))
                    break
        except asyncio.CancelledError:
            return
        finally:
            for end in ends:
                end.close()


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65_536):
            target.write(data)
            await target.drain()
    with contextlib.suppress(OSError):
        target.write_eof()


def port_of(address: str) -> int:
    port = urlsplit(address).port
    assert port is not None
    return port


def ask(address: str, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(address), timeout=15)
    try:
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def refusal_of(*arguments: str, home: Path) -> str:
    """Run a server that should not start; return what it says."""
    command = [sys.executable, "-m", "aiokv", "serve", "--port", "0", *arguments]
    ended = subprocess.run(
        command, env=clean_environment(home), cwd=home, capture_output=True, text=True, timeout=15, check=False
    )
    assert ended.returncode == 2
    return ended.stderr


@pytest.mark.slow
async def test_either_of_two_servers_may_stop_without_a_failed_call(redis_cluster: RedisCluster, tmp_path: Path) -> None:
    key = add_key(tmp_path / "access", "alice")
    # Each on its own machine, with a copy of the access file: it holds the key that signs tokens.
    shutil.copy(tmp_path / "access", tmp_path / "copy")
    options = [("--store", redis_cluster.url, "--access-file", str(tmp_path / name)) for name in ("access", "copy")]
    failed: list[Exception] = []
    written: dict[str, str] = {}
    is_over = False
    balancer = Balancer()

    async def work(store: AsyncKVStore, number: int) -> None:
        count = 0
        while not is_over:
            count += 1
            try:
                await store.set(f"k{number}-{count}", str(count), 600)
                written[f"k{number}-{count}"] = str(count)
                await store.get(f"k{number}-{count}")
            except Exception as error:  # noqa: BLE001 (any is a failed call)
                failed.append(error)
            await asyncio.sleep(0.01)

    with contextlib.ExitStack() as servers:
        running = [await asyncio.to_thread(servers.enter_context, served_process(*option, home=tmp_path)) for option in options]
        balancer.upstreams = [port_of(address) for _, address in running]
        async with balancer.running() as url, AsyncKVStore("db", url=url, credentials=key) as store:
            tasks = [asyncio.create_task(work(store, number)) for number in range(10)]
            await asyncio.sleep(1)
            running[0][0].terminate()
            await asyncio.to_thread(running[0][0].wait, 15)
            await asyncio.sleep(1)
            again, address = await asyncio.to_thread(servers.enter_context, served_process(*options[0], home=tmp_path))
            balancer.upstreams = [port_of(address), balancer.upstreams[1]]
            await asyncio.sleep(0.5)
            running[1][0].terminate()
            await asyncio.to_thread(running[1][0].wait, 15)
            await asyncio.sleep(1)
            is_over = True
            await asyncio.gather(*tasks)
            assert failed == []
            assert len(written) > 100
            assert await store.get_many(written) == written
            assert again.poll() is None


async def test_token_of_one_server_holds_at_another(redis_cluster: RedisCluster, tmp_path: Path) -> None:
    key = add_key(tmp_path / "access", "alice")
    shutil.copy(tmp_path / "access", tmp_path / "copy")
    with (
        served_process("--store", redis_cluster.url, "--access-file", str(tmp_path / "access"), home=tmp_path) as (_, one),
        served_process("--store", redis_cluster.url, "--access-file", str(tmp_path / "copy"), home=tmp_path) as (_, two),
    ):
        status, body = ask(one, "POST", TOKEN_PATH, "{}", Authorization=f"Key {key}")
        assert status in {200, 201}
        bearer = {"Authorization": f"Bearer {json.loads(body)['token']}"}
        assert ask(two, "PUT", "/set/db/k", "from two", **bearer)[0] == 200
        status, body = ask(one, "GET", "/get/db/k", **bearer)
        assert (status, json.loads(body)["value"]) == (200, "from two")
        assert ask(two, "GET", "/get/db/k")[0] == 401


async def test_workers_share_the_server(redis_server: RedisServer, tmp_path: Path) -> None:
    store = f"redis://{redis_server.address}"
    with served_process("--store", store, "--workers", "2", home=tmp_path) as (_, address):
        assert ask(address, "PUT", "/set/db/k", "v")[0] == 200
        assert [ask(address, "GET", "/get/db/k")[0] for _ in range(6)] == [200] * 6
        assert ask(address, "GET", "/readyz")[0] == 200


async def test_server_is_not_ready_while_redis_takes_no_writes(tmp_path: Path) -> None:
    with (
        running_redis() as redis_server,
        served_process("--store", f"redis://{redis_server.address}", home=tmp_path) as (_, address),
    ):
        assert ask(address, "GET", "/readyz")[0] == 200
        redis_server.ask("CONFIG", "SET", "maxmemory", "1")
        await asyncio.sleep(1.1)
        status, body = await asyncio.to_thread(ask, address, "GET", "/readyz")
        assert status == 503
        assert "takes no writes" in body
        assert ask(address, "PUT", "/set/db/k", "v")[0] == 507


@pytest.mark.parametrize("quota", ["--max-stored-bytes=1MB", "--max-stored-entries=5"])
def test_quotas_that_nobody_could_keep_are_refused_at_the_start(redis_server: RedisServer, tmp_path: Path, quota: str) -> None:
    said = refusal_of("--store", f"redis://{redis_server.address}", quota, home=tmp_path)
    assert "cannot count what an account stores" in said


def test_quotas_of_the_access_file_are_refused_likewise(redis_server: RedisServer, tmp_path: Path) -> None:
    add_key(tmp_path / "access", "alice")
    with (tmp_path / "access").open("a") as file:
        file.write("@limits alice max-bytes=1000\n")
    options = ("--store", f"redis://{redis_server.address}", "--access-file", str(tmp_path / "access"))
    assert "cannot count what an account stores" in refusal_of(*options, home=tmp_path)


def test_durability_is_one_of_two_words(tmp_path: Path) -> None:
    assert "acked or replicated" in refusal_of("--durability", "safe", home=tmp_path)


def test_durability_of_a_store_that_knows_none_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    options = ("--store", f"sqlite:///{tmp_path}/x.db", "--durability", "replicated", "--access-log", str(tmp_path / "log"))
    assert "Redis or Valkey" in refusal_of(*options, home=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
async def test_server_whose_sets_no_replica_gets_is_not_ready_and_says_why(redis_server: RedisServer, tmp_path: Path) -> None:
    store = f"redis://{redis_server.address}"
    with served_process("--store", store, "--durability", "replicated", home=tmp_path) as (_, address):
        status, body = await asyncio.to_thread(ask, address, "GET", "/readyz")
        assert status == 503
        assert "0 of 1 replicas" in body
        # A client gives an attempt up after 10 s.
        started = time.monotonic()
        status, body = await asyncio.to_thread(ask, address, "PUT", "/set/db/k", "secret")
        assert time.monotonic() - started < 9
        assert status == 503
        assert "the primary has the write, but not 1 of its replicas" in body
        assert "secret" not in body
