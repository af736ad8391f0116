"""A claim of a refresh lives as long as the computation it stands for, and no longer than that where its owner is gone."""

import asyncio
from typing import Any

import pytest
from caching_under_test import MovedTime, WatchedBackend, settle, twin_stores

from aiokv import AsyncKVStore, kv_cached, kv_cached_many


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

            for verb in ("set", "get", "delete"):
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
        backend.failing = {"set"}
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
