"""Set, get and delete values in the store of AIOKV_URL, or else in a file of this folder."""

import asyncio
import os
import time

from aiokv import AsyncKVStore, ValueTooLargeError
from aiokv.backends.memory import MemoryBackend


async def main() -> None:
    os.environ.setdefault("AIOKV_URL", "sqlite:///quickstart.db")
    async with AsyncKVStore("quickstart") as store:
        print(f"store                {store!r}")
        await store.set("greeting", "hello ⇒ 世界", ttl=3600)
        print(f"set, then get        {await store.get('greeting')!r}")
        await store.set_json("settings", {"theme": "dark", "beta": True})
        print(f"as JSON              {await store.get_json('settings')}")
        await store.set("greeting", "hello again")
        print(f"last write wins      {await store.get('greeting')!r}")
        await store.delete("greeting")
        await store.delete("greeting")
        print(f"deleted (twice)      {await store.get('greeting')!r}")
        try:
            await store.set("large", "x" * 2_000_000)
        except ValueTooLargeError as error:
            print(f"too large            {error}")

        values = {f"user/{number}": f"profile {number}" for number in range(500)}
        started = time.perf_counter()
        await store.set_many(values, ttl=60)
        written = time.perf_counter()
        assert await store.get_many(values) == values
        read = time.perf_counter()
        print(f"500 sets at once     {(written - started) * 1e3:.0f} ms")
        print(f"500 gets at once     {(read - written) * 1e3:.0f} ms, every value right")
        times = []
        for _ in range(200):
            started = time.perf_counter()
            await store.get("user/7")
            times.append(time.perf_counter() - started)
        print(f"one get              {sorted(times)[100] * 1e6:.0f} us (median of 200, warm connection)")

    now = time.time()
    clock = [now]
    backend = MemoryBackend(clock=lambda: clock[0])
    await backend.set("quickstart", "soon gone", "v", 60)
    clock[0] = now + 59.999
    before = await backend.get("quickstart", "soon gone")
    clock[0] = now + 60
    after = await backend.get("quickstart", "soon gone")
    print(f"expiry               {before!r} after 59.999 s, {after!r} after 60 s (a clock moved by hand, no waiting)")


asyncio.run(main())
