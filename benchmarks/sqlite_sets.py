"""Durable sets a second through SQLite: concurrent sets in groups, against one commit for each set.

Both use one table and `synchronous=FULL` in WAL mode, in the same folder, in alternating batches. The peer is Python's own
sqlite3 in a plain loop, without asyncio.
"""

import argparse
import asyncio
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

from harness import add_json_option, note_aim, progress, report, write_json

from aiokv.backends.sqlite import SqliteBackend


def connect(path: Path) -> sqlite3.Connection:
    """Open the peer's file with the settings of aiokv's own files."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 4000")
    connection.execute("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, expires_at REAL, value TEXT)")
    return connection


def one_commit_per_set(connection: sqlite3.Connection, sets: int, value: str) -> float:
    """Set one key after the other, each in its own transaction; return sets a second."""
    started = time.perf_counter()
    for number in range(sets):
        connection.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", (f"key-{number}", time.time() + 60, value))
    return sets / (time.perf_counter() - started)


async def set_from_tasks(backend: SqliteBackend, sets: int, value: str, concurrency: int) -> float:
    """Set from many tasks; return sets a second."""
    remaining = iter(range(sets))

    async def work() -> None:
        for number in remaining:
            await backend.set("bench", f"key-{number}", value, 60)

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return sets / (time.perf_counter() - started)


async def measure(folder: Path, options: argparse.Namespace) -> float:
    """Alternate the contenders and print the results of each."""
    value = "x" * options.value_bytes
    backend = SqliteBackend(folder / "grouped.db")
    await backend.get("bench", "opens the file")
    connection = connect(folder / "single.db")
    samples: dict[str, list[float]] = {"one commit per set": [], "aiokv, one at a time": [], "aiokv, concurrent": []}
    for batch in range(options.batches):
        progress(batch, options.batches, "batches")
        # A flush takes what the disk needs, so each contender gets a number of sets that takes about the same time.
        samples["one commit per set"].append(await asyncio.to_thread(one_commit_per_set, connection, options.sets // 10, value))
        samples["aiokv, one at a time"].append(await set_from_tasks(backend, options.sets // 10, value, 1))
        samples["aiokv, concurrent"].append(await set_from_tasks(backend, options.sets, value, options.concurrency))
    progress(options.batches, options.batches, "batches")
    await backend.aclose()
    connection.close()
    title = f"Durable sets through SQLite, concurrency {options.concurrency}, {options.value_bytes}-byte values"
    return report(title, "sets/s", samples, "one commit per set")


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--sets", type=int, default=4_000, help="sets in a concurrent batch; the others do a tenth")
    parser.add_argument("--batches", type=int, default=9)
    parser.add_argument("--value-bytes", type=int, default=100)
    parser.add_argument("--aim", type=float, default=5.0, help="smallest ratio that is no failure")
    parser.add_argument("--folder", help="where to put the files; the disk is what is measured (default: this folder)")
    add_json_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd()) as folder:
        ratio = asyncio.run(measure(Path(folder), options))
    print(f"  aim: at least {options.aim} x: {'met' if ratio >= options.aim else 'MISSED'}")
    note_aim("concurrent sets, to one commit per set, at least", ratio, options.aim, "x", is_met=ratio >= options.aim)
    write_json(options)
    return 0 if ratio >= options.aim else 1


if __name__ == "__main__":
    sys.exit(main())
