"""Share configuration between runners: one process writes it, the others read it, or a default while there is none."""

import asyncio
import os

from aiokv import AsyncKVStore

DEFAULTS = {"model": "small", "max_batch": 8}


async def runner(name: str, store: AsyncKVStore) -> None:
    """Read the configuration as any process on any machine would."""
    settings = await store.get_json("settings", default=DEFAULTS)
    print(f"{name}: {settings}")


async def main() -> None:
    os.environ.setdefault("AIOKV_URL", "memory://")
    async with AsyncKVStore("configuration") as store:
        await store.delete("settings")
        await runner("before", store)
        # Every entry expires after 30 days at the latest, so the owner of the configuration sets it again from time to time.
        await store.set_json("settings", {"model": "large", "max_batch": 16})
        await asyncio.gather(*(runner(f"runner {number}", store) for number in range(3)))


asyncio.run(main())
