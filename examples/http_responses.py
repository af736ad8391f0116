"""Cache HTTP responses: an aiohttp session that asks a slow API only when its answer is no longer fresh."""

import asyncio
import os
import time

import aiohttp
from aiohttp import web

from aiokv import AsyncKVStore
from aiokv.adapters.aiohttp_client import caching, outcome_of


async def slow_api(request: web.Request) -> web.Response:
    await asyncio.sleep(0.3)
    headers = {"Cache-Control": "max-age=60, stale-if-error=3600", "ETag": '"1"'}
    if request.headers.get("If-None-Match") == '"1"':
        return web.Response(status=304, headers=headers)
    return web.json_response({"city": request.match_info["city"], "temperature": 3.5}, headers=headers)


async def main() -> None:
    os.environ.setdefault("AIOKV_URL", "memory://")
    app = web.Application()
    app.router.add_get("/forecast/{city}", slow_api)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{site.port}/forecast/Oslo"

    async with AsyncKVStore("http") as store, caching(store) as cache, aiohttp.ClientSession(middlewares=[cache]) as session:

        async def forecast(**headers: str) -> None:
            started = time.perf_counter()
            async with session.get(url, headers=headers) as response:
                answer = await response.json()
            took = (time.perf_counter() - started) * 1e3
            print(f"{outcome_of(response):<12} {answer} in {took:.1f} ms, age {response.headers.get('Age', '-')}")

        # Five at once are one request to the API.
        await asyncio.gather(*(forecast() for _ in range(5)))
        await forecast()
        # The API confirms what is stored.
        await forecast(**{"Cache-Control": "no-cache"})
        print(cache.info())
    await runner.cleanup()


asyncio.run(main())
