"""Cache a method of an app object that has a store of its own."""

import asyncio
import os
from dataclasses import dataclass

from aiokv import AsyncKVStore, NearCache, kv_cached


@dataclass
class App:
    """A runner of a model. The name of the model counts in the key, the store does not."""

    model: str
    kv: AsyncKVStore
    runs: int = 0

    def __cache_key__(self) -> str:
        return self.model

    @kv_cached(ttl=300, store=lambda self: self.kv, near=NearCache(ttl=5), stale_while_revalidate=60)
    async def caption(self, image_url: str) -> list[str]:
        self.runs += 1
        await asyncio.sleep(0.1)
        return [f"{self.model} sees {image_url}", "a picture"]


async def main() -> None:
    url = os.environ.get("AIOKV_URL", "memory://")
    async with AsyncKVStore("captions", url=url) as store:
        small, large = App("small", store), App("large", store)
        await asyncio.gather(*(small.caption("cat.png") for _ in range(100)), large.caption("cat.png"))
        print(f"small ran {small.runs} time for 100 calls, large {large.runs} time: another model is another key")
        print(await small.caption("cat.png"))
        print(small.caption.key("cat.png"))


asyncio.run(main())
