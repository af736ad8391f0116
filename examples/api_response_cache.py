"""Cache the responses of a slow API: a client in front of a local HTTP server that takes its time on purpose."""

import asyncio
import os
import time

import aiohttp
from aiohttp import web

from aiokv import AsyncKVStore, kv_cached, set_default_store

API = "http://127.0.0.1:{port}"


# The session is not in the key, so an early refresh runs in a caller's own call, while its session is open.
@kv_cached(ttl=600, ignore=("session", "base"), stale_if_error=3600)
async def forecast(session: aiohttp.ClientSession, base: str, city: str) -> dict[str, object]:
    async with session.get(f"{base}/forecast/{city}") as response:
        response.raise_for_status()
        answer: dict[str, object] = await response.json()
        return answer


async def slow_api(request: web.Request) -> web.Response:
    await asyncio.sleep(0.3)
    return web.json_response({"city": request.match_info["city"], "temperature": 3.5})


async def main() -> None:
    os.environ.setdefault("AIOKV_URL", "memory://")
    app = web.Application()
    app.router.add_get("/forecast/{city}", slow_api)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with AsyncKVStore("api-responses") as store, aiohttp.ClientSession() as session:
        set_default_store(store)
        for attempt in ("first, from the API", "second, from the store"):
            started = time.perf_counter()
            answer = await forecast(session, API.format(port=site.port), "Oslo")
            print(f"{attempt}: {answer} in {(time.perf_counter() - started) * 1e3:.1f} ms")
        await forecast.invalidate(session, "", "Oslo")
        print(forecast.info())
    await runner.cleanup()


asyncio.run(main())
