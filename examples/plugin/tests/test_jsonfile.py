"""Proves the plug-in: the suites of aiokv over the backend, and a store that finds it by its URL."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from aiokv_jsonfile import JsonFileBackend

from aiokv import AsyncKVStore, ConfigurationError, StorageError
from aiokv.testing.contract import BackendContract, BatchContract


class TestJsonFile(BackendContract, BatchContract):
    @pytest.fixture
    async def backend(self, tmp_path: Path, clock: Any) -> AsyncGenerator[JsonFileBackend]:  # noqa: ARG002 (time is moved first)
        backend = JsonFileBackend(str(tmp_path / "kv.json"))
        yield backend
        await backend.aclose()


async def test_url_names_the_file(tmp_path: Path) -> None:
    store = AsyncKVStore("weather", url=f"jsonfile:///{tmp_path}/kv.json")
    await store.set_many({"oslo": "3 °C, rain", "bergen": "5 °C, rain"}, ttl=600)
    assert await AsyncKVStore("weather", url=f"jsonfile:///{tmp_path}/./kv.json").get("oslo") == "3 °C, rain"
    assert "5 °C, rain" in (tmp_path / "kv.json").read_text(encoding="utf-8")


def test_url_without_a_file_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="write jsonfile:///"):
        AsyncKVStore("weather", url="jsonfile://host")


async def test_damaged_file_is_an_error_that_shows_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "kv.json").write_text('{"weather": {"oslo": s3cret')
    with pytest.raises(StorageError) as caught:
        await AsyncKVStore("weather", url=f"jsonfile:///{tmp_path}/kv.json").get("oslo")
    assert "s3cret" not in str(caught.value)
