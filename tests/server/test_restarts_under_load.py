"""Restarts while clients without retries call all the time: in order they cost no call, by kill -9 no answered set.

`python benchmarks/kills.py --rounds 50` kills more often.
"""

import asyncio
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from helpers import served_process, serving
from plain_load import damage, load_on, lost
from server_clients import connected, head

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the tests find workers in /proc"),
]

# What systemd does before it runs a service: the socket is descriptor 3.
ACTIVATED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.executable, [sys.executable, "-m", "aiokv", "serve", *sys.argv[2:]])
"""


def port_of(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


async def line_with(process: subprocess.Popen[str], words: str) -> None:
    """Wait for a line of the server's log, while the clients go on."""
    assert process.stderr is not None
    async with asyncio.timeout(15):
        while words not in (line := await asyncio.to_thread(process.stderr.readline)):
            assert line, "the server has ended"


async def ended(process: subprocess.Popen[str]) -> int:
    return await asyncio.to_thread(process.wait, 15)


async def test_forty_clients_that_keep_their_connections_lose_no_call_at_sigterm(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    with served_process("--store", f"sqlite:///{path}", home=tmp_path) as (process, address):
        async with load_on(port_of(address), 40, stays=False) as load:
            await load.answered(200)
            process.terminate()
            status = await ended(process)
    assert (status, load.failures, load.interruptions) == (0, [], 0)
    assert await lost(path, load.acknowledged) == []


async def test_upload_under_way_at_sigterm_is_stored(tmp_path: Path) -> None:
    path, value = tmp_path / "kv.db", "v" * 1_900_000
    with served_process("--store", f"sqlite:///{path}", home=tmp_path) as (process, address):
        async with connected(address) as client:
            await client.send(head("PUT", "/set/db/key", "Content-Length: 1900000"), value[:900_000].encode())
            await asyncio.sleep(0.05)
            process.terminate()
            for start in range(900_000, 1_900_000, 100_000):
                await asyncio.sleep(0.1)
                await client.send(value[start : start + 100_000].encode())
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await ended(process) == 0
    assert await lost(path, {"key": value}) == []


async def test_clients_in_the_backlog_are_answered_at_sigterm(tmp_path: Path) -> None:
    with served_process("--store", "memory://", home=tmp_path) as (process, address):
        process.send_signal(signal.SIGSTOP)
        waiting = [socket.create_connection(("127.0.0.1", port_of(address)), timeout=15) for _ in range(300)]
        for client in waiting:
            client.sendall(head("GET", "/livez"))
        process.terminate()
        process.send_signal(signal.SIGCONT)
        answers = [await asyncio.to_thread(client.recv, 100) for client in waiting]
        for client in waiting:
            client.close()
        assert {answer[:12] for answer in answers} == {b"HTTP/1.1 200"}
        assert await ended(process) == 0


async def test_rolling_restart_of_two_workers_loses_no_call(tmp_path: Path) -> None:
    path, file = tmp_path / "kv.db", tmp_path / "kv.toml"
    file.write_text(f'workers = 2\nstore = "sqlite:///{path}"\ndrain = 5\n')
    with served_process("--config", str(file), home=tmp_path) as (process, address):
        before = set(workers_of(process))
        async with load_on(port_of(address)) as load:
            await load.answered(100)
            file.write_text(file.read_text().replace("drain = 5", "drain = 6"))
            process.send_signal(signal.SIGHUP)
            await line_with(process, "all workers are replaced")
            await load.answered(100)
        assert before & set(workers_of(process)) == set()
        process.terminate()
        assert await ended(process) == 0
    assert (load.failures, load.interruptions) == ([], 0)
    assert await lost(path, load.acknowledged) == []


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_restart_on_a_socket_of_systemd_loses_no_call(tmp_path: Path, workers: str) -> None:
    path = tmp_path / "kv.db"
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        command = ["-c", ACTIVATED, str(listener.fileno()), "--workers", workers, "--store", f"sqlite:///{path}"]
        with serving(command, tmp_path, listener.fileno()) as first:
            await line_with(first, " at http://127.0.0.1:")
            async with load_on(listener.getsockname()[1]) as load:
                await load.answered(100)
                first.terminate()
                assert await ended(first) == 0
                with serving(command, tmp_path, listener.fileno()) as second:
                    await load.answered(100)
                    load.is_over = True
                    second.terminate()
                    assert await ended(second) == 0
    assert (load.failures, load.interruptions) == ([], 0)
    assert await lost(path, load.acknowledged) == []


async def test_killed_worker_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    with served_process("--workers", "2", "--store", f"sqlite:///{path}", home=tmp_path) as (process, address):
        async with load_on(port_of(address), tolerates=True) as load:
            for _ in range(2):
                await load.answered(100)
                os.kill(workers_of(process)[0], signal.SIGKILL)
                await line_with(process, "by signal 9")
            await load.answered(100)
        process.terminate()
        assert await ended(process) == 0
    assert load.failures == []
    assert load.interruptions > 0
    assert await lost(path, load.acknowledged) == []
    assert damage(path) == []


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_server_that_is_killed_as_a_whole_comes_back_with_all_that_was_answered(tmp_path: Path, workers: str) -> None:
    path = tmp_path / "kv.db"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    acknowledged: dict[str, str] = {}
    command = ["-m", "aiokv", "serve", "--port", str(port), "--workers", workers, "--store", f"sqlite:///{path}"]
    for _ in range(2):
        began = time.monotonic()
        with serving(command, tmp_path) as process:
            await line_with(process, " at http://127.0.0.1:")
            async with load_on(port, tolerates=True) as load:
                await load.answered(1)
                back_seconds = time.monotonic() - began
                await load.answered(150)
                for pid in (process.pid, *workers_of(process)):
                    os.kill(pid, signal.SIGKILL)
        assert load.failures == []
        # Under 2 seconds where the machine has nothing else to do.
        assert back_seconds < 10
        acknowledged |= load.acknowledged
    assert damage(path) == []
    assert await lost(path, acknowledged) == []
