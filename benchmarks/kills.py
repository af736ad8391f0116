"""Kill a server under load with signal 9, again and again, and look for answered sets that are lost.

Run `python benchmarks/kills.py --rounds 50`: odd rounds kill one of two workers, even rounds the supervisor and both workers.
Clients without retries set values all the time. After each kill of the whole the server starts again on the same file; at the
end every answered set is looked up in the file, and SQLite checks it. The exit status is 1 where something was lost.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import add_json_option, note_aim, note_table, write_json

from aiokv import AsyncKVStore, CallError, RetryPolicy
from aiokv.backends.sqlite import SqliteBackend

CLIENTS = 32
WORKERS = 2


class Load:
    """Clients that set all the time; a failed call is tried again under another key."""

    def __init__(self, url: str) -> None:
        """Begin no call yet."""
        self.url = url
        self.acknowledged: dict[str, str] = {}
        self.failed = 0
        self.is_over = False

    async def use(self, client: int) -> None:
        """Set until the load is over."""
        async with AsyncKVStore("db", url=self.url, retry=RetryPolicy.none()) as store:
            number = 0
            while not self.is_over:
                number += 1
                key = f"{client}-{number}"
                value = f"value of {key} " * 20
                try:
                    await store.set(key, value)
                except CallError:
                    self.failed += 1
                    await asyncio.sleep(0.005)
                else:
                    self.acknowledged[key] = value

    async def answered(self, count: int) -> None:
        """Wait for further answers."""
        reached = len(self.acknowledged) + count
        while len(self.acknowledged) < reached:  # noqa: ASYNC110 (the clients are busy enough)
            await asyncio.sleep(0.001)


def start(port: int, path: Path) -> subprocess.Popen[bytes]:
    """Start a server with two workers."""
    serve = ["serve", "--port", str(port), "--workers", str(WORKERS), "--store", f"sqlite:///{path}"]
    command = [sys.executable, "-m", "aiokv", *serve]
    with log_of(path).open("wb") as log:
        return subprocess.Popen(command, stderr=log)


def log_of(path: Path) -> Path:
    """Return where the server of a file writes its messages."""
    return path.with_name("log")


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a server and its workers; no new worker can start meanwhile."""
    process.send_signal(signal.SIGSTOP)
    for pid in (*workers_of(process), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the process ids of a server's workers."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


async def answers(port: int) -> None:
    """Ask on new connections until there is an answer."""
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = await reader.read(100)
            writer.close()
            if answer.startswith(b"HTTP/1.1 200 "):
                return
        await asyncio.sleep(0.01)


async def all_work(process: subprocess.Popen[bytes], path: Path) -> None:
    """Wait until the start is through: a worker that dies before ends the whole."""
    while b" at http" not in log_of(path).read_bytes() or len(workers_of(process)) < WORKERS:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def kill_again_and_again(rounds: int, path: Path) -> int:
    """Run the rounds; return the number of answered sets that are lost, or of faults of the file."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process, load, back = start(port, path), Load(f"http://127.0.0.1:{port}"), []
    clients = [asyncio.create_task(load.use(client)) for client in range(CLIENTS)]
    try:
        await all_work(process, path)
        for number in range(1, rounds + 1):
            await load.answered(200)
            if number % 2:
                os.kill(workers_of(process)[number // 2 % 2], signal.SIGKILL)
            else:
                kill_all(process)
                process = start(port, path)
            began = time.perf_counter()
            await answers(port)
            back.append(time.perf_counter() - began)
            print(f"round {number}: answers again after {back[-1]:.2f} s", flush=True)
            await all_work(process, path)
    finally:
        load.is_over = True
        await asyncio.gather(*clients)
        process.terminate()
        process.wait()
    backend = SqliteBackend(path)
    lost = [key for key, value in load.acknowledged.items() if await backend.get("db", key) != value]
    await backend.aclose()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        damage = [row[0] for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
    wholes = back[1::2] or [0.0]
    print(
        f"{rounds} kills, {len(load.acknowledged):,} answered sets, {load.failed:,} failed calls, {len(lost)} lost, "
        f"integrity_check {damage or 'ok'}; back after a kill of the whole: median {sorted(wholes)[len(wholes) // 2]:.2f} s, "
        f"worst {max(wholes):.2f} s"
    )
    columns = ["kills", "answered sets", "lost", "median s to be back", "worst s"]
    row = [rounds, len(load.acknowledged), len(lost), sorted(wholes)[len(wholes) // 2], max(wholes)]
    note_table("kill -9 of the server under load", columns, {"aiokv serve, 2 workers": row})
    note_aim("answered sets that were lost", len(lost), 0, "sets", is_met=not lost)
    return len(lost) + len(damage)


def main() -> int:
    """Read the arguments and run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="kills in all (default: 50)")
    add_json_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lost = asyncio.run(kill_again_and_again(options.rounds, Path(folder) / "kv.db"))
    write_json(options)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
