"""A function that fails: stale results are served, attempts wait ever longer, and what failed in the background is told."""

import asyncio
from typing import Any

import pytest
from caching_under_test import Events, MovedTime, settle, watched_store

from aiokv import kv_cached, kv_cached_many

STEP = 0.25
WAITS = [1, 2, 4, 8, 16, 30, 30, 30]


class Upstream:
    """A function by either decorator, and when it was run."""

    def __init__(self, of: str, moved: MovedTime, **options: Any) -> None:
        self.moved = moved
        self.runs: list[float] = []
        self.error: Exception | None = None
        self.events = Events()
        options = {
            "store": watched_store(moved.now)[1],
            "key": lambda *ids: ids,
            "early": 0,
            "observer": self.events,
            **options,
        }
        self.cached: Any
        self.call: Any
        self.refresh: Any
        if of == "one":
            self.cached = self.call = kv_cached(60, **options)(self._compute)
            self.refresh = self.cached.refresh
            return

        @kv_cached_many(60, **options)
        async def many(ids: list[int]) -> dict[int, int]:
            return dict.fromkeys(ids, await self._compute())

        async def call() -> int:
            return (await many([1]))[1]

        self.cached, self.call = many, call
        self.refresh = lambda: self.cached.refresh([1])

    async def _compute(self) -> int:
        self.runs.append(self.moved.elapsed)
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return len(self.runs)

    async def poll(self, seconds: float) -> list[int]:
        """Call again and again; return what was served."""
        served = []
        for _ in range(int(seconds / STEP)):
            served.append(await self.call())
            await settle(50)
            await asyncio.sleep(STEP)
        return served

    def waits(self) -> list[float]:
        return [later - sooner for sooner, later in zip(self.runs[1:], self.runs[2:], strict=False)]


def _nearly(waits: list[float]) -> Any:
    # Calls come every quarter of a second.
    return pytest.approx(WAITS[: len(waits)], abs=STEP + 0.01)


def test_attempts_wait_from_one_second_to_thirty_while_stale_is_served(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        upstream = Upstream(of, moved_time, stale_if_error=3_600)
        await upstream.call()
        moved_time.advance(100)
        upstream.error = LookupError("upstream")
        assert set(await upstream.poll(150)) == {1}
        assert len(upstream.waits()) >= 7
        assert upstream.waits() == _nearly(upstream.waits())
        assert upstream.cached.info().stale_hits == 600

    moved_time.run(scenario())


def test_attempts_of_background_refreshes_wait_likewise(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        upstream = Upstream(of, moved_time, stale_while_revalidate=3_600, stale_if_error=3_600)
        await upstream.call()
        moved_time.advance(100)
        upstream.error = LookupError("upstream")
        assert set(await upstream.poll(150)) == {1}
        # Another bound, such as a claim's, may make it wait for longer.
        assert 5 <= len(upstream.runs) <= 10
        await upstream.cached.aclose()

    moved_time.run(scenario())


def test_success_begins_the_waits_anew(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        upstream = Upstream(of, moved_time, stale_if_error=3_600)
        await upstream.call()
        moved_time.advance(100)
        upstream.error = LookupError("upstream")
        await upstream.poll(10)
        upstream.error = None
        served = await upstream.poll(40)
        assert served[-1] == len(upstream.runs)
        upstream.runs.clear()
        moved_time.advance(100)
        upstream.error = LookupError("upstream")
        await upstream.poll(6)
        assert [later - sooner for sooner, later in zip(upstream.runs, upstream.runs[1:], strict=False)][:2] == pytest.approx(
            [1, 2], abs=STEP + 0.01
        )

    moved_time.run(scenario())


def test_without_anything_to_serve_every_call_runs_and_raises(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        upstream = Upstream(of, moved_time, stale_if_error=3_600)
        upstream.error = LookupError("upstream")
        for _ in range(5):
            with pytest.raises(LookupError):
                await upstream.call()
        assert len(upstream.runs) == 5

    moved_time.run(scenario())


def test_past_its_last_hour_a_stale_result_is_not_served_for_the_sake_of_a_wait(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        upstream = Upstream(of, moved_time, stale_if_error=100)
        await upstream.call()
        moved_time.advance(100)
        upstream.error = LookupError("upstream")
        await upstream.poll(40)
        moved_time.advance(100)
        with pytest.raises(LookupError):
            await upstream.call()

    moved_time.run(scenario())


def test_refresh_that_was_asked_for_does_not_wait(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        upstream = Upstream(of, moved_time, stale_if_error=3_600)
        await upstream.call()
        moved_time.advance(100)
        upstream.error = LookupError("upstream")
        await upstream.call()
        upstream.error = None
        assert await upstream.refresh() in (3, {1: 3})
        assert await upstream.call() == 3

    moved_time.run(scenario())


def test_one_key_that_fails_holds_no_other_up(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        runs: list[int] = []

        @kv_cached(60, store=watched_store(moved_time.now)[1], key=lambda n: n, early=0, stale_if_error=3_600)
        async def numbered(n: int) -> int:
            runs.append(n)
            if n == 1 and len(runs) > 2:
                raise LookupError("upstream")
            return n

        await numbered(1)
        await numbered(2)
        moved_time.advance(100)
        for _ in range(3):
            assert (await numbered(1), await numbered(2)) == (1, 2)
        assert runs == [1, 2, 1, 2]

    moved_time.run(scenario())


def test_errors_that_do_not_count_are_raised_and_make_nobody_wait(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        upstream = Upstream(of, moved_time, stale_if_error=3_600, error_types=(ConnectionError,))
        await upstream.call()
        moved_time.advance(100)
        upstream.error = LookupError("a mistake of the program")
        for _ in range(3):
            with pytest.raises(LookupError):
                await upstream.call()
        assert len(upstream.runs) == 4

    moved_time.run(scenario())


def test_failure_in_the_background_is_told_and_counted(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        upstream = Upstream(of, moved_time, stale_while_revalidate=3_600)
        await upstream.call()
        moved_time.advance(100)
        upstream.error = LookupError("s3cret")
        assert await upstream.call() == 1
        await settle(100)
        assert upstream.cached.info().background_errors == 1
        assert upstream.events.count("background_error") == 1
        (event,) = [event for event in upstream.events.seen if event.kind == "background_error"]
        assert event.key == upstream.events.seen[0].key
        assert "s3cret" not in repr(event)

    moved_time.run(scenario())


def test_failure_that_its_caller_sees_is_no_background_failure(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        upstream = Upstream(of, moved_time)
        upstream.error = LookupError("upstream")
        with pytest.raises(LookupError):
            await upstream.call()
        assert upstream.cached.info().background_errors == 0
        assert upstream.events.count("background_error") == 0

    moved_time.run(scenario())


@pytest.mark.parametrize("callers", [1, 2, 10])
def test_those_who_joined_are_counted_and_told(callers: int, of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        upstream = Upstream(of, moved_time)
        await asyncio.gather(*(upstream.call() for _ in range(callers)))
        info = upstream.cached.info()
        assert (info.misses, info.computations, info.joined) == (1, 1, callers - 1)
        assert upstream.events.count("joined") == callers - 1
        await upstream.call()
        info = upstream.cached.info()
        # Every call is one of these, so that a hit ratio can be told.
        assert info.hits + info.near_hits + info.stale_hits + info.misses + info.joined == callers + 1

    moved_time.run(scenario())
