"""The app with a store that works: what is computed when, and what expires."""

import pytest
from weather import LastCity, forecast, headline

from aiokv import AsyncKVStore, cache_bypass
from aiokv.testing import MovableClock


class SlowService:
    """Stands in for the service: counts the calls, and fails where a test says so."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails = False

    async def __call__(self, city: str) -> str:
        self.calls += 1
        if self.fails:
            raise ConnectionError("the service is away")
        return f"{city}: rain, as of call {self.calls}"


@pytest.fixture
def service() -> SlowService:
    return SlowService()


async def test_service_is_asked_once_for_a_city(service: SlowService) -> None:
    assert await forecast("Oslo", service) == await forecast("Oslo", service) == "Oslo: rain, as of call 1"
    await forecast("Bergen", service)
    assert service.calls == 2


# The same city as above: each test has a store of its own.
async def test_tests_do_not_see_each_others_results(service: SlowService) -> None:
    assert await forecast.peek("Oslo", service) is None


async def test_service_is_asked_again_after_ten_minutes(service: SlowService, kv_clock: MovableClock) -> None:
    await forecast("Oslo", service)
    kv_clock.advance(599)
    # Near the end, one caller may compute anew; `peek` never computes.
    peeked = await forecast.peek("Oslo", service)
    assert peeked is not None
    assert peeked.fresh
    kv_clock.advance(1)
    assert await forecast("Oslo", service) == "Oslo: rain, as of call 2"


async def test_yesterdays_forecast_is_better_than_none(service: SlowService, kv_clock: MovableClock) -> None:
    await forecast("Oslo", service)
    kv_clock.advance(3600)
    service.fails = True
    assert await forecast("Oslo", service) == "Oslo: rain, as of call 1"
    kv_clock.advance(86400)
    with pytest.raises(ConnectionError):
        await forecast("Oslo", service)


async def test_function_itself_without_the_cache(service: SlowService) -> None:
    with cache_bypass():
        await forecast("Oslo", service)
        await forecast("Oslo", service)
    assert service.calls == 2


# Counts and near caches belong to the function, and outlive a test: compare, and use arguments of the test's own.
async def test_headline_comes_from_this_process_for_five_seconds(kv_clock: MovableClock) -> None:
    before = headline.info()
    for _ in range(3):
        await headline("Tromsø, for this test")
    assert headline.info().near_hits == before.near_hits + 2
    kv_clock.advance(5)
    await headline("Tromsø, for this test")
    assert headline.info().hits == before.hits + 1


async def test_last_city_is_remembered_for_a_day(kv_clock: MovableClock) -> None:
    store = AsyncKVStore("cities", url="memory://last-city")
    await LastCity(store).set("Oslo")
    kv_clock.advance(86399)
    assert await LastCity(store).get() == "Oslo"
    kv_clock.advance(1)
    assert await LastCity(store).get() is None
    await store.aclose()
