"""Everybody in a loop who uses one store knows whether it is well: reads and writes count, one probe looks, nobody waits."""

import asyncio
from typing import Any

import pytest
from caching_under_test import MovedTime, WatchedBackend, same_target, settle, watched_store

from aiokv import AsyncKVStore, CachedFunction, kv_cached, kv_cached_many

FUNCTIONS = 50
FAILURES = 3


def _functions(store: AsyncKVStore, count: int = FUNCTIONS, **options: Any) -> list[CachedFunction[[int], int]]:
    made = []
    for number in range(count):

        @kv_cached(600, **{"store": store, "key": lambda n: n, "prefix": f"function-{number}", "early": 0, **options})
        async def double(n: int) -> int:
            return 2 * n

        made.append(double)
    return made


async def _close(functions: list[CachedFunction[[int], int]]) -> None:
    for function in functions:
        await function.aclose()


def _asks(backend: WatchedBackend) -> int:
    # Probes and claims are asks, too.
    return len(backend.calls)


@pytest.mark.parametrize("failing", [{"get"}, {"set"}, {"get", "set"}, {"get", "set", "delete"}], ids=sorted)
def test_dead_store_is_asked_three_times_by_fifty_functions(failing: set[str], moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        backend.failing = failing
        functions = _functions(store)
        for n, function in enumerate(functions):
            assert await function(n) == 2 * n
        asked = [verb for verb, _ in backend.calls if verb in failing]
        assert len(asked) == FAILURES
        await _close(functions)

    moved_time.run(scenario())


def test_dead_store_is_known_to_every_store_object_and_to_many(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        backend.failing = {"get", "set"}
        functions = [_functions(same_target(store), 1)[0] for _ in range(FUNCTIONS)]
        for n, function in enumerate(functions):
            assert await function(n) == 2 * n

        @kv_cached_many(600, store=same_target(store), key=lambda n: n)
        async def doubles(ids: list[int]) -> dict[int, int]:
            return {n: 2 * n for n in ids}

        assert await doubles([1, 2, 3]) == {1: 2, 2: 4, 3: 6}
        assert _asks(backend) == FAILURES
        await _close(functions)
        await doubles.aclose()

    moved_time.run(scenario())


def test_failures_of_different_functions_and_of_reads_and_writes_add_up(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        one, two = _functions(store, 2)
        backend.failing = {"set"}
        await one(1)
        await two(1)
        backend.failing = {"get", "set"}
        await one(2)
        backend.calls.clear()
        assert await one(3) == await two(3) == 6
        assert _asks(backend) == 0
        await _close([one, two])

    moved_time.run(scenario())


@pytest.mark.parametrize("failing", [{"get"}, {"set"}, {"get", "set"}], ids=sorted)
def test_dead_store_is_probed_by_one_for_all(failing: set[str], moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        backend.failing = failing
        functions = _functions(store)
        for n, function in enumerate(functions):
            await function(n)
        backend.calls.clear()
        # A minute of outage, with every function called ten times a second.
        for _ in range(600):
            await asyncio.sleep(0.1)
            for n, function in enumerate(functions[::10]):
                assert await function(n) == 2 * n
        # Ever longer waits between probes; the first would be 120 at two a second.
        assert len([verb for verb, _ in backend.calls if verb in failing]) <= 20
        await _close(functions)

    moved_time.run(scenario())


def test_probe_that_hangs_is_not_joined_by_another(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        gates = [backend.hold("get"), backend.hold("set")]
        functions = _functions(store, 10)
        for n, function in enumerate(functions):
            assert await function(n) == 2 * n
        backend.cancelled.clear()
        backend.calls.clear()
        most = 0
        for _ in range(300):
            await asyncio.sleep(0.1)
            # Those that were given up have been cancelled.
            most = max(most, len(backend.calls) - len(backend.cancelled))
            await functions[0](99)
        assert most <= 1
        for gate in gates:
            gate.set()
        await _close(functions)

    moved_time.run(scenario())


@pytest.mark.parametrize("failing", [{"get"}, {"set"}, {"get", "set"}], ids=sorted)
def test_store_that_is_well_again_is_used_by_all_after_one_probe(failing: set[str], moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        backend.failing = failing
        functions = _functions(store)
        for n, function in enumerate(functions):
            await function(n)
        backend.failing = set()
        await asyncio.sleep(30)
        backend.calls.clear()
        for n, function in enumerate(functions):
            await function(n)
            await function(n)
        assert backend.asked("set") == FUNCTIONS
        assert all(function.info().hits == 1 for function in functions)
        await _close(functions)

    moved_time.run(scenario())


def test_probe_does_what_failed(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        backend.failing = {"set"}
        (function,) = functions = _functions(store, 1)
        for n in range(5):
            await function(n)
        backend.calls.clear()
        # Reads would find it well all the time.
        await asyncio.sleep(60)
        assert backend.calls
        assert {verb for verb, _ in backend.calls} >= {"set"}
        backend.calls.clear()
        for n in range(100, 150):
            assert await function(n) == 2 * n
        assert backend.asked("set") == 0
        await _close(functions)

    moved_time.run(scenario())


def test_probe_leaves_nothing_of_its_own_for_long(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        backend.failing = {"set"}
        (function,) = functions = _functions(store, 1)
        for n in range(5):
            await function(n)
        backend.failing = set()
        await asyncio.sleep(30)
        assert await function(99) == 198
        kept = {key for _, key in backend._entries} - {function.key(99)}
        # A key of the probe's own, which expires in a minute or so.
        assert len(kept) <= 1
        moved_time.advance(600)
        assert all([await backend.get("db", key) is None for key in kept])
        await _close(functions)

    moved_time.run(scenario())


@pytest.mark.parametrize("write", ["await", "background"])
@pytest.mark.parametrize("hot", ["stored before", "never stored"])
def test_hot_key_does_not_wait_for_writes_that_hang(write: str, hot: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        (function,) = functions = _functions(store, 1, write=write)
        if hot == "stored before":
            await function(1)
            moved_time.advance(601)
        gate = backend.hold("set")
        waits = []
        for _ in range(200):
            before = moved_time.elapsed
            assert await function(1) == 2
            waits.append(moved_time.elapsed - before)
            moved_time.advance(0.05)
        # Until the third failure a caller may wait for as long as a read may take.
        assert sum(wait > 0 for wait in waits) <= FAILURES
        assert max(waits) <= 1.001
        assert not any(waits[20:])
        gate.set()
        await _close(functions)

    moved_time.run(scenario())


def test_hot_keys_of_many_functions_wait_three_times_in_all(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        functions = _functions(store, 10)
        gate = backend.hold("set")
        waited = 0
        for _ in range(30):
            for function in functions:
                before = moved_time.elapsed
                assert await function(1) == 2
                waited += moved_time.elapsed > before
        assert waited <= FAILURES
        gate.set()
        await _close(functions)

    moved_time.run(scenario())


def test_stored_results_are_hits_where_another_keys_write_hangs(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        (function,) = functions = _functions(store, 1)
        await function(1)
        gate = backend.hold("set")
        await function(2)
        before, hits = moved_time.elapsed, function.info().hits
        assert await function(1) == 2
        assert (moved_time.elapsed, function.info().hits) == (before, hits + 1)
        gate.set()
        await _close(functions)

    moved_time.run(scenario())


def test_results_are_stored_again_once_writes_land(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        (function,) = functions = _functions(store, 1)
        gate = backend.hold("set")
        for _ in range(20):
            await function(1)
        gate.set()
        backend.gates.clear()
        await asyncio.sleep(30)
        await settle()
        await function(2)
        hits = function.info().hits
        assert await function(2) == 4
        assert await function(1) == 2
        assert function.info().hits >= hits + 1
        await _close(functions)

    moved_time.run(scenario())


def test_callers_at_once_of_a_store_that_hangs_wait_once(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        gates = [backend.hold("get"), backend.hold("set")]
        functions = _functions(store)
        before = moved_time.elapsed
        results = await asyncio.gather(*(function(n) for n, function in enumerate(functions)))
        assert results == [2 * n for n in range(FUNCTIONS)]
        assert moved_time.elapsed - before <= 1.001
        before = moved_time.elapsed
        await asyncio.gather(*(function(n) for n, function in enumerate(functions)))
        assert moved_time.elapsed == before
        for gate in gates:
            gate.set()
        await _close(functions)

    moved_time.run(scenario())


def test_breaker_of_one_target_is_nothing_to_another(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        broken_backend, broken = watched_store(moved_time.now)
        _, well = watched_store(moved_time.now)
        broken_backend.failing = {"get", "set"}
        of_broken, of_well = _functions(broken, 1)[0], _functions(well, 1)[0]
        for n in range(5):
            await of_broken(n)
        await of_well(1)
        await of_well(1)
        assert of_well.info().hits == 1
        await _close([of_broken, of_well])

    moved_time.run(scenario())
