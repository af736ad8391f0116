"""One client of one contender of `engines.py`, in a process of its own: it reads commands and answers with figures.

A command is a line of JSON on standard input, `{"kind": "get", "concurrency": 64, "seconds": 0.5}`; the answer is a line of
JSON on standard output. The first line is an answer without a command: the client is warm, and its keys are stored.
"""

import asyncio
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

TTL_SECONDS = 86_400
_FILLED_AT_ONCE = 64


class Calls(NamedTuple):
    """How a contender gets and sets a key."""

    get: Callable[[str], Awaitable[object]]
    set: Callable[[str], Awaitable[object]]


@asynccontextmanager
async def open_dict(_spec: Mapping[str, Any], value: str) -> AsyncGenerator[Calls]:
    """Yield the least that a coroutine can do: what the loop of the measurement costs itself."""
    values: dict[str, str] = {}

    async def get(key: str) -> str | None:
        return values.get(key)

    async def set_(key: str) -> None:
        values[key] = value

    yield Calls(get, set_)


@asynccontextmanager
async def open_aiokv(spec: Mapping[str, Any], value: str) -> AsyncGenerator[Calls]:
    """Yield calls of an `AsyncKVStore`."""
    from aiokv import AsyncKVStore, HttpOptions  # noqa: PLC0415 (a client loads its own library alone)

    arguments: dict[str, Any] = {"batching": False} if spec["sends_alone"] else {}
    async with AsyncKVStore(spec["db"], url=spec["url"], http=HttpOptions(**arguments)) as store:
        yield Calls(store.get, lambda key: store.set(key, value, TTL_SECONDS))


@asynccontextmanager
async def open_redis(spec: Mapping[str, Any], value: str) -> AsyncGenerator[Calls]:
    """Yield calls of redis-py, of one server or of a cluster."""
    from redis.asyncio import Redis, RedisCluster  # noqa: PLC0415 (likewise)

    kind: Any = RedisCluster if spec.get("is_cluster") else Redis
    client = kind(host="127.0.0.1", port=spec["port"], decode_responses=True)
    try:
        yield Calls(client.get, partial(client.set, value=value, ex=TTL_SECONDS))
    finally:
        await client.aclose()


@asynccontextmanager
async def open_py_key_value(spec: Mapping[str, Any], value: str) -> AsyncGenerator[Calls]:
    """Yield calls of a py-key-value store."""
    store: Any
    if spec["store"] == "memory":
        from key_value.aio.stores.memory import MemoryStore  # noqa: PLC0415 (likewise)

        store = MemoryStore()
    elif spec["store"] == "disk":
        from key_value.aio.stores.disk import DiskStore  # noqa: PLC0415 (likewise)

        store = DiskStore(directory=spec["folder"])
    else:
        from key_value.aio.stores.redis import RedisStore  # noqa: PLC0415 (likewise)

        store = RedisStore(host="127.0.0.1", port=spec["port"])
    document = {"value": value}
    try:
        yield Calls(
            partial(store.get, collection=spec["db"]),
            lambda key: store.put(key, document, collection=spec["db"], ttl=TTL_SECONDS),
        )
    finally:
        if hasattr(store, "close"):
            await store.close()


OPENERS = {"dict": open_dict, "aiokv": open_aiokv, "redis-py": open_redis, "py-key-value": open_py_key_value}


async def run_batch(
    call: Callable[[str], Awaitable[object]], keys: list[str], concurrency: int, seconds: float
) -> dict[str, float]:
    """Call from so many tasks in a closed loop for a while; return microseconds for each call."""
    following = itertools.cycle(keys)
    now = time.perf_counter
    taken: list[float] = []

    async def work() -> None:
        started = now()
        # One call at least, so that a busy machine leaves no batch empty.
        while started < ends_at or not taken:
            await call(next(following))
            ended = now()
            taken.append(ended - started)
            started = ended
            # A call that never waits would keep the others from their turn.
            if len(taken) % 512 == 0:
                await asyncio.sleep(0)
                started = now()

    gc.collect()
    cpu, began = time.process_time(), now()
    ends_at = began + seconds
    await asyncio.gather(*(work() for _ in range(concurrency)))
    cpu, elapsed = time.process_time() - cpu, now() - began
    # A short batch on a busy machine may be one call.
    cuts = statistics.quantiles(taken, n=100, method="inclusive") if len(taken) > 1 else taken * 99
    return {
        "calls": len(taken),
        "rate": len(taken) / elapsed,
        "client_us": cpu / len(taken) * 1e6,
        "p50_us": cuts[49] * 1e6,
        "p99_us": cuts[98] * 1e6,
    }


def private_bytes() -> int:
    """Return the memory that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


async def serve(spec: Mapping[str, Any]) -> None:
    """Store the keys, then follow the commands until there are no more."""
    keys = [f"key-{number}" for number in range(spec["keys"])]
    value = "x" * spec["value_bytes"]
    loop = asyncio.get_running_loop()
    async with OPENERS[spec["kind"]](spec, value) as calls:
        await calls.get(keys[0])
        gc.collect()
        before = private_bytes()
        for at in range(0, len(keys), _FILLED_AT_ONCE):
            await asyncio.gather(*(calls.set(key) for key in keys[at : at + _FILLED_AT_ONCE]))
        gc.collect()
        answer: dict[str, float] = {"entry_bytes": max(0, private_bytes() - before) / len(keys)}
        if await calls.get(keys[-1]) is None:
            raise RuntimeError("a get does not return the value that was set")
        while True:
            print(json.dumps(answer), flush=True)
            line = await loop.run_in_executor(None, sys.stdin.readline)
            if not line:
                return
            command = json.loads(line)
            call = calls.get if command["kind"] == "get" else calls.set
            answer = await run_batch(call, keys, command["concurrency"], command["seconds"])


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
