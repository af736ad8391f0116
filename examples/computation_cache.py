"""Cache a computation that takes about a second: every process that asks for it again gets it in a millisecond."""

import asyncio
import os
import time

from aiokv import AsyncKVStore, kv_cached, set_default_store


def count_primes(below: int) -> int:
    return sum(all(number % divisor for divisor in range(2, int(number**0.5) + 1)) for number in range(2, below))


# The default version would notice a change of this body alone, and the work is done in count_primes: raise it by hand.
@kv_cached(ttl=3600, version=1)
async def primes(below: int) -> int:
    # In a thread: in the event loop, a computation would hold up everything else.
    return await asyncio.to_thread(count_primes, below)


async def main() -> None:
    os.environ.setdefault("AIOKV_URL", "memory://")
    async with AsyncKVStore("computations") as store:
        set_default_store(store)
        await primes.invalidate(300_000)
        for when in ("before", "after"):
            started = time.perf_counter()
            count = await primes(300_000)
            print(f"{when}: {count} primes below 300,000 in {time.perf_counter() - started:.3f} s")
        info = primes.info()
        print(f"computed {info.computations} time, {info.seconds_saved:.3f} s saved")


asyncio.run(main())
