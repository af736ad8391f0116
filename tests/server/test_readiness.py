"""What makes a server not ready, beyond its store."""

from pathlib import Path

from aiokv.backends.base import Backend
from aiokv.backends.memory import MemoryBackend
from aiokv.server import AccessFile
from aiokv.server.access_file import add_key, change_limits
from aiokv.server.readiness import Readiness


class Uncounted:
    """A backend that does not count what an account stores."""

    async def get(self, db_name: str, key: str) -> str | None: ...

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None: ...

    async def delete(self, db_name: str, key: str) -> None: ...

    async def aclose(self) -> None: ...


async def test_quotas_that_nobody_can_count_make_a_server_not_ready(tmp_path: Path) -> None:
    path = tmp_path / "access"
    add_key(path, "alice")
    backends: list[Backend] = [Uncounted(), MemoryBackend()]
    for backend in backends:
        assert await Readiness(backend, AccessFile(path)).problem() is None
    change_limits(path, "alice", {"max-entries": "2"})
    assert await Readiness(MemoryBackend(), AccessFile(path)).problem() is None
    problem = await Readiness(Uncounted(), AccessFile(path)).problem()
    assert problem is not None
    assert "cannot count" in problem
    change_limits(path, "alice", {"max-entries": "none", "requests-per-second": "5"})
    assert await Readiness(Uncounted(), AccessFile(path)).problem() is None
