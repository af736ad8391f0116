"""A store for a few calls: other timeouts and retries, the same connections."""

import asyncio
import pickle
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web

from aiokv import AsyncKVStore, Event, HedgePolicy, RetryPolicy
from aiokv.backends.registry import open_backend
from aiokv.errors import CallTimeoutError, UnavailableError
from aiokv.testing import ScriptedService


class Service:
    """Answers with a status, stalls where it is told to, and knows who is connected."""

    def __init__(self) -> None:
        self.status = 200
        self.stalls = False
        self.peers: set[Any] = set()
        self.requests = 0

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests += 1
        transport = request.transport
        assert transport is not None
        self.peers.add(transport.get_extra_info("peername"))
        while self.stalls and not transport.is_closing():
            await asyncio.sleep(0.002)
        return web.json_response({"value": "v"}, status=self.status)


@pytest.fixture
async def service() -> AsyncGenerator[tuple[Service, str]]:
    service = Service()
    async with ScriptedService(handler=service) as scripted:
        url = scripted.url
        yield service, url


@pytest.mark.parametrize("longest", [0.05, timedelta(milliseconds=50)])
async def test_timeout_bounds_the_whole_call(service: tuple[Service, str], longest: Any) -> None:
    stalling, url = service
    stalling.stalls = True
    async with AsyncKVStore("db", url=url) as store:
        with pytest.raises(CallTimeoutError) as caught:
            await store.with_options(timeout=longest).get("k")
    assert caught.value.elapsed is not None
    assert caught.value.elapsed >= 0.05


async def test_retry_counts_for_the_other_store_alone(service: tuple[Service, str]) -> None:
    failing, url = service
    failing.status = 503
    async with AsyncKVStore("db", url=url, retry=RetryPolicy(attempts=2, backoff_base=0)) as store:
        with pytest.raises(UnavailableError) as caught:
            await store.with_options(retry=RetryPolicy.none()).get("k")
        assert caught.value.attempts == 1
        with pytest.raises(UnavailableError) as caught:
            await store.get("k")
        assert caught.value.attempts == 2


def test_timeout_replaces_the_total_of_the_policy_that_is_given_with_it() -> None:
    store = AsyncKVStore("db", url="http://127.0.0.1:1").with_options(timeout=5, retry=RetryPolicy(attempts=2))
    assert store._client.retry == RetryPolicy(attempts=2, total_timeout=5.0)


async def test_connections_are_shared_and_outlive_the_other_store(service: tuple[Service, str]) -> None:
    answering, url = service
    async with AsyncKVStore("db", url=url) as store:
        for timeout in range(1, 10):
            assert await store.with_options(timeout=timeout, hedge=True).get("k") == "v"
        other = store.with_options(timeout=3)
        await other.get("k")
        await other.aclose()
        assert await store.get("k") == "v"
    assert len(answering.peers) == 1


async def test_closing_closes_what_was_given_of_it_and_not_what_it_was_given_of(service: tuple[Service, str]) -> None:
    answering, url = service
    store = AsyncKVStore("db", url=url)
    child = store.with_options(timeout=3)
    grandchild = child.with_options(timeout=2)
    for one in (store, child, grandchild):
        await one.get("k")
    await child.aclose()
    await store.get("k")
    assert len(answering.peers) == 1, "the parent's connection was closed"
    await grandchild.get("k")
    await store.aclose()
    await store.get("k")
    assert len(answering.peers) == 2, "a connection outlived the store that was closed"
    await store.aclose()


async def test_other_store_is_whole_though_the_first_was_closed(service: tuple[Service, str]) -> None:
    _, url = service
    store = AsyncKVStore("db", url=url)
    other = store.with_options(timeout=3)
    assert await other.get("k") == "v"
    await store.get("k")
    await store.aclose()
    assert await other.get("k") == "v"
    await other.aclose()


@pytest.mark.parametrize("scheme", ["memory", "sqlite"])
async def test_embedded_stores_have_options_too(scheme: str, tmp_path: Any) -> None:
    url = "memory://with-options" if scheme == "memory" else f"sqlite:///{tmp_path}/kv.db"
    events: list[Event] = []
    async with AsyncKVStore("db", url=url) as store:
        await store.set("k", "v")
        assert await store.with_options(timeout=1, observer=events.append).get("k") == "v"
        await store.get("k")
    assert [type(event).__name__ for event in events] == ["CallStarted", "CallEnded"]


def test_options_travel_with_a_pickled_store() -> None:
    store = AsyncKVStore("db", url="http://127.0.0.1:1", hedge=HedgePolicy(quantile=0.9)).with_options(timeout=7)
    copied = pickle.loads(pickle.dumps(store))
    assert (copied._client.retry.total_timeout, copied._client.hedge) == (7.0, HedgePolicy(quantile=0.9))
    assert copied.with_options(hedge=False)._client.hedge is None


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"timeout": 0}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"timeout": True}, TypeError),
        ({"timeout": "5"}, TypeError),
        ({"retry": 3}, TypeError),
        ({"hedge": 3}, TypeError),
        ({"observer": 3}, TypeError),
    ],
)
def test_option_that_makes_no_sense_is_refused(options: dict[str, Any], kind: type[Exception]) -> None:
    (name,) = options
    with pytest.raises(kind, match=name):
        AsyncKVStore("db", url="memory://").with_options(**options)


async def test_backend_that_nobody_watches_is_not_wrapped() -> None:
    store = AsyncKVStore("db", url="memory://unwatched")
    await store.get("k")
    assert store._backend_here() is open_backend("memory://unwatched")


@pytest.mark.parametrize("hedge", [0, "", 0.0, []])
def test_hedge_that_is_falsy_is_refused_like_any_other_of_its_type(hedge: Any) -> None:
    with pytest.raises(TypeError, match="hedge"):
        AsyncKVStore("db", url="http://127.0.0.1:1").with_options(hedge=hedge)
