"""Fixtures of the tests of HTTP caching."""

from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from aiokv import AsyncKVStore
from aiokv.testing import MovableClock

if TYPE_CHECKING:
    from http_origin import Client, Origin


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Generator[MovableClock]:
    from http_origin import moved_hishel  # noqa: PLC0415 (it skips the tests where hishel is absent)

    with moved_hishel(monkeypatch) as clock:
        yield clock


@pytest.fixture
async def origin() -> "AsyncGenerator[Origin]":
    from http_origin import running_origin  # noqa: PLC0415 (likewise)

    async with running_origin() as running:
        yield running


@pytest.fixture
async def store() -> AsyncGenerator[AsyncKVStore]:
    async with AsyncKVStore("http", url=f"memory://{uuid4().hex}") as opened:
        yield opened


@pytest.fixture
async def client(store: AsyncKVStore, origin: "Origin", moved: MovableClock) -> "AsyncGenerator[Client]":  # noqa: ARG001 (moves)
    from http_origin import client_of  # noqa: PLC0415 (likewise)

    async with client_of(store, origin) as opened:
        yield opened
