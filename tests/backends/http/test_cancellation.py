"""Calls cancelled at any moment leave nothing behind, and disturb nobody."""

import asyncio
import gc
import itertools
import random
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from aiokv import AsyncKVStore, HedgePolicy, HttpOptions
from aiokv.backends.http.backend import RemoteBackend
from aiokv.testing import ScriptedService
from aiokv.wire import TOKEN_PATH

AT_ONCE = 100
POOL_SIZE = 50


class Service:
    """Answers each key with a value of its own, after a moment that nobody can foresee."""

    def __init__(self) -> None:
        self.dice = random.Random(1)
        self.exchanges = 0
        self.calls = 0
        self.living = ""

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.raw_path == TOKEN_PATH:
            self.exchanges += 1
            await asyncio.sleep(0.02)
            self.living = f"t{self.exchanges}"
            expiry = "2100-01-01T00:00:00Z"
            return web.json_response({"token": self.living, "token_type": "Bearer", "expires_at": expiry})
        self.calls += 1
        if self.calls % 500 == 0:
            # Renewals are cancelled, too.
            self.living = ""
        if request.headers["Authorization"] != f"Bearer {self.living}":
            return web.json_response({"error": "no"}, status=401)
        if self.dice.random() < 0.05:
            await asyncio.sleep(0.02)
        elif self.dice.random() < 0.5:
            await asyncio.sleep(self.dice.random() * 0.004)
        return web.json_response({"value": f"of {request.raw_path.rpartition('/')[2].partition('?')[0]}"})


def remote_behind(store: AsyncKVStore) -> RemoteBackend:
    backend = store._backend_here()
    assert isinstance(backend, RemoteBackend)
    return backend


def connections_in_use(backend: RemoteBackend) -> int:
    connector: Any = backend._transport._session.connector
    assert isinstance(connector, aiohttp.TCPConnector)
    return len(connector._acquired)


# Eight seconds where nothing else runs; the limit is for machines where much does.
@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("hedge", "count"), [(None, 10_000), (HedgePolicy(quantile=0.5, max_extra=0.5), 3_000)], ids=["not hedged", "hedged"]
)
@pytest.mark.slow
async def test_cancelled_calls_leave_nothing_behind_and_disturb_nobody(hedge: HedgePolicy | None, count: int) -> None:
    dice = random.Random(2)
    loop = asyncio.get_running_loop()
    cancelled = disturbed = answered = 0

    async def call(store: AsyncKVStore, number: int) -> None:
        # Each writer has keys of its own; readers are many to a key.
        if number % 4 == 0:
            await (store.set(f"w{number}", "v") if number % 8 else store.delete(f"w{number % 400}"))
        else:
            key = f"k{number % 97}"
            assert await store.get(key) == f"of {key}"

    async def work(store: AsyncKVStore, numbers: Any) -> None:
        nonlocal cancelled, disturbed, answered
        while cancelled < count:
            number = next(numbers)
            task = asyncio.create_task(call(store, number))
            # At once, in the middle, and long after the end; a third are not cancelled at all.
            timer = loop.call_later(dice.random() ** 2 * 0.05, task.cancel) if number % 3 else None
            try:
                await task
                answered += 1
            except asyncio.CancelledError:
                cancelled += 1
                disturbed += timer is None
            finally:
                if timer is not None:
                    timer.cancel()

    service = Service()
    async with ScriptedService(handler=service) as recorded:
        url = recorded.url
        options = HttpOptions(pool_size=POOL_SIZE)
        async with AsyncKVStore("db", url=url, credentials="id:secret", http=options, hedge=hedge or False) as store:
            before = asyncio.all_tasks()
            numbers = itertools.count()
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(work(store, numbers))
            backend = remote_behind(store)
            async with asyncio.timeout(5):
                while (
                    backend._tokens is not None and backend._tokens._renewal is not None and not backend._tokens._renewal.done()
                ):
                    await asyncio.sleep(0.005)
                # What was cancelled last is still on its way out.
                while connections_in_use(backend):
                    await asyncio.sleep(0.005)
            assert disturbed == 0
            assert service.exchanges > 3
            assert answered >= count // 2
            assert cancelled >= count
            assert {task for task in asyncio.all_tasks() - before if "aiokv" in task.get_name()} == set()
            assert backend._transport._slots._value == POOL_SIZE
            assert backend._last_writes == {}
            recorded.requests.clear()
            assert await store.get_many([f"k{number}" for number in range(200)]) == {
                f"k{number}": f"of k{number}" for number in range(200)
            }
    # Whatever was lost on the way says so here, which is an error.
    gc.collect()
