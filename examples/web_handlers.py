"""Share one store between the handlers of a web application, which opens and closes it."""

import asyncio
import os
from collections.abc import AsyncIterator

from aiohttp import ClientSession, web

from aiokv import AsyncKVStore, kv_cached

STORE = web.AppKey("store", AsyncKVStore)
store = AsyncKVStore("web", url=os.environ.get("AIOKV_URL", "memory://"))


@kv_cached(ttl=60, store=store)
async def report(year: int) -> dict[str, int]:
    await asyncio.sleep(0.2)
    return {"year": year, "total": year * 7}


async def get_report(request: web.Request) -> web.Response:
    return web.json_response(await report(int(request.match_info["year"])))


async def get_visits(request: web.Request) -> web.Response:
    kv = request.app[STORE]
    visits = (await kv.get_json("visits", default=0)) + 1
    # The last write wins: two visits at once may count as one. This store has no counters.
    await kv.set_json("visits", visits)
    return web.json_response({"visits": visits})


async def open_store(app: web.Application) -> AsyncIterator[None]:
    async with store:
        app[STORE] = store
        yield


async def main() -> None:
    app = web.Application()
    app.cleanup_ctx.append(open_store)
    app.add_routes([web.get("/report/{year}", get_report), web.get("/visits", get_visits)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with ClientSession(f"http://127.0.0.1:{site.port}") as client:
        for path in ("/report/2026", "/report/2026", "/visits", "/visits"):
            async with client.get(path) as response:
                print(path, await response.json())
    await runner.cleanup()


asyncio.run(main())
