"""Large values go out a few at a time, in their order, so that a burst of them is not refused by a server's bounds."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokv import AsyncKVStore, PoolTimeoutError
from aiokv.backends.http.room import LARGE_BYTES, Room
from aiokv.backends.memory import MemoryBackend
from aiokv.server.options import ServerOptions
from aiokv.server.serve import running_server

MIB = 2**20


def soon(seconds: float = 5) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_burst_of_large_values_fails_no_call() -> None:
    options = ServerOptions(max_bytes_in_flight=24 * MIB)
    async with (
        running_server(MemoryBackend(), options=options) as url,
        AsyncKVStore("db", url=url) as store,
        asyncio.timeout(15),
        asyncio.TaskGroup() as group,
    ):
        # All of them, or one wave of refusals, would spend the quota of retries.
        for number in range(150):
            group.create_task(store.set(f"k{number}", "x" * 1_800_000))


class Holding(MemoryBackend):
    """Holds sets of large values up."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()
        self.under_way_bytes = self.most_bytes = 0

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        if len(value) > LARGE_BYTES:
            self.under_way_bytes += len(value)
            self.most_bytes = max(self.most_bytes, self.under_way_bytes)
            await self.go_on.wait()
            self.under_way_bytes -= len(value)
        await super().set(db_name, key, value, ttl_seconds)


@contextlib.asynccontextmanager
async def holding() -> AsyncGenerator[tuple[Holding, AsyncKVStore]]:
    backend, options = Holding(), ServerOptions(max_bytes_in_flight=256 * MIB)
    async with (
        running_server(backend, options=options, drain_seconds=0) as url,
        AsyncKVStore("db", url=url) as store,
    ):
        yield backend, store


async def test_values_under_way_are_bounded_and_small_ones_pass_by() -> None:
    async with holding() as (backend, store):
        large = [asyncio.create_task(store.set(f"k{number}", "x" * 1_500_000)) for number in range(30)]
        async with asyncio.timeout(5):
            while backend.under_way_bytes < 16 * MIB - 1_500_000:
                await asyncio.sleep(0.005)
        await store.set("small", "v")
        backend.go_on.set()
        await asyncio.gather(*large)
    assert 8 * MIB < backend.most_bytes <= 16 * MIB


async def test_value_that_finds_no_room_in_time_says_that_nothing_was_sent() -> None:
    async with holding() as (backend, store):
        large = [asyncio.create_task(store.set(f"k{number}", "x" * 1_800_000)) for number in range(9)]
        await asyncio.sleep(0)
        with pytest.raises(PoolTimeoutError, match="large values of this process were under way until the deadline") as late:
            await store.with_options(timeout=0.2).set("late", "x" * 1_800_000)
        assert not late.value.maybe_applied
        backend.go_on.set()
        await asyncio.gather(*large)
        assert await store.get("late") is None


async def test_reads_of_many_long_keys_wait_for_no_room() -> None:
    async with running_server(MemoryBackend()) as url, AsyncKVStore("db", url=url) as store:
        await store.set("small", "v")
        backend: Any = store._backend_here()
        room = backend._transport._room
        await room.take(16 * MIB, soon())
        async with asyncio.timeout(5):
            found = await store.get_many([f"{number}".rjust(200, "k") for number in range(1000)])
        assert set(found.values()) == {None}
        room.give_back(16 * MIB)


async def test_room_is_given_in_the_order_of_asking_and_one_that_leaves_holds_nobody_up() -> None:
    room, taken = Room(10), []

    async def take(name: str, size_bytes: int) -> None:
        await room.take(size_bytes, soon())
        taken.append(name)

    await take("first", 8)
    waiting = {name: asyncio.create_task(take(name, size)) for name, size in (("wide", 9), ("narrow", 2), ("last", 8))}
    await asyncio.sleep(0)
    assert taken == ["first"]
    waiting["wide"].cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert taken == ["first", "narrow"]
    room.give_back(8)
    await asyncio.gather(*waiting.values(), return_exceptions=True)
    assert taken == ["first", "narrow", "last"]


async def test_body_that_is_larger_than_all_room_goes_alone() -> None:
    room = Room(10)
    await room.take(25, soon())
    with pytest.raises(PoolTimeoutError):
        await room.take(1, soon(0.01))
    room.give_back(25)
    await room.take(10, soon(0))


async def test_turn_that_comes_as_its_caller_leaves_is_not_lost() -> None:
    room = Room(10)
    await room.take(10, soon())
    leaving = asyncio.create_task(room.take(10, soon()))
    await asyncio.sleep(0)
    room.give_back(10)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await room.take(10, soon(0))


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3), st.booleans()), max_size=40))
def test_no_more_is_under_way_than_there_is_room_and_all_of_it_comes_back(asked: list[tuple[int, int, bool]]) -> None:
    async def use() -> None:
        room, held = Room(20), 0

        async def hold(size_bytes: int, turns: int) -> None:
            nonlocal held
            await room.take(size_bytes, soon())
            assert held + size_bytes <= 20 or held == 0
            held += size_bytes
            try:
                for _ in range(turns):
                    await asyncio.sleep(0)
            finally:
                held -= size_bytes
                room.give_back(size_bytes)

        tasks = [asyncio.create_task(hold(size_bytes, turns)) for size_bytes, turns, _ in asked]
        await asyncio.sleep(0)
        for task, (_, _, leaves) in zip(tasks, asked, strict=True):
            if leaves:
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [result for result in results if isinstance(result, AssertionError)]
        await room.take(20, soon(0))

    asyncio.run(use())
