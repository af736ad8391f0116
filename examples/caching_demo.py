"""Watch `kv_cached` at work: a slow function, its hit, a stampede of 1,000 callers, an outage of the store."""

import asyncio
import logging
import time

from aiokv import AsyncKVStore, kv_cached, set_default_store
from aiokv.backends.memory import MemoryBackend
from aiokv.server import running_server
from aiokv.testing import FaultProxy

COMPUTE_SECONDS = 0.5


@kv_cached(ttl=600)
async def forecast(city: str) -> dict[str, float]:
    """Stand in for what is slow: a model, a query, an API."""
    await asyncio.sleep(COMPUTE_SECONDS)
    return {"celsius": float(len(city))}


async def main() -> None:
    # The outage below is meant; without this, its log lines stand between the others.
    logging.getLogger("aiokv").setLevel(logging.CRITICAL)
    async with (
        running_server(MemoryBackend()) as address,
        # Between the store and its server, so that the server can go away.
        FaultProxy(address) as proxy,
        AsyncKVStore("demo", url=proxy.url) as store,
    ):
        set_default_store(store)

        async def timed(city: str) -> tuple[dict[str, float], float]:
            started = time.perf_counter()
            result = await forecast(city)
            return result, (time.perf_counter() - started) * 1e3

        result, took = await timed("Oslo")
        print(f"a slow function      {result} in {took:.0f} ms: computed, and stored for 600 s")
        again, took = await timed("Oslo")
        assert again == result
        print(f"its hit              the same in {took:.1f} ms: read from the store, as any other process would")

        before = forecast.info().computations
        started = time.perf_counter()
        results = await asyncio.gather(*(forecast("Bergen") for _ in range(1_000)))
        took = (time.perf_counter() - started) * 1e3
        computed = forecast.info().computations - before
        assert all(one == results[0] for one in results)
        print(f"a stampede           1,000 callers of a new key: {computed} computation, all answered in {took:.0f} ms")

        async with proxy.outage():
            result, took = await timed("Oslo")
            print(f"the store is away    {result} in {took:.0f} ms: computed again, nobody sees an error")
            again, took = await timed("Oslo")
            print(f"still away           {took:.0f} ms: the store is not asked for a while, and costs no time")
        # A cached function looks again after a short while.
        while (took := (await timed("Bergen"))[1]) > COMPUTE_SECONDS * 1e3:
            pass
        print(f"the store is back    {took:.1f} ms: a hit again, of what was stored before the outage")
        print(f"counted              {forecast.info()}")


asyncio.run(main())
