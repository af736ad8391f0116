"""Keep the results of a slow plain function in a file, as joblib.Memory does: the next run of this program computes nothing."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

from aiokv import KVStore, kv_cached

kv = KVStore("examples", url=os.environ.get("AIOKV_URL", "sqlite:////tmp/aiokv-example.db"))


# The one line. The function stays a plain one: it is called without await, and runs in the thread that calls it.
@kv_cached(ttl=24 * 3600, store=kv)
def count_primes(below: int) -> int:
    print(f"computing below {below:,}")
    return sum(all(number % divisor for divisor in range(2, int(number**0.5) + 1)) for number in range(2, below))


def main() -> None:
    for when in ("the first time", "again"):
        started = time.perf_counter()
        count = count_primes(100_000)
        print(f"{when}: {count:,} in {time.perf_counter() - started:.3f} s")

    # Threads that ask the same at the same time compute it once.
    count_primes.invalidate(50_000)
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(count_primes, [50_000] * 16)) == {5133}
    info = count_primes.info()
    print(f"{info.computations} computations, {info.hits} hits, {info.joined} calls that waited for another's")


if __name__ == "__main__":
    main()
