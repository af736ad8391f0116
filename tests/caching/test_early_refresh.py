"""Refreshing before a result expires: in the caller's own call where an argument is left out of the key, else behind it."""

import asyncio

import pytest
from caching_under_test import MovedTime, settle, watched_store

from aiokv import AsyncKVStore, kv_cached, kv_cached_many

# Any computation that took time at all is due.
ALWAYS = 1e15


class Session:
    """Usable until its owner closes it."""

    def __init__(self) -> None:
        self.closed = False
        self.uses = 0
        self.misused = 0

    def use(self) -> None:
        self.uses += 1
        self.misused += self.closed


class Forecast:
    """A function that uses its caller's session, and what a test sees of it."""

    def __init__(self, moved_time: MovedTime) -> None:
        self.moved_time = moved_time
        self.runs = 0
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None

    def hold(self) -> asyncio.Event:
        self.gate = asyncio.Event()
        return self.gate

    async def compute(self, session: Session) -> int:
        session.use()
        self.runs += 1
        run = self.runs
        self.moved_time.advance(1)
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        session.use()
        if self.error is not None:
            raise self.error
        return run


@pytest.fixture
def forecast(moved_time: MovedTime) -> Forecast:
    return Forecast(moved_time)


def _city(city: object, session: Session) -> object:
    assert not session.closed
    return city


def _store(moved_time: MovedTime) -> AsyncKVStore:
    return watched_store(moved_time.now)[1]


def test_early_refresh_uses_the_session_of_the_call_that_runs_it(moved_time: MovedTime, forecast: Forecast) -> None:
    async def scenario() -> None:
        @kv_cached(600, store=_store(moved_time), key=_city, ignore=["session"], early=ALWAYS)
        async def cached(city: str, session: Session) -> int:
            assert city
            return await forecast.compute(session)

        sessions = [Session() for _ in range(5)]
        for number, session in enumerate(sessions, 1):
            result = await cached("Oslo", session)
            session.closed = True
            # The original XFetch: who draws the lot computes, and gets what it computed.
            assert (result, forecast.runs) == (number, number)
            await settle(50)
        assert all(session.uses == 2 and session.misused == 0 for session in sessions)

    moved_time.run(scenario())


async def _city_forecast(city: str, session: Session) -> int:
    assert city
    return await _current.compute(session)


_current: Forecast


@pytest.mark.parametrize("ignore", ["session", ["session"]], ids=repr)
def test_no_early_refresh_touches_a_session_that_its_caller_has_closed(
    ignore: str | list[str], moved_time: MovedTime, forecast: Forecast
) -> None:
    global _current  # noqa: PLW0603 (a function of the module, so that the key is made of its arguments)
    _current = forecast

    async def scenario() -> None:
        names = [ignore] if isinstance(ignore, str) else ignore
        cached = kv_cached(600, store=_store(moved_time), ignore=names, early=ALWAYS)(_city_forecast)
        for _ in range(5):
            session = Session()
            await cached("Oslo", session)
            session.closed = True
            await settle(50)
            assert session.misused == 0
        await cached.aclose()
        assert forecast.runs == 5

    moved_time.run(scenario())


def test_early_refresh_of_many_uses_the_session_of_the_call_that_runs_it(moved_time: MovedTime, forecast: Forecast) -> None:
    async def scenario() -> None:
        @kv_cached_many(600, store=_store(moved_time), key=_city, ignore=["session"], early=ALWAYS)
        async def cached(ids: list[int], session: Session) -> dict[int, int]:
            return dict.fromkeys(ids, await forecast.compute(session))

        for number in range(1, 5):
            session = Session()
            result = await cached([1, 2], session)
            session.closed = True
            assert result == {1: number, 2: number}
            await settle(50)
            assert session.misused == 0

    moved_time.run(scenario())


def test_early_refresh_of_a_function_whose_every_argument_counts_holds_nobody_up(
    moved_time: MovedTime, forecast: Forecast
) -> None:
    async def scenario() -> None:
        @kv_cached(600, store=_store(moved_time), key=lambda: "one", early=ALWAYS)
        async def cached() -> int:
            return await forecast.compute(Session())

        assert await cached() == 1
        gate = forecast.hold()
        # The function is held: nobody who has something to be served waits for it.
        async with asyncio.timeout(100):
            assert await cached() == 1
        await settle(50)
        assert forecast.runs == 2
        gate.set()
        await cached.aclose()
        assert (await cached.peek()).value == 2  # type: ignore[union-attr] # there is one

    moved_time.run(scenario())


def test_early_refresh_that_fails_in_the_call_serves_what_is_still_fresh(moved_time: MovedTime, forecast: Forecast) -> None:
    async def scenario() -> None:
        @kv_cached(600, store=_store(moved_time), key=_city, ignore=["session"], early=ALWAYS)
        async def cached(city: str, session: Session) -> int:
            assert city
            return await forecast.compute(session)

        assert await cached("Oslo", Session()) == 1
        forecast.error = LookupError("upstream")
        assert await cached("Oslo", Session()) == 1
        forecast.error = None
        assert (await cached.peek("Oslo", Session())).fresh  # type: ignore[union-attr] # there is one

    moved_time.run(scenario())


def test_several_callers_at_once_refresh_early_only_once(moved_time: MovedTime, forecast: Forecast) -> None:
    async def scenario() -> None:
        @kv_cached(600, store=_store(moved_time), key=_city, ignore=["session"], early=ALWAYS)
        async def cached(city: str, session: Session) -> int:
            assert city
            return await forecast.compute(session)

        await cached("Oslo", Session())
        results = await asyncio.gather(*(cached("Oslo", Session()) for _ in range(20)))
        assert forecast.runs == 2
        assert set(results) <= {1, 2}

    moved_time.run(scenario())


def test_stale_while_revalidate_runs_in_the_background_with_an_ignored_argument_too(
    moved_time: MovedTime, forecast: Forecast
) -> None:
    async def scenario() -> None:
        @kv_cached(
            60,
            store=_store(moved_time),
            key=_city,
            ignore=["session"],
            early=0,
            stale_while_revalidate=600,
        )
        async def cached(city: str, session: Session) -> int:
            assert city
            return await forecast.compute(session)

        assert await cached("Oslo", Session()) == 1
        moved_time.advance(100)
        gate = forecast.hold()
        session = Session()
        async with asyncio.timeout(100):
            assert await cached("Oslo", session) == 1
        await settle(50)
        assert (forecast.runs, session.uses) == (2, 1)
        gate.set()
        await settle(50)
        assert await cached("Oslo", Session()) == 2

    moved_time.run(scenario())
