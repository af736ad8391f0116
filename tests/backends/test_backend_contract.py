"""The suites of the contract, run against each backend; the last place to add one is here."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import ClassVar

import pytest
from backends_under_test import Opener, open_http_memory, open_http_sqlite, open_memory, open_sqlite
from helpers import FakeClock

from aiokv.backends.base import Backend
from aiokv.testing.contract import BackendContract, BatchContract, ClaimContract, ScanContract, WatchContract


class Opened:
    """The fixture `backend` from a function of `backends_under_test`, with a clock of its own."""

    opener: ClassVar[Opener]

    @pytest.fixture
    def clock(self) -> FakeClock:
        return FakeClock()

    @pytest.fixture
    async def backend(self, tmp_path: Path, clock: FakeClock) -> AsyncGenerator[Backend]:
        async with type(self).opener(tmp_path, clock) as opened:
            yield opened


class TestMemory(Opened, BackendContract, BatchContract, ScanContract, ClaimContract, WatchContract):
    opener = staticmethod(open_memory)
    closes_watches = False


class TestSqlite(Opened, BackendContract, BatchContract, ScanContract, ClaimContract, WatchContract):
    opener = staticmethod(open_sqlite)


class TestHttpOverMemory(Opened, BackendContract, BatchContract, ScanContract, ClaimContract, WatchContract):
    opener = staticmethod(open_http_memory)


class TestHttpOverSqlite(Opened, BackendContract, BatchContract, ScanContract, ClaimContract, WatchContract):
    opener = staticmethod(open_http_sqlite)


def test_no_suite_hides_a_test_of_another() -> None:
    suites = [BackendContract, BatchContract, ScanContract, ClaimContract, WatchContract]
    names = [name for suite in suites for name in vars(suite) if not name.startswith("_")]
    assert len(names) == len(set(names))
