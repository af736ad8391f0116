"""A forked child lists, claims and watches by its own means, and takes nothing from its parent."""

import asyncio
from pathlib import Path

from caching_under_test import in_child

from aiokv import AsyncKVStore, Changed, Changes, Lost


async def told(changes: Changes, key: str) -> bool:
    async with asyncio.timeout(8):
        async for change in changes:
            if change == Changed(key):
                return True
    return False


def test_child_of_a_fork_uses_the_store_of_its_parent(tmp_path: Path) -> None:
    store = AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db")

    async def use() -> None:
        async with store.watch() as changes, store.claim("k") as claim:
            assert not claim.is_held
            assert await anext(changes) == Lost()
            await store.set_many({"of the child": "v", "another": "v"})
            assert await told(changes, "of the child")
            assert await store.count() == 3
        infos = store.keys("of")
        assert sorted([info.key async for info in infos]) == ["of the child", "of the parent"]
        await store.aclose()

    async def scenario() -> None:
        async with store, store.watch() as changes, store.claim("k") as claim:
            assert await anext(changes) == Lost()
            await store.set("of the parent", "v")
            assert in_child(lambda: asyncio.run(use())) == 0
            assert claim.is_held
            assert await told(changes, "of the child")
            assert await store.clear("of") == 2
            async with store.claim("k") as other:
                assert not other.is_held

    asyncio.run(scenario())
