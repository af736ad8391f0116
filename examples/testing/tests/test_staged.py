"""The app's own backend keeps every promise of one, and its stages do not see one another."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from staged import StagedBackend

from aiokv import AsyncKVStore
from aiokv.backends.memory import MemoryBackend
from aiokv.testing.contract import BackendContract


class TestStagedBackend(BackendContract):
    @pytest.fixture
    async def backend(self, clock: Any) -> AsyncIterator[StagedBackend]:  # noqa: ARG002 (time is moved first)
        backend = StagedBackend("test", MemoryBackend())
        yield backend
        await backend.aclose()


async def test_stages_do_not_see_one_another() -> None:
    engine = MemoryBackend()
    test, production = (AsyncKVStore("app", backend=StagedBackend(stage, engine)) for stage in ("test", "production"))
    await test.set("k", "v")
    assert await production.get("k") is None
    await engine.aclose()
