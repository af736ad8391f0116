"""The app while its store is away, slow, or talks nonsense."""

import pytest
from weather import LastCity, forecast

from aiokv import CallError, set_default_store
from aiokv.testing import Garbage, ResetAfter, ResetBefore
from aiokv.testing.background import FlakyKV


async def rain(city: str) -> str:
    return f"{city}: rain"


async def test_forecast_needs_no_store(flaky_kv: FlakyKV) -> None:
    set_default_store(flaky_kv.store)
    async with flaky_kv.proxy.outage():
        assert await forecast("Oslo", rain) == "Oslo: rain"


async def test_city_is_stored_although_a_connection_breaks(flaky_kv: FlakyKV) -> None:
    # The first request does not arrive, the second one does, but its answer is lost.
    flaky_kv.proxy.faults = [ResetBefore(), ResetAfter()]
    await LastCity(flaky_kv.store).set("Oslo")
    assert await LastCity(flaky_kv.store).get() == "Oslo"
    assert [request.reached_upstream for request in flaky_kv.proxy.requests][:3] == [False, True, True]


async def test_nonsense_is_an_error_and_no_city(flaky_kv: FlakyKV) -> None:
    flaky_kv.proxy.faults = Garbage()
    with pytest.raises(CallError):
        await LastCity(flaky_kv.store).get()
