"""A fal app whose runners share results through fal's KV store, and keep the hottest of them at hand.

Deploy it with `fal deploy fal_app.py::Translator`. Run as a script, it calls its endpoints on this machine, without an account.
"""

import asyncio
import os
import sys
import time

from aiokv import AsyncKVStore, NearCache, kv_cached

try:
    import fal
    from pydantic import BaseModel
except ImportError:
    print("this example needs the package fal: pip install fal")
    sys.exit()

# With no AIOKV_URL in the environment, values live in fal's own service, and runners have the credentials for it.
if __name__ == "__main__":
    os.environ.setdefault("AIOKV_URL", "memory://")
store = AsyncKVStore("translations")


class Request(BaseModel):
    text: str
    language: str = "nb"


class Translation(BaseModel):
    text: str
    seconds: float


class Translator(fal.App):
    requirements = ["aiokv"]  # noqa: RUF012 (as fal wants it)
    machine_type = "S"

    def setup(self) -> None:
        # A real app loads its model here.
        self.words = {"nb": {"rain": "regn", "snow": "snø"}}

    # Results do not depend on the runner, so `self` is no part of the key. All runners compute a text once, for a day.
    @kv_cached(ttl=86_400, store=store, ignore=["self"], near=NearCache(30))
    async def translate(self, text: str, language: str) -> Translation:
        started = time.perf_counter()
        await asyncio.sleep(0.3)
        words = self.words.get(language, {})
        translated = " ".join(words.get(word, word) for word in text.split())
        return Translation(text=translated, seconds=round(time.perf_counter() - started, 1))

    @fal.endpoint("/")
    async def root(self, request: Request) -> Translation:
        return await self.translate(request.text, request.language)

    @fal.endpoint("/info")
    async def info(self) -> dict[str, int]:
        counts = self.translate.info()
        return {"computations": counts.computations, "hits": counts.hits + counts.near_hits}


async def main() -> None:
    app = Translator(_allow_init=True)
    app.setup()
    for text in ("rain and snow", "rain and snow", "rain"):
        started = time.perf_counter()
        translation = await app.root(Request(text=text))
        print(f"{text!r} is {translation.text!r}, after {time.perf_counter() - started:.1f} s")
    print(await app.info())


if __name__ == "__main__":
    asyncio.run(main())
