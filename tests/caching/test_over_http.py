"""Cached functions over a real server: with forks, and with whatever else stands under their keys."""

import asyncio
import random
import threading
from collections.abc import Generator
from typing import Any

import pytest
from caching_under_test import in_child
from helpers import served_process, wait_until

from aiokv import AsyncKVStore, Encrypted, NearCache, Zstd, kv_cached
from aiokv.caching.codecs import Codec

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    with served_process("--store", "memory://", home=tmp_path_factory.mktemp("home")) as (_, url):
        yield url


class Parent:
    """A process whose threads call a cached function, and have computations under way that do not end."""

    def __init__(self, address: str) -> None:
        self.is_child = False
        self.stop = threading.Event()
        self.square = kv_cached(
            60, store=AsyncKVStore("forks", url=address), key=lambda number: number, near=NearCache(30), early=0.0
        )(self._square)
        works = (self._call(1), self._call(2), self._hang())
        self.threads = [threading.Thread(target=asyncio.run, args=(work,)) for work in works]

    async def _square(self, number: int) -> int:
        while number >= 1_000 and not self.is_child:
            await asyncio.sleep(1)
        return number * number

    async def _call(self, seed: int) -> None:
        numbers = random.Random(seed)
        while not self.stop.is_set():
            number = numbers.randrange(200)
            assert await self.square(number) == number * number
            if number % 10 == 0:
                await self.square.invalidate(number)

    async def _hang(self) -> None:
        tasks = [asyncio.create_task(self.square(number)) for number in range(1_000, 1_010)]
        while not self.stop.is_set():
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def is_busy(self) -> bool:
        all_flights = list(self.square._cache._flights.copy().values())
        return self.square.info().computations > 20 and any(self.square.key(1_009) in flights.by_key for flights in all_flights)

    def run_as_child(self) -> None:
        self.is_child = True
        asyncio.run(self._check())

    async def _check(self) -> None:
        async with asyncio.timeout(10):
            for number in (*range(0, 200, 20), *range(1_000, 1_010)):
                assert await self.square(number) == number * number
                await self.square.invalidate(number)
                assert await self.square.refresh(number) == await self.square(number) == number * number
            await self.square.aclose()


@pytest.mark.slow
def test_children_of_a_busy_parent_share_its_results_and_none_of_its_flights(address: str) -> None:
    parent = Parent(address)
    for thread in parent.threads:
        thread.start()
    try:
        wait_until(parent.is_busy)
        assert [in_child(parent.run_as_child) for _ in range(6)] == [0] * 6
    finally:
        parent.stop.set()
        for thread in parent.threads:
            thread.join()


CODECS: dict[str, Any] = {
    "plain": None,
    "zstd": Zstd(min_bytes=0),
    "encrypted": Encrypted(KEY),
    "both": [Zstd(min_bytes=0), Encrypted(KEY)],
}


def _damaged(text: str, other: str, chances: random.Random) -> str:
    """Do to a stored text what a store, or somebody who writes to it, might."""
    head, _, payload = text.partition("\n")
    place = chances.randrange(len(text))
    inside = len(head) + 1 + chances.randrange(max(len(payload), 1))
    return chances.choice(
        [
            text[:place],
            text[:inside],
            text[:place] + chr(ord(text[place]) ^ (1 << chances.randrange(7))) + text[place + 1 :],
            text[:inside] + chr(ord(text[min(inside, len(text) - 1)]) ^ (1 << chances.randrange(7))) + text[inside + 1 :],
            text[:inside] + "\U0001f600" + text[inside:],
            head + "\n" + other.partition("\n")[2],
            other,
            other.partition("\n")[0] + "\n" + payload,
            head + "\n" + payload + payload,
            text[::-1],
            head + "\n",
            "",
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS)
async def test_damaged_text_is_a_miss_and_never_an_error_or_another_result(name: str, address: str) -> None:
    codec: Codec | list[Codec] | None = CODECS[name]
    async with AsyncKVStore(f"damaged-{name}", url=address) as store:

        @kv_cached(60, store=store, key=lambda number: number, codec=codec, early=0.0)
        async def words(number: int) -> list[str]:
            return [f"word {number}"] * 40

        await words(1)
        await words(2)
        good, other = await store.get(words.key(1)), await store.get(words.key(2))
        assert good is not None
        assert other is not None
        chances = random.Random(name)
        for _ in range(150):
            text = _damaged(good, other, chances)
            await store.set(words.key(1), text)
            peeked = await words.peek(1)
            if peeked is not None and peeked.value != [f"word {1}"] * 40:
                # Without a codec nothing vouches for the text itself.
                assert name in {"plain", "zstd"}
                assert _is_another_whole_result(name, text, good, other)
            assert isinstance(await words(1), list)
        assert words.info().store_errors == 0
        await words.aclose()


def _is_another_whole_result(name: str, text: str, good: str, other: str) -> bool:
    """Return whether the codec made the result's text, or the text is plain JSON as it is written."""
    return name == "plain" or text.partition("\n")[2] == other.partition("\n")[2] != good.partition("\n")[2]
