"""What all tests of the app share: a store that is empty at the start of each."""

from collections.abc import Iterator

import pytest

from aiokv import AsyncKVStore, set_default_store


@pytest.fixture(autouse=True)
def store_of_the_test(kv_store: AsyncKVStore) -> Iterator[None]:
    """Let cached functions that name no store use the one of the test."""
    set_default_store(kv_store)
    yield
    set_default_store(None)
