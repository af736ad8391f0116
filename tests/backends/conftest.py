"""Fixtures of the tests of backends."""

import contextlib
import subprocess
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from redis_servers import RedisServer

    from aiokv.backends.redis.backend import RedisBackend


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 16 MiB, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def server(redis_server: "RedisServer") -> "RedisServer":
    """The server that all tests share, empty."""
    redis_server.ask("FLUSHALL")
    return redis_server


@pytest.fixture
async def open_redis() -> "AsyncGenerator[Callable[..., RedisBackend]]":
    """A function that opens a backend on a server; the test's end closes it."""
    from aiokv.backends.redis.backend import RedisBackend  # noqa: PLC0415 (few tests need it)
    from aiokv.backends.redis.urls import parse_url  # noqa: PLC0415 (likewise)

    async with contextlib.AsyncExitStack() as stack:

        def open_(server: "RedisServer", path: str = "", **options: Any) -> RedisBackend:
            backend = RedisBackend(parse_url(f"redis://{server.address}{path}"), **options)
            stack.push_async_callback(backend.aclose)
            return backend

        yield open_
