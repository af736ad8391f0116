"""Prove a backend of your own: suites of pytest that state every promise of a backend and of its capabilities.

Subclass the suites that your backend claims to keep, and give it as the fixture `backend`:

```python
import pytest
from aiokv.testing.contract import BackendContract, BatchContract

class TestMyBackend(BackendContract, BatchContract):
    @pytest.fixture
    async def backend(self, clock, tmp_path):
        backend = MyBackend(tmp_path / "file")
        yield backend
        await backend.aclose()
```

Tests need `pytest-asyncio` with `asyncio_mode = auto`; otherwise mark the class with `pytest.mark.asyncio`. Each test gets a
new, empty backend. The fixture `clock` is `aiokv.testing.movable_clock()`: time for the backend moves with it if it asks
`aiokv.clock.now()`. A backend that takes a clock as an argument overrides the fixture `clock` by any object with
`advance(seconds)`. One whose engine keeps the time sets `follows_clock = False`: the tests wait for it, up to 4 seconds each.
"""

from aiokv.testing.contract.batch import BatchContract
from aiokv.testing.contract.claim import ClaimContract
from aiokv.testing.contract.scan import ScanContract
from aiokv.testing.contract.suite import ContractSuite, Passing
from aiokv.testing.contract.values import BackendContract
from aiokv.testing.contract.watch import WatchContract

__all__ = [
    "BackendContract",
    "BatchContract",
    "ClaimContract",
    "ContractSuite",
    "Passing",
    "ScanContract",
    "WatchContract",
]
