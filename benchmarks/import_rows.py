"""Interrupt `aiokv import` again and again, and look for rows that are lost or written twice, and for memory that grows.

Run `python benchmarks/import_rows.py --rows 1000000 --rounds 5`. Each round imports all rows, into a SQLite file or through
`aiokv serve`, and interrupts the import at random moments, by SIGINT and by SIGKILL in turn, each time running the same command
again. A trigger in the file of the store counts every row written. At the end of a round every row is read back. The exit
status is 1 where a row is lost or wrong, where more was written twice than was under way at a kill, or where memory passes its
bound.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness import add_json_option, note_aim, note_table, served, where, write_json

from aiokv import AsyncKVStore

DB = "import"
# Four batches of a thousand rows may be under way at a kill.
UNDER_WAY_ROWS = 4_000
_READ_KEYS = 10_000


class Outcome(NamedTuple):
    """What became of one round."""

    lost: int
    written: int
    allowed: int
    peak_mb: float
    seconds: float
    stops: str


def value_of(number: int) -> str:
    """Return the value of a row."""
    return f"value of row {number}, " * 3


def write_rows(path: Path, rows: int) -> None:
    """Write the file to import."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            file.write(f'{{"key":"key:{number}","value":"{value_of(number)}","ttl":{3_600 * 24 + number % 7}}}\n')


async def prepare(path: Path) -> None:
    """Make the file of the store, with a trigger that counts each row written."""
    async with AsyncKVStore(DB, url=f"sqlite:///{path}") as store:
        await store.delete("none")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE written (rows INTEGER); INSERT INTO written VALUES (0);"
            "CREATE TRIGGER inserted AFTER INSERT ON entries_v2 BEGIN UPDATE written SET rows = rows + 1; END;"
            "CREATE TRIGGER updated AFTER UPDATE ON entries_v2 BEGIN UPDATE written SET rows = rows + 1; END;"
        )


def written(path: Path) -> int:
    """Return how many rows were written."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT rows FROM written").fetchone()[0])


def run_import(source: Path, url: str, stop_after: float | None, number: signal.Signals) -> tuple[int, float]:
    """Import, and stop that after so many seconds; return exit status and peak memory in MB."""
    command = [sys.executable, "-m", "aiokv", "import", str(source), "--db", DB, "--quiet"]
    process = subprocess.Popen(command, env={**os.environ, "AIOKV_URL": url}, stderr=subprocess.PIPE, text=True)
    deadline = None if stop_after is None else time.monotonic() + stop_after
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if deadline is not None and time.monotonic() >= deadline:
            process.send_signal(number)
            deadline = None
        time.sleep(0.005)
    process.returncode = code = os.waitstatus_to_exitcode(status)
    with process:
        message = process.stderr.read().strip() if process.stderr else ""
    # An interrupt may come before the program has begun.
    if code not in {0, 130, -signal.SIGINT, -signal.SIGKILL}:
        raise RuntimeError(f"the import ended with {code}: {message}")
    return code, usage.ru_maxrss / 1024


async def missing(url: str, rows: int) -> int:
    """Read all rows back; return how many are lost or wrong."""
    lost = 0
    async with AsyncKVStore(DB, url=url) as store:
        for start in range(0, rows, _READ_KEYS):
            numbers = range(start, min(rows, start + _READ_KEYS))
            values = await store.get_many([f"key:{number}" for number in numbers])
            lost += sum(values[f"key:{number}"] != value_of(number) for number in numbers)
    return lost


def run_round(folder: Path, rows: int, pauses: list[float], *, is_served: bool) -> Outcome:
    """Import all rows once, with an interruption after each of the pauses; see the module."""
    path, source = folder / "kv.db", folder / "rows.jsonl"
    asyncio.run(prepare(path))
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(served(f"sqlite:///{path}")) if is_served else f"sqlite:///{path}"
        began, peak, codes = time.perf_counter(), 0.0, []
        while not codes or codes[-1] != 0:
            number = signal.SIGKILL if len(codes) % 2 else signal.SIGINT
            stop_after = pauses[len(codes)] if len(codes) < len(pauses) else None
            code, memory = run_import(source, url, stop_after, number)
            codes.append(code)
            peak = max(peak, memory)
            if code != 0 and written(path) >= rows and not list(folder.glob(f"{source.name}.*")):
                # It had ended, and only its process was still there: the same command would begin anew.
                break
        seconds = time.perf_counter() - began
        lost = asyncio.run(missing(url, rows))
    kills = codes.count(-signal.SIGKILL)
    names = f"{sum(code != 0 for code in codes) - kills} SIGINT, {kills} SIGKILL"
    outcome = Outcome(lost, written(path), rows + kills * UNDER_WAY_ROWS, peak, seconds, names)
    for left in folder.glob("kv.db*"):
        left.unlink()
    return outcome


def main() -> int:
    """Read the arguments and run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stops", type=int, default=4, help="interruptions of a round (default: 4)")
    parser.add_argument("--longest", type=float, default=20.0, help="most seconds until the next one (default: 20)")
    parser.add_argument("--only", choices=("sqlite", "served"), help="import into one of them alone")
    parser.add_argument("--seed", type=int, default=1, help="of the random moments")
    parser.add_argument("--memory-mb", type=float, default=150.0, help="most memory of an import (default: 150)")
    add_json_option(parser)
    options = parser.parse_args()
    draw, all_met = random.Random(options.seed), True  # noqa: S311 (moments, no secrets)
    print(where(), flush=True)
    rows: dict[str, Sequence[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", options.rows)
        for kind in ("sqlite", "served"):
            for number in range(1, options.rounds + 1) if options.only in {kind, None} else ():
                pauses = [draw.uniform(0.2, options.longest) for _ in range(options.stops)]
                done = run_round(folder, options.rows, pauses, is_served=kind == "served")
                met = not done.lost and options.rows <= done.written <= done.allowed and done.peak_mb <= options.memory_mb
                all_met &= met
                twice = done.written - options.rows
                rows[f"{kind}, round {number}"] = [done.seconds, done.lost, twice, done.allowed - options.rows, done.peak_mb]
                print(
                    f"{kind}, round {number}: {options.rows:,} rows in {done.seconds:.1f} s, {done.stops}; {done.lost} lost, "
                    f"{done.written - options.rows:,} written twice (at most {done.allowed - options.rows:,}), "
                    f"peak {done.peak_mb:.0f} MB: {'met' if met else 'MISSED'}",
                    flush=True,
                )
    columns = ["seconds", "lost", "written twice", "of at most", "peak MB"]
    note_table(f"An import of {options.rows:,} rows, interrupted {options.stops} times", columns, rows)
    note_aim("rounds that lost rows, wrote too many twice or took too much memory", float(not all_met), 0, "", is_met=all_met)
    write_json(options)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
