"""Instructions of a call of `kv_cached`, of its peers, and of what bounds both, under valgrind; each aim is met or missed.

What is counted is the same from run to run, whatever else the machine does: each subject runs twice in processes of their own,
with fewer and with more calls, and the difference is divided by the number of calls between. What the kernel does is not
counted. Peers hand out the one object they hold; aiokv decodes what a caller could change anew at each hit, which is why a
small dict is measured beside an int. Peers that are not installed are left out:

  pip install async-lru aiocache cashews cachebox

  python benchmarks/instructions.py                          all, 6 minutes on 2 idle cores, half of it for a million keys
  python benchmarks/instructions.py --only near growth       some tables
  python benchmarks/instructions.py --all-peers              aiocache and cashews too, which are slow

The exit status is 1 where an aim is missed. What is counted is in `instructions_subjects.py`.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from harness import add_json_option, count_instructions, has_valgrind, note_aim, note_table, progress, served, where, write_json

FEWER, MORE = 500, 2_500
PEERS = {"async-lru": "async_lru", "aiocache": "aiocache", "cashews": "cashews", "cachebox": "cachebox"}
SLOW_PEERS = {"aiocache", "cashews"}
SUBJECTS = Path(__file__).with_name("instructions_subjects.py")


class Aim(NamedTuple):
    """What a subject should cost: so many instructions, or so many times those of another subject."""

    subject: str
    most: float
    base: str | None = None

    def is_met(self, counts: Mapping[str, float]) -> bool | None:
        """Print whether the aim is met; None where one of the subjects was left out."""
        if self.subject not in counts or (self.base is not None and self.base not in counts):
            return None
        figure = counts[self.subject] / (counts[self.base] if self.base else 1)
        met = figure <= self.most
        most, is_now = (
            (f"{self.most:g} x {self.base}", f"{figure:.3g} x") if self.base else (f"{self.most:,.0f}", f"{figure:,.0f}")
        )
        print(f"  aim: {self.subject} at most {most}: {'met' if met else 'MISSED'} ({is_now})")
        unit = f"x {self.base}" if self.base else "instructions"
        return note_aim(self.subject, figure, self.most, unit, is_met=met)


class Table(NamedTuple):
    """Subjects that are counted side by side."""

    title: str
    subjects: list[str]
    aims: list[Aim]
    base: str
    calls: tuple[int, int] = (FEWER, MORE)


TABLES = {
    "near": Table(
        "A hit in this process",
        [
            "a dict in an async def",
            "cachebox",
            "async-lru",
            "aiocache",
            "cashews",
            "near, int",
            "near, method",
            "near, small dict",
        ],
        [
            Aim("near, int", 0.85, "cachebox"),
            Aim("near, method", 8_000),
            Aim("near, small dict", 10_000),
        ],
        "async-lru",
    ),
    "memory": Table(
        "A hit and a miss over memory://",
        [
            "store.get",
            "hit",
            "by hand, miss",
            "async-lru, miss",
            "aiocache, miss",
            "miss",
            "miss, write in background",
            "key of a model of 8 fields",
        ],
        [Aim("hit", 40_000), Aim("miss", 130_000), Aim("key of a model of 8 fields", 60_000)],
        "store.get",
    ),
    "many": Table(
        "kv_cached_many, for each of 100 ids",
        ["store.get_many", "many, near hit", "many, hit", "many, miss"],
        [Aim("many, near hit", 8_000), Aim("many, hit", 37_000)],
        "store.get_many",
    ),
    "server": Table(
        "A hit through a server, 64 calls at once, distinct keys",
        ["get and loads", "hit through a server", "get and loads, in batches", "hit through a server, in batches"],
        [Aim("hit through a server", 1.10, "get and loads")],
        "get and loads",
        # What the preparation costs differs by as much as a few hundred calls: the server answers when it can.
        (FEWER, 6_500),
    ),
    "growth": Table(
        "Growth: a near hit where so many keys are held",
        ["near, 1,000 keys", "near, 1,000,000 keys"],
        [Aim("near, 1,000,000 keys", 1.05, "near, 1,000 keys")],
        "near, 1,000 keys",
    ),
    "waiters": Table(
        "Growth: a waiter of one flight that gives up, where so many wait",
        ["cancel, 100 waiters", "cancel, 20,000 waiters"],
        [Aim("cancel, 20,000 waiters", 1.25, "cancel, 100 waiters")],
        "cancel, 100 waiters",
    ),
}


def is_wanted(subject: str, *, all_peers: bool) -> bool:
    """Return whether a subject can run here; say how to get what it lacks."""
    peer = next((name for name in PEERS if subject.startswith(name)), None)
    if peer is None or (peer in SLOW_PEERS and not all_peers and "miss" not in subject):
        return peer is None
    if importlib.util.find_spec(PEERS[peer]) is None:
        print(f"{subject} is left out, {peer} is not installed: pip install {peer}")
        return False
    return True


def run(job: tuple[str, int], address: str) -> int:
    """Count what one subject executes, its preparation included."""
    subject, calls = job
    return count_instructions([str(SUBJECTS), subject, str(calls), address])


def count_all(
    tables: Mapping[str, Table], count: Callable[[tuple[str, int]], int], wanted: Callable[[str], bool]
) -> dict[str, float]:
    """Return the instructions of one call of each subject."""
    calls = {subject: table.calls for table in tables.values() for subject in table.subjects if wanted(subject)}
    # The longest first, so that no processor is idle at the end.
    jobs = sorted(
        ((subject, number) for subject, both in calls.items() for number in both), key=lambda job: "000 keys" not in job[0]
    )
    totals: dict[tuple[str, int], int] = {}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for job, total in zip(jobs, pool.map(count, jobs), strict=True):
            totals[job] = total
            progress(len(totals), len(jobs), "runs under valgrind")
    return {
        subject: (totals[subject, more] - totals[subject, fewer]) / (more - fewer) for subject, (fewer, more) in calls.items()
    }


def show(table: Table, counts: Mapping[str, float]) -> bool:
    """Print a table and its aims; return whether all are met."""
    names = [name for name in table.subjects if name in counts]
    print(f"\n{table.title}\n{where()}, {table.calls[1]:,} calls less {table.calls[0]:,}")
    width = max(map(len, names))
    for name in names:
        ratio = f"  {counts[name] / counts[table.base]:6.2f} x {table.base}" if table.base in counts else ""
        print(f"  {name:<{width}}  {counts[name]:12,.0f} instructions{ratio}")
    rows = {name: [counts[name], counts[name] / counts[table.base] if table.base in counts else None] for name in names}
    note_table(table.title, ["instructions", f"x {table.base}"], rows)
    verdicts = [aim.is_met(counts) for aim in table.aims]
    return False not in verdicts


def main() -> int:
    """Count, and print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(TABLES), nargs="+", default=list(TABLES), help="count some tables only")
    parser.add_argument("--all-peers", action="store_true", help="count the hits of aiocache and cashews, too")
    add_json_option(parser)
    options = parser.parse_args()
    if not has_valgrind():
        write_json(options)
        return 0
    tables = {name: TABLES[name] for name in options.only}
    with served("memory://") as address:
        # Writes the bytecode that the counted runs read.
        run(("hit", FEWER), address)
        counts = count_all(
            tables,
            lambda job: run(job, address),
            lambda subject: is_wanted(subject, all_peers=options.all_peers),
        )
    results = [show(table, counts) for table in tables.values()]
    write_json(options)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
