"""How often several processes compute the same result when it expires, with `kv_cached` and without its early refresh.

Some processes share one `aiokv serve` server. Each calls one decorated function at a constant rate, whether or not earlier
calls have been answered. The function sleeps for a while and logs its start. This is done once for each way:

  early=0  the naive cache: when the result expires, every process notices at once, and each computes it
  early=1  the default: now and then a hit starts a background refresh, more and more likely as the end comes near
  stale    early=0 and stale_while_revalidate: a call returns the expired result, and starts a background refresh

Computations that begin within half a ttl of the first belong to one expiry. The cold start is left out, and so is an expiry
that the end of the run cuts off. The latency of a call counts from the moment at which it was due. A call is late where it
took longer than half a computation. The age of a result counts from the start of its computation. A result is stale where
its age is over the ttl.

  python benchmarks/stampede.py                         about two minutes
  python benchmarks/stampede.py --duration 15 --plot stampede.png
  python benchmarks/stampede.py --ways early=1 --processes 16 --rate 25

The exit status is 1 where early=1 takes as many computations an expiry as --aim, or more. The plot needs matplotlib:
pip install matplotlib
"""

import argparse
import asyncio
import contextlib
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from harness import add_json_option, note_aim, note_table, progress, served, where, write_json

from aiokv import AsyncKVStore, CachedFunction, kv_cached

WAYS: dict[str, dict[str, Any]] = {
    "early=0": {"early": 0},
    "early=1": {"early": 1.0},
    "stale": {"early": 0, "stale_while_revalidate": 60},
}
START_SECONDS = 0.5
GRACE_SECONDS = 15.0

# In a worker process: the starts of its computations, and how long its function takes.
_log: list[float] = []
_compute_seconds = 0.0


@dataclass(frozen=True)
class Outcome:
    """The results of one way, of all processes; times are in seconds from the common start."""

    computations: Sequence[float]
    calls: Sequence[tuple[float, float, float]]
    """For each call: when it was due, its latency, and the age of its result."""
    failures: int
    missing: int


async def expensive(name: str) -> dict[str, Any]:
    """Take a while; log the start, and return it."""
    began = time.time()
    _log.append(began)
    await asyncio.sleep(_compute_seconds)
    return {"name": name, "began": began}


async def load(cached: "CachedFunction[[str], dict[str, Any]]", options: argparse.Namespace) -> dict[str, Any]:
    """Call at a constant rate from the common start on, and record each call."""
    calls: list[tuple[float, float, float]] = []
    failures = 0

    async def call(due: float) -> None:
        nonlocal failures
        try:
            result = await cached("report")
        except Exception as error:  # noqa: BLE001 (counted and printed; the load goes on)
            failures += 1
            print(f"a call failed: {error!r}", file=sys.stderr)
        else:
            now = time.time()
            calls.append((due - options.start_at, now - due, now - result["began"]))

    async with asyncio.TaskGroup() as group:
        for number in range(int(options.duration * options.rate)):
            # Each process calls at another phase, as independent processes do.
            due = options.start_at + (number + options.worker / options.processes) / options.rate
            await asyncio.sleep(max(0.0, due - time.time()))
            group.create_task(call(due))
    await cached.aclose()
    return {"computations": [began - options.start_at for began in _log], "calls": calls, "failures": failures}


async def work(options: argparse.Namespace) -> None:
    """Run a worker process: wait for the start, make the calls, write the results; stop when standard input ends."""
    global _compute_seconds  # noqa: PLW0603 (the decorated function is the module's, its time an option)
    _compute_seconds = options.compute
    async with AsyncKVStore("stampede", url=options.url, credentials="bench:secret") as store:
        await store.get("opens a connection")
        cached = kv_cached(ttl=options.ttl, store=store, prefix=options.way, **WAYS[options.way])(expensive)
        print("ready", flush=True)
        start = sys.stdin.buffer.readline()
        if not start:
            return
        options.start_at = float(start)
        task = asyncio.current_task()
        if task is not None:
            # The measuring process holds the other end: if that process dies, this one stops, too.
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), task.cancel)
        async with asyncio.timeout(options.start_at - time.time() + options.duration + GRACE_SECONDS):
            result = await load(cached, options)
    Path(options.output).write_bytes(orjson.dumps(result))  # noqa: ASYNC240 (nothing else runs any more)


@contextlib.contextmanager
def workers(way: str, address: str, folder: Path, options: argparse.Namespace) -> Generator[list[Path]]:
    """Start the processes, yield the files that they wrote, and at the end stop those that still run."""
    shared = [f"--{name}={getattr(options, name)}" for name in ("duration", "rate", "ttl", "compute", "processes")]
    running: list[subprocess.Popen[bytes]] = []
    files = [folder / f"{way}-{worker}.json" for worker in range(options.processes)]
    try:
        for worker, file in enumerate(files):
            own = [f"--worker={worker}", f"--url={address}", f"--way={way}", f"--output={file}"]
            command = [sys.executable, __file__, *shared, *own]
            running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for process in running:
            if process.stdout is None or not process.stdout.readline():
                raise RuntimeError("a process could not start; its output is above")
        start_at = time.time() + START_SECONDS
        for process in running:
            if process.stdin is not None:
                process.stdin.write(f"{start_at}\n".encode())
                process.stdin.flush()
        deadline = start_at + options.duration + GRACE_SECONDS
        while any(process.poll() is None for process in running) and time.time() < deadline:
            elapsed = min(max(0, int(time.time() - start_at)), int(options.duration))
            progress(elapsed, max(1, int(options.duration)), f"{way}: seconds")
            time.sleep(0.2)
        progress(1, 1, f"{way}: done")
        yield files
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.communicate()


def run(way: str, address: str, folder: Path, options: argparse.Namespace) -> Outcome:
    """Run the load in one way, and gather the results of all processes."""
    results: list[dict[str, Any]] = []
    with workers(way, address, folder, options) as files:
        for file in files:
            # A process that failed has written no file.
            with contextlib.suppress(OSError, ValueError):
                results.append(orjson.loads(file.read_bytes()))
    return Outcome(
        sorted(began for result in results for began in result["computations"]),
        sorted((call[0], call[1], call[2]) for result in results for call in result["calls"]),
        sum(result["failures"] for result in results),
        options.processes - len(results),
    )


def expiries(computations: Sequence[float], options: argparse.Namespace) -> tuple[int, list[tuple[float, int]]]:
    """Group computations by expiry; return the count of the cold start, then start and count of each later expiry."""
    groups: list[list[float]] = []
    for began in computations:
        if not groups or began - groups[-1][0] > options.ttl / 2:
            groups.append([])
        groups[-1].append(began)
    whole = [(group[0], len(group)) for group in groups[1:] if group[0] < options.duration - options.ttl / 2]
    return (len(groups[0]) if groups else 0), whole


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def describe(way: str, outcome: Outcome, options: argparse.Namespace) -> float:
    """Print the results of one way; return its computations an expiry."""
    cold, whole = expiries(outcome.computations, options)
    each = statistics.mean(count for _, count in whole) if whole else math.nan
    latencies = [latency for due, latency, _ in outcome.calls if due > options.ttl]
    late = sum(latency > options.compute / 2 for latency in latencies)
    past = [age - options.ttl for _, _, age in outcome.calls if age > options.ttl]
    print(
        f"  {way:<8} computations an expiry {each:5.2f}"
        f"  ({len(whole)} expiries, at most {max((count for _, count in whole), default=0)}, cold start {cold})\n"
        f"           latency p50 {percentile(latencies, 0.5) * 1e3:.1f} ms, p99 {percentile(latencies, 0.99) * 1e3:.1f} ms;"
        f" late {late} of {len(latencies)} ({late / max(1, len(latencies)):.2%})\n"
        f"           stale {len(past) / max(1, len(outcome.calls)):.2%} of calls, by {max(past, default=0):.2f} s at most;"
        f" failed {outcome.failures}"
    )
    if outcome.missing:
        print(f"           {outcome.missing} of {options.processes} processes failed: the figures do not count them")
    return each


def plot(outcomes: Mapping[str, Outcome], options: argparse.Namespace) -> None:
    """Draw the computations of each expiry, and how many calls waited how long."""
    import matplotlib as mpl  # noqa: PLC0415 (only for those who want a plot)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 (after the choice of the backend)

    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 8), layout="constrained")
    width = options.ttl / (len(outcomes) + 2)
    for position, (way, outcome) in enumerate(outcomes.items()):
        _, whole = expiries(outcome.computations, options)
        above.bar(
            [began + position * width for began, _ in whole], [count for _, count in whole], width, label=way, align="edge"
        )
        latencies = sorted(latency * 1e3 for due, latency, _ in outcome.calls if due > options.ttl)
        below.step(latencies, [1 - rank / len(latencies) for rank in range(len(latencies))], where="post", label=way)
    above.set(xlabel="seconds", ylabel="computations of an expiry", title="How often one expiry makes processes compute")
    above.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    below.set(xlabel="latency, ms", ylabel="share of calls that took longer", title="How long calls wait")
    below.set(xscale="log", yscale="log")
    for axes in (above, below):
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(
        f"{options.processes} processes, {options.rate:g} calls a second each, ttl {options.ttl:g} s,"
        f" a computation takes {options.compute:g} s"
    )
    figure.savefig(options.plot, dpi=120)
    print(f"\nplot: {options.plot}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", type=float, default=40.0, help="seconds of load for each way (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=8, help="processes that share the server (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=50.0, help="calls a second of each process (default: %(default)s)")
    parser.add_argument("--ttl", type=float, default=2.0, help="seconds that a result is fresh, from 1 (default: %(default)s)")
    parser.add_argument("--compute", type=float, default=0.1, help="seconds that the function takes (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="what to compare (default: all)")
    parser.add_argument("--store", default="memory://", help="what the server keeps entries in (default: %(default)s)")
    parser.add_argument("--aim", type=float, default=1.2, help="computations an expiry to stay below (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw a plot (needs matplotlib)")
    add_json_option(parser)
    for name, kind in (("worker", int), ("url", str), ("way", str), ("output", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.processes, options.rate, options.compute) <= 0:
        parser.error("--processes, --rate and --compute must be more than 0")
    if options.ttl < 1 or options.duration < 3 * options.ttl:
        parser.error("--ttl must be 1 or more, and --duration at least three times that")
    return options


def main() -> int:
    """Run the measurement."""
    options = parse()
    if options.worker is not None:
        asyncio.run(work(options))
        return 0
    if options.plot:
        try:
            import matplotlib  # noqa: F401, ICN001, PLC0415 (checked now, not after two minutes)
        except ImportError:
            print("--plot needs matplotlib: pip install matplotlib", file=sys.stderr)
            return 2
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder, served(options.store) as address:
        for way in options.ways:
            outcomes[way] = run(way, address, Path(folder), options)
    print(
        f"\n{options.processes} processes, {options.rate:g} calls a second each, ttl {options.ttl:g} s,"
        f" a computation takes {options.compute:g} s, {options.duration:g} s of load\n{where()}"
    )
    each = {way: describe(way, outcome, options) for way, outcome in outcomes.items()}
    rows: dict[str, Sequence[float]] = {}
    for way, outcome in outcomes.items():
        latencies = [latency * 1e3 for due, latency, _ in outcome.calls if due > options.ttl]
        rows[way] = [each[way], percentile(latencies, 0.5), percentile(latencies, 0.99), outcome.failures]
    note_table("A stampede", ["computations an expiry", "p50 ms", "p99 ms", "failed"], rows)
    if options.plot:
        plot(outcomes, options)
    met = not any(outcome.missing for outcome in outcomes.values())
    if "early=1" in each:
        below = each["early=1"] < options.aim
        note_aim("early=1, computations an expiry", each["early=1"], options.aim, "", is_met=below)
        met &= below
        result = f"{'met' if below else 'MISSED'} ({each['early=1']:.2f})"
        print(f"  aim: early=1 below {options.aim:g} computations an expiry: {result}")
    write_json(options)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
