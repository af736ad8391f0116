"""What the disk and its files can do to a server, and what `/readyz` says of it."""

import asyncio
import contextlib
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import served_process
from plain_load import damage
from server_clients import Answer, connected, head, put

from aiokv.server.access_file import add_key

pytestmark = pytest.mark.slow

VALUE = b"v" * 60_000
# An access file counts as unusable after half a second, not a minute.
IMPATIENT = "import sys, aiokv.server.access as a; a._GRACE_SECONDS = 0.5; from aiokv.cli import main; sys.exit(main())"


async def ask(address: str, request: bytes) -> Answer:
    """Ask on a connection of its own."""
    async with connected(address) as client:
        return await client.ask(request)


async def until_ready(address: str, *, is_ready: bool) -> Answer:
    """Wait until `/readyz` says so."""
    async with asyncio.timeout(15):
        while ((answer := await ask(address, head("GET", "/readyz"))).status == 200) != is_ready:
            await asyncio.sleep(0.1)
    return answer


async def until_stored(address: str) -> None:
    """Set until there is room: the file gives its pages back step by step."""
    async with asyncio.timeout(15):
        while (await ask(address, put("/set/db/new", VALUE))).status != 200:
            await asyncio.sleep(0.1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 16 MiB, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Take the last byte of a disk, as another program would."""
    for size_bytes in (65_536, 512):
        with (folder / f"other{size_bytes}").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * size_bytes)


def give_back(folder: Path) -> None:
    for other in folder.glob("other*"):
        other.unlink()


async def set_until_full(address: str, ttl_seconds: int = 600) -> list[str]:
    """Set until there is no room; return the keys that were stored."""
    stored = []
    async with connected(address) as client:
        for number in range(1_000):
            answer = await client.ask(put(f"/set/db/{ttl_seconds}-{number}?ttl={ttl_seconds}", VALUE))
            if answer.status == 507:
                assert answer.error() == "the store has no room left; nothing was stored"
                return stored
            assert answer.status == 200
            stored.append(f"{ttl_seconds}-{number}")
    raise AssertionError("the disk was never full")


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_full_disk_refuses_sets_alone_and_heals_by_deletes_without_a_restart(
    small_disk: Path, tmp_path: Path, workers: str
) -> None:
    path = small_disk / "kv.db"
    disk = ("--min-free-bytes", "2M", "--ballast-bytes", "1M", "--workers", workers)
    with served_process("--store", f"sqlite:///{path}", *disk, home=tmp_path) as (process, address):
        stored = await set_until_full(address)
        assert len(stored) > 50
        fill(small_disk)
        assert "room" in (await until_ready(address, is_ready=False)).error()
        assert (await ask(address, head("GET", f"/get/db/{stored[0]}"))).status == 200
        assert (await ask(address, put("/set/db/new", VALUE))).status == 507
        for key in stored:
            assert (await ask(address, head("DELETE", f"/delete/db/{key}"))).status == 200
        give_back(small_disk)
        await until_ready(address, is_ready=True)
        await until_stored(address)
        process.terminate()
        assert await asyncio.to_thread(process.wait, 15) == 0
    assert damage(path) == []


async def test_disk_that_another_program_fills_at_once_takes_every_delete(small_disk: Path, tmp_path: Path) -> None:
    store = ("--store", f"sqlite:///{small_disk}/kv.db", "--min-free-bytes", "2M", "--ballast-bytes", "1M")
    with served_process(*store, home=tmp_path) as (_, address):
        async with connected(address) as client:
            for number in range(40):
                assert (await client.ask(put(f"/set/db/{number}", VALUE))).status == 200
            # Before what is in the log is written into the database, which has to grow for it.
            fill(small_disk)
            statuses = [(await client.ask(head("DELETE", f"/delete/db/{number}"))).status for number in range(40)]
    assert statuses == [200] * 40


async def test_full_disk_heals_by_expiry_without_a_restart(small_disk: Path, tmp_path: Path) -> None:
    # The clock of this server runs 60 times as fast.
    fast = (
        "import sys, time, aiokv.clock as c; began = time.time();"
        "c.now = lambda: began + 60 * (time.time() - began); from aiokv.cli import main; sys.exit(main())"
    )
    store = ("--store", f"sqlite:///{small_disk}/kv.db", "--min-free-bytes", "2M", "--ballast-bytes", "1M")
    with served_process(*store, home=tmp_path, command=("-c", fast)) as (_, address):
        assert len(await set_until_full(address, 240)) > 50
        await until_stored(address)
        await until_ready(address, is_ready=True)


async def test_held_write_lock_is_the_reason_and_reads_go_on(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    with served_process("--store", f"sqlite:///{path}", home=tmp_path) as (_, address):
        assert (await ask(address, put("/set/db/key", b"v"))).status == 200
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert "locks" in (await until_ready(address, is_ready=False)).error()
            assert (await ask(address, head("GET", "/get/db/key"))).value() == "v"
            other.execute("ROLLBACK")
            await until_ready(address, is_ready=True)
        assert (await ask(address, put("/set/db/key", b"w"))).status == 200


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
@pytest.mark.parametrize("vanish", [delete, replace])
async def test_file_that_vanished_takes_no_write_and_is_the_reason(
    tmp_path: Path, suffix: str, vanish: Callable[[Path], None]
) -> None:
    path = tmp_path / "kv.db"
    with served_process("--store", f"sqlite:///{path}", home=tmp_path) as (_, address):
        assert (await ask(address, put("/set/db/key", b"v"))).status == 200
        vanish(path.with_name(path.name + suffix))
        assert "deleted or replaced" in (await until_ready(address, is_ready=False)).error()
        lost = await ask(address, put("/set/db/key", b"w"))
        assert lost.status == 503
        assert str(tmp_path) not in lost.error()


async def test_flipped_bytes_give_no_wrong_value_and_no_piece_of_it_in_log_or_answer(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    values = {f"key{number}": (f"secret{number:04}" * 400) for number in range(50)}
    with served_process("--store", f"sqlite:///{path}", home=tmp_path) as (process, address):
        for key, value in values.items():
            assert (await ask(address, put(f"/set/db/{key}", value.encode()))).status == 200
        process.terminate()
        assert await asyncio.to_thread(process.wait, 15) == 0
    data = bytearray(path.read_bytes())
    for number in range(0, 50, 2):
        place = data.find(f"secret{number:04}".encode() * 20)
        data[place + 50] ^= 1
    path.write_bytes(data)
    with served_process("--store", f"sqlite:///{path}", home=tmp_path) as (process, address):
        for number, (key, value) in enumerate(values.items()):
            answer = await ask(address, head("GET", f"/get/db/{key}"))
            if number % 2:
                assert answer.value() == value
            else:
                assert answer.status == 503
                assert "retry-after" not in answer.headers
                assert "damaged" in answer.error()
                assert "secret" not in answer.error()
                assert (await ask(address, put(f"/set/db/{key}", b"new"))).status == 200
        assert (await ask(address, head("GET", "/get/db/key0"))).value() == "new"
        figures = (await ask(address, head("GET", "/metrics"))).body
        assert b"aiokv_backend_failures_total 25.0" in figures
        process.terminate()
        assert process.stderr is not None
        log = await asyncio.to_thread(process.stderr.read)
    assert "damaged" in log
    assert "secret" not in log


async def test_pages_of_noise_are_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    with served_process("--store", f"sqlite:///{path}", home=tmp_path) as (process, address):
        for number in range(60):
            assert (await ask(address, put(f"/set/db/key{number}", VALUE[:2_000]))).status == 200
        process.terminate()
        assert await asyncio.to_thread(process.wait, 15) == 0
    data = bytearray(path.read_bytes())
    data[8 * 4_096 :] = os.urandom(len(data) - 8 * 4_096)
    path.write_bytes(data)
    with served_process("--store", f"sqlite:///{path}", home=tmp_path) as (_, address):
        statuses = {(await ask(address, head("GET", f"/get/db/key{number}"))).status for number in range(60)}
        assert 503 in statuses
        assert statuses <= {200, 404, 503}
        assert "damaged" in (await until_ready(address, is_ready=False)).error()


async def test_access_file_that_cannot_be_used_is_the_reason_while_its_keys_count_on(tmp_path: Path) -> None:
    file = tmp_path / "access"
    key = add_key(file, "alice")
    good = file.read_bytes()
    serve = ("--store", "memory://", "--access-file", str(file))
    exchange = head("POST", "/storage/auth/token", f"Authorization: Key {key}", "Content-Length: 0")
    with served_process(*serve, home=tmp_path, command=("-c", IMPATIENT)) as (_, address):
        await until_ready(address, is_ready=True)
        file.write_bytes(b"no access file")
        assert "access file" in (await until_ready(address, is_ready=False)).error()
        assert (await ask(address, exchange)).status == 200
        file.write_bytes(good)
        await until_ready(address, is_ready=True)
