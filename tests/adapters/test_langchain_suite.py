"""LangChain's own suites of a store, run against ours."""

from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import pytest

from aiokv import AsyncKVStore
from aiokv.background import run

pytest.importorskip("langchain_core", reason="langchain-core is not installed: pip install 'aiokv[langchain]'")
pytest.importorskip("langchain_tests", reason="LangChain's suites are not installed: pip install 'aiokv[suites]'")

from langchain_tests.integration_tests import base_store as suites

from aiokv.adapters.langchain import KVByteStore


class TestAsyncSuiteOfLangChain(suites.BaseStoreAsyncTests[bytes]):
    @pytest.fixture
    async def kv_store(self, tmp_path: Path) -> AsyncGenerator[KVByteStore]:
        async with AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db") as store:
            yield KVByteStore(store)

    @pytest.fixture
    def three_values(self) -> tuple[bytes, bytes, bytes]:
        return b"foo", b"\xff\0", b""


class TestSyncSuiteOfLangChain(suites.BaseStoreSyncTests[bytes]):
    @pytest.fixture
    def kv_store(self, tmp_path: Path) -> Generator[KVByteStore]:
        store = AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db")
        yield KVByteStore(store)
        run(store.aclose)

    @pytest.fixture
    def three_values(self) -> tuple[bytes, bytes, bytes]:
        return b"foo", b"\xff\0", b""
