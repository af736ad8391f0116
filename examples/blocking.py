"""Share results between the threads of a blocking program; with fal's own client, only the import would differ."""

import os
from concurrent.futures import ThreadPoolExecutor

from aiokv import KVStore

os.environ.setdefault("AIOKV_URL", "memory://")
store = KVStore("squares")
computed: list[int] = []


def square(number: int) -> int:
    known = store.get_json(str(number))
    if known is not None:
        return int(known)
    computed.append(number)
    result = number * number
    store.set_json(str(number), result, ttl=600)
    return result


def main() -> None:
    store.clear()
    with ThreadPoolExecutor(32) as pool:
        # In two rounds: what the first computed, the second reads.
        for _ in range(2):
            print(sum(pool.map(square, range(100))))
    print(f"computed {len(computed)} of 200, {store.count()} results stored")

    with store.claim("clean up", seconds=10) as claim:
        if claim.is_held:
            print(f"deleted {store.clear()}")


main()
