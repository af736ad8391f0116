"""A server that is killed in the middle of writes has kept all that it answered."""

import asyncio
from pathlib import Path

import pytest
from helpers import served_process

from aiokv import AsyncKVStore, CallError, RetryPolicy
from aiokv.backends.sqlite import SqliteBackend

ROUNDS_PER_TEST = 5
WRITERS = 32


@pytest.mark.parametrize("part", range(4))
@pytest.mark.slow
async def test_every_answered_set_survives_kill_9(tmp_path: Path, part: int) -> None:
    path = tmp_path / "kv.db"
    answered: dict[str, str] = {}
    for round_number in range(ROUNDS_PER_TEST):
        with served_process("--store", f"sqlite:///{path}", home=tmp_path) as (process, address):
            store = AsyncKVStore("db", url=address, retry=RetryPolicy.none())
            enough = 40 + 60 * round_number
            before = len(answered)

            async def write(
                writer: int, store: AsyncKVStore = store, round_number: int = round_number, answered: dict[str, str] = answered
            ) -> None:
                for i in range(10_000):
                    key, value = f"{round_number}-{writer}-{i}", f"value {part} {i}" * 20
                    try:
                        await store.set(key, value)
                    except CallError:
                        return
                    answered[key] = value

            writers = [asyncio.create_task(write(number)) for number in range(WRITERS)]
            while len(answered) - before < enough:
                await asyncio.sleep(0.001)
            process.kill()
            await asyncio.gather(*writers)
            await store.aclose()
    backend = SqliteBackend(path)
    lost = [key for key, value in answered.items() if await backend.get("db", key) != value]
    await backend.aclose()
    assert lost == []
    assert len(answered) >= sum(40 + 60 * number for number in range(ROUNDS_PER_TEST))
