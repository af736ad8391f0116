"""A claim of a refresh lives as long as the computation it stands for, and no longer than that where its owner is gone.

What holds of claims holds of the hints that stand for them in a store that has none, but that two may go ahead at once.
"""

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from caching_under_test import MovedTime, WatchedBackend, settle, twin_stores
from helpers import clean_environment

from aiokv import AsyncKVStore, kv_cached, kv_cached_many
from aiokv.backends.capabilities import Capabilities


class Process:
    """What one process has: its own store object of its own target, its own decorated function, and its runs."""

    def __init__(self, of: str, store: AsyncKVStore, name: str, runs: list[str]) -> None:
        self.name = name
        self.runs = runs
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None
        options: dict[str, Any] = {
            "store": store,
            "key": lambda *_: "one",
            "prefix": "claimed",
            "early": 0,
            "stale_while_revalidate": 86_400,
        }
        if of == "one":

            @kv_cached(60, **options)
            async def one() -> str:
                return await self._compute()

            self.cached: Any = one
            self.call: Any = one
            return

        @kv_cached_many(60, **options)
        async def many(ids: list[int]) -> dict[int, str]:
            return dict.fromkeys(ids, await self._compute())

        async def call() -> str:
            return (await many([1]))[1]

        self.cached, self.call = many, call

    async def _compute(self) -> str:
        self.runs.append(self.name)
        run = len(self.runs)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return f"{self.name} {run}"

    def hold(self) -> asyncio.Event:
        self.gate = asyncio.Event()
        return self.gate


@pytest.fixture(params=["claims", "hints"], autouse=True)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test over a store that has claims, and over one that has none."""
    if request.param == "hints":
        monkeypatch.setattr(WatchedBackend, "capabilities", Capabilities())
    return str(request.param)


def _two(of: str, moved: MovedTime) -> tuple[WatchedBackend, Process, Process, list[str]]:
    backend, store, twin = twin_stores(moved.now)
    runs: list[str] = []
    return backend, Process(of, store, "a", runs), Process(of, twin, "b", runs), runs


@pytest.mark.parametrize("seconds", [5, 59, 61, 150, pytest.param(3_600, marks=pytest.mark.slow)])
def test_refresh_under_way_elsewhere_is_not_begun_again_however_long_it_takes(
    seconds: int, of: str, moved_time: MovedTime
) -> None:
    async def scenario() -> None:
        _, a, b, runs = _two(of, moved_time)
        await a.call()
        moved_time.advance(100)
        gate = a.hold()
        assert await a.call() == "a 1"
        await settle(100)
        assert runs == ["a", "a"]
        end = moved_time.elapsed + seconds
        while moved_time.elapsed < end:
            # Timers, such as those that renew claims, have their turn.
            await asyncio.sleep(min(1, end - moved_time.elapsed) + 0.001)
            assert await b.call() == "a 1"
        assert runs == ["a", "a"]
        gate.set()
        await settle(100)
        assert await b.call() == "a 2"
        assert runs == ["a", "a"]
        await a.cached.aclose()
        await b.cached.aclose()

    moved_time.run(scenario())


def test_claim_ends_with_its_computation(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        _, a, b, runs = _two(of, moved_time)
        await a.call()
        moved_time.advance(100)
        await a.call()
        await settle(100)
        assert runs == ["a", "a"]
        # Stale again: the claim of before is nobody's hindrance.
        moved_time.advance(100)
        await b.call()
        await settle(100)
        assert runs == ["a", "a", "b"]
        assert await a.call() == "b 3"

    moved_time.run(scenario())


def test_claim_of_a_computation_that_failed_holds_others_up_for_seconds_only(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        _, a, b, runs = _two(of, moved_time)
        await a.call()
        moved_time.advance(100)
        a.error = LookupError("upstream")
        assert await a.call() == "a 1"
        await settle(100)
        assert runs == ["a", "a"]
        for _ in range(10):
            await asyncio.sleep(1)
            await b.call()
            await settle(100)
        assert "b" in runs
        assert (await b.call()).startswith("b")

    moved_time.run(scenario())


def test_claim_of_a_process_that_is_gone_runs_out(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        _, a, b, runs = _two(of, moved_time)
        await a.call()
        moved_time.advance(100)
        a.hold()
        await a.call()
        await settle(100)
        assert runs == ["a", "a"]
        # Nothing of its loop goes on, nor is anything of it undone, as after SIGKILL.
        gone = asyncio.all_tasks() - {asyncio.current_task()}
        with pytest.MonkeyPatch.context() as patch:

            async def nothing(*_: object) -> None:
                await asyncio.sleep(0)

            for verb in ("set", "get", "delete", "claim", "release"):
                patch.setattr(WatchedBackend, verb, nothing)
            for task in gone:
                task.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
        for _ in range(120):
            await asyncio.sleep(1)
            await b.call()
            await settle(100)
        assert "b" in runs
        assert (await b.call()).startswith("b")
        await b.cached.aclose()

    moved_time.run(scenario())


def test_claim_that_cannot_be_renewed_stops_nobody(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, a, _, runs = _two(of, moved_time)
        await a.call()
        moved_time.advance(100)
        gate = a.hold()
        await a.call()
        await settle(100)
        backend.failing = {"set", "claim"}
        await asyncio.sleep(200)
        backend.failing = set()
        gate.set()
        await asyncio.sleep(60)
        assert await a.call() in {"a 1", "a 2", "a 3"}
        await settle(100)
        assert (await a.call()) != "a 1"
        assert len(runs) <= 3
        await a.cached.aclose()

    moved_time.run(scenario())


def test_of_two_processes_that_come_at_once_one_computes(of: str, by: str, moved_time: MovedTime) -> None:
    if by == "hints":
        pytest.skip("without an atomic operation two may go ahead")

    async def scenario() -> None:
        _, a, b, runs = _two(of, moved_time)
        await a.call()
        moved_time.advance(100)
        gates = (a.hold(), b.hold())
        assert await asyncio.gather(a.call(), b.call()) == ["a 1", "a 1"]
        await settle(100)
        assert len(runs) == 2
        for gate in gates:
            gate.set()
        await a.cached.aclose()
        await b.cached.aclose()

    moved_time.run(scenario())


def test_process_that_gets_the_claim_behind_another_takes_what_that_has_stored(of: str, by: str, moved_time: MovedTime) -> None:
    if by == "hints":
        pytest.skip("a hint is not given back")

    async def scenario() -> None:
        backend, a, b, runs = _two(of, moved_time)
        await a.call()
        moved_time.advance(100)
        gate = a.hold()
        await a.call()
        await settle(100)
        claiming = backend.hold("claim")
        assert await b.call() == "a 1"
        await settle(100)
        gate.set()
        await settle(100)
        assert [verb for verb, _ in backend.calls].count("release") == 1
        claiming.set()
        await settle(100)
        assert runs == ["a", "a"]
        assert await b.call() == "a 2"

    moved_time.run(scenario())


def test_store_whose_claims_hang_holds_nobody_up_for_longer_than_a_read(of: str, by: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, a, _, runs = _two(of, moved_time)
        await a.call()
        moved_time.advance(100)
        backend.hold("claim" if by == "claims" else "set")
        await a.call()
        await asyncio.sleep(1.001)
        await settle(100)
        assert runs == ["a", "a"]
        for gate in backend.gates.values():
            gate.set()
        await a.cached.aclose()

    moved_time.run(scenario())


def test_claims_of_a_cache_that_is_closed_are_given_back(of: str, by: str, moved_time: MovedTime) -> None:
    if by == "hints":
        pytest.skip("a hint is not given back")

    async def scenario() -> None:
        backend, a, b, runs = _two(of, moved_time)
        await a.call()
        moved_time.advance(100)
        a.hold()
        await a.call()
        await settle(100)
        await a.cached.aclose()
        taken = {key for verb, key in backend.calls if verb == "claim"}
        assert [key for verb, key in backend.calls if verb == "release"] == list(taken)
        await b.call()
        await settle(100)
        assert runs == ["a", "a", "b"]

    moved_time.run(scenario())


PROCESS = """
import asyncio, sys, time
from aiokv import AsyncKVStore, kv_cached

store = AsyncKVStore("db", url=sys.argv[1])

@kv_cached(1, store=store, prefix="claimed", version=1, early=0, stale_while_revalidate=3_600)
async def slow() -> int:
    print("computed", flush=True)
    await asyncio.sleep(2.5)
    return 1

async def main():
    if sys.argv[2] == "first":
        return await slow()
    # All call within the time that one computation takes, longer than a claim lasts without renewal.
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        await slow()
        await asyncio.sleep(0.02)
    await slow.aclose()

asyncio.run(main())
"""


@pytest.mark.slow
def test_one_of_several_processes_refreshes_what_a_file_holds(tmp_path: Path, by: str) -> None:
    if by == "hints":
        pytest.skip("processes of their own use what the store has")

    def start(role: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", PROCESS, f"sqlite:///{tmp_path}/kv.db", role]
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=clean_environment(tmp_path), text=True)

    def computations(*processes: "subprocess.Popen[str]") -> int:
        outputs = [process.communicate(timeout=15)[0] for process in processes]
        assert {process.returncode for process in processes} == {0}
        return sum(output.count("computed") for output in outputs)

    assert computations(start("first")) == 1
    time.sleep(1.1)
    assert computations(*(start("refreshing") for _ in range(3))) == 1
