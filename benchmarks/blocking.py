"""Blocking calls: `KVStore` beside the official client, from many threads over TLS, and its CPU beside that of `AsyncKVStore`.

  threads    calls a second and CPU of this process for each call, by 32 threads and by one, over TLS to `aiokv serve` on this
             machine: `get` and `set` of distinct keys, alternating batches. `KVStore, no batching` sends each get by itself, as
             to a service that takes no batches.
  cpu        instructions of one blocking get beside an awaited one, by one thread, and of a change of threads: to hand
             something to the loop's thread, and be woken by it. Counted under valgrind, the kernel's left out: two runs of
             each, and the difference divided by the calls between.

The official client is left out where `fal` is not installed: pip install fal

  python benchmarks/blocking.py                                     two minutes on 2 idle cores
  python benchmarks/blocking.py --only cpu                          one of the two
  python benchmarks/blocking.py --json blocking.json --plot blocking.svg

The exit status is 1 where an aim is missed.
"""

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import io
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import (
    add_json_option,
    count_instructions,
    has_valgrind,
    note_table,
    paired_ratio,
    progress,
    served,
    verdict,
    where,
    write_json,
)

from aiokv import AsyncKVStore, HttpOptions, KVStore

KINDS = ("threads", "cpu")
OFFICIAL = "official client"
OURS, UNBATCHED = "KVStore", "KVStore, no batching"
SUBJECTS = {"awaited": (200, 1_200), "blocking": (200, 1_200), "change of threads": (500, 3_000)}
MOST_CPU, LEAST_RATE = 1.3, 5.0

Calls = dict[str, Callable[[str], object]]
Figures = dict[str, Any]


@contextlib.contextmanager
def served_with_tls(folder: Path) -> Generator[tuple[str, str, Path]]:
    """Run `aiokv serve` with a certificate and an access file; yield its address, a key and the certificate to trust."""
    import trustme  # noqa: PLC0415 (not needed where instructions are counted)

    from aiokv.server import add_key  # noqa: PLC0415 (likewise)

    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    key = add_key(folder / "access", "bench")
    arguments = ["--port", "0", "--store", "memory://", "--access-file", "access", "--tls-cert", "server.pem"]
    command = [sys.executable, "-m", "aiokv", "serve", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder) as server:
        try:
            line = server.stderr.readline() if server.stderr else ""
            if " at " not in line:
                raise RuntimeError(f"the server did not start: {line.strip()}")
            yield line.split(" at ", 1)[1].split(",")[0].strip(), key, folder / "ca.pem"
        finally:
            server.terminate()


def contenders_at(address: str, key: str, ca_file: Path) -> dict[str, Any]:
    """Return the clients by name."""
    made: dict[str, Any] = {}
    if importlib.util.find_spec("fal") is None:
        print(f"{OFFICIAL} is left out, fal is not installed: pip install fal")
    else:
        os.environ |= {"FAL_KEY": key, "SSL_CERT_FILE": str(ca_file)}
        from fal.toolkit import kv  # noqa: PLC0415 (takes seconds)
        from fal.toolkit.file.providers import fal as provider  # noqa: PLC0415

        kv.FAL_KV_HOST = address
        provider.REST_HOST = address.removeprefix("https://")
        made[OFFICIAL] = kv.KVStore("bench")
    for name, batching in ((OURS, True), (UNBATCHED, False)):
        http = HttpOptions(ca_file=str(ca_file), batching=batching)
        made[name] = KVStore("bench", url=address, credentials=key, http=http)
    return made


def call_in_threads(call: Callable[[str], object], keys: Sequence[str], threads: int) -> tuple[float, float]:
    """Make a call for each key from so many threads; return wall and CPU seconds of all."""
    remaining = iter(keys)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                with lock:
                    key = next(remaining, None)
                if key is None:
                    return
                call(key)
        except BaseException as error:  # noqa: BLE001 (raised in the main thread)
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    gc.collect()
    started, cpu = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - started, time.process_time() - cpu


def measure_threads(options: argparse.Namespace) -> Figures:
    """Alternate the clients; return calls a second and CPU microseconds of a call, batch by batch."""
    samples: Figures = {}
    value = "x" * options.value_bytes
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as folder, served_with_tls(Path(folder)) as (address, key, ca_file):
        clients = contenders_at(address, key, ca_file)
        loads: dict[str, tuple[int, Callable[[Any], Callable[[str], object]]]] = {
            f"get by {options.threads}": (options.threads, lambda client: client.get),
            f"set by {options.threads}": (options.threads, lambda client: lambda key: client.set(key, value)),
            "get by 1": (1, lambda client: client.get),
        }
        jobs = [(load, number) for load in loads for number in range(options.rounds)]
        for done, (load, number) in enumerate(jobs):
            progress(done, len(jobs), "rounds")
            threads, call_of = loads[load]
            for name in list(clients)[:: 1 if number % 2 == 0 else -1]:
                # The official client makes a connection for each call: so many fewer calls take as long.
                calls = max(threads, options.calls // (8 if name == OFFICIAL else 1) // (1 if threads > 1 else 8))
                keys = [f"key-{next(numbers)}" for _ in range(calls)]
                # It prints where it retries.
                with contextlib.redirect_stdout(io.StringIO()):
                    call_of(clients[name])(keys[0])
                    wall, cpu = call_in_threads(call_of(clients[name]), keys, threads)
                of_load = samples.setdefault(load, {}).setdefault(name, {"calls_per_second": [], "cpu_us": []})
                of_load["calls_per_second"].append(calls / wall)
                of_load["cpu_us"].append(cpu / calls * 1e6)
        progress(len(jobs), len(jobs), "rounds")
        clients[OURS].close()
        clients[UNBATCHED].close()
    return samples


def run_subject(subject: str, calls: int, address: str) -> None:
    """Make the calls of one subject, and end the process: it runs under valgrind."""
    # One pass more or less over the whole heap is more than all else that is counted.
    gc.disable()
    if subject == "awaited":
        asyncio.run(_await_gets(calls, address))
    elif subject == "blocking":
        store = KVStore("bench", url=address)
        store.set("key", "value")
        for _ in range(20 + calls):
            store.get("key")
    else:
        _change_threads(calls)
    os._exit(0)


async def _await_gets(calls: int, address: str) -> None:
    store = AsyncKVStore("bench", url=address)
    await store.set("key", "value")
    for _ in range(20 + calls):
        await store.get("key")
    # The end of the loop would cost more where fewer calls have been made.
    os._exit(0)


def _change_threads(calls: int) -> None:
    loop, lock = asyncio.new_event_loop(), threading.Lock()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    lock.acquire()
    for _ in range(20 + calls):
        loop.call_soon_threadsafe(lock.release)
        lock.acquire()


def count() -> Figures:
    """Count the instructions of a call of each subject."""
    jobs = [(subject, calls) for subject, both in SUBJECTS.items() for calls in both]
    totals: dict[tuple[str, int], int] = {}
    with served("memory://") as address:

        def run(job: tuple[str, int]) -> int:
            return count_instructions([__file__, "--subject", job[0], str(job[1]), address])

        # Writes the bytecode that the counted runs read.
        run(("blocking", 1))
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for job, total in zip(jobs, pool.map(run, jobs), strict=True):
                totals[job] = total
                progress(len(totals), len(jobs), "runs under valgrind")
    return {
        subject: (totals[subject, more] - totals[subject, fewer]) / (more - fewer)
        for subject, (fewer, more) in SUBJECTS.items()
    }


def judge(figures: Figures) -> dict[str, bool]:
    """Print the figures and the aims; return which were met."""
    met: dict[str, bool] = {}
    for load, of_load in figures.get("threads", {}).items():
        print(f"\n{load}, over TLS")
        rows: dict[str, Sequence[float | None]] = {}
        for name, of_client in of_load.items():
            rates, cpu = of_client["calls_per_second"], of_client["cpu_us"]
            times = paired_ratio(rates, of_load[OFFICIAL]["calls_per_second"]) if OFFICIAL in of_load else None
            rows[name] = [statistics.median(rates), statistics.median(cpu), times]
            ratio = f"  {paired_ratio(rates, of_load[OFFICIAL]['calls_per_second']):6.2f} x" if OFFICIAL in of_load else ""
            print(
                f"  {name:<21} {statistics.median(rates):9,.0f} calls/s (min {min(rates):,.0f}, max {max(rates):,.0f})"
                f"  {statistics.median(cpu):7.0f} us of CPU{ratio}"
            )
        note_table(f"{load}, over TLS", ["calls/s", "CPU us", f"x {OFFICIAL}"], rows)
        if OFFICIAL in of_load and not load.endswith(" 1"):
            for name in (OURS, UNBATCHED):
                slowdown = paired_ratio(of_load[OFFICIAL]["calls_per_second"], of_load[name]["calls_per_second"])
                what = f"{load}: the official client's rate, to that of {name},"
                met[f"{load}, {name}"] = verdict(what, slowdown, 1 / LEAST_RATE)
    if "cpu" in figures:
        counts: Mapping[str, float] = figures["cpu"]
        print("\nOne get, by one thread")
        for name, instructions in counts.items():
            print(f"  {name:<17} {instructions:10,.0f} instructions  {instructions / counts['awaited']:5.2f} x awaited")
        rows = {name: [instructions, instructions / counts["awaited"]] for name, instructions in counts.items()}
        note_table("One get, by one thread", ["instructions", "x awaited"], rows)
        beyond = (counts["blocking"] - counts["change of threads"]) / counts["awaited"]
        met["cpu"] = verdict("a blocking get less a change of threads, to an awaited one,", beyond, MOST_CPU)
    return met


def plot(figures: Figures, options: argparse.Namespace) -> None:
    """Draw the rates of each client, for each load."""
    import matplotlib as mpl  # noqa: PLC0415 (only for those who want a plot)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 (after the choice of the backend)

    loads = figures["threads"]
    figure, axes = plt.subplots(1, len(loads), figsize=(5 * len(loads), 3), layout="constrained", squeeze=False)
    for panel, (load, of_load) in zip(axes[0], loads.items(), strict=True):
        bars = panel.barh(list(of_load), [statistics.median(one["calls_per_second"]) for one in of_load.values()])
        panel.bar_label(bars, fmt="{:,.0f}", padding=3)
        panel.invert_yaxis()
        panel.margins(x=0.25)
        panel.set_title(f"{load}: calls a second")
    figure.suptitle(f"Blocking calls over TLS, medians of {options.rounds} rounds\n{where()}")
    figure.savefig(options.plot)
    print(f"\nplot: {options.plot}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="default: both")
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--calls", type=int, default=6_400, help="of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of `threads` (default: %(default)s)")
    parser.add_argument("--value-bytes", type=int, default=100)
    add_json_option(parser)
    parser.add_argument("--plot", metavar="FILE.svg", help="draw the rates (needs matplotlib)")
    parser.add_argument("--smoke", action="store_true", help="try the script itself: one round, few calls, no aims")
    parser.add_argument("--subject", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.plot and (importlib.util.find_spec("matplotlib") is None or "threads" not in options.only):
        parser.error("--plot draws `threads`, and needs matplotlib: pip install matplotlib")
    if options.smoke:
        options.only, options.threads, options.calls, options.rounds = ["threads"], 4, 64, 1
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement."""
    options = parse(arguments)
    if options.subject:
        subject, calls, address = options.subject
        run_subject(subject, int(calls), address)
    print(where())
    figures: Figures = {}
    if "threads" in options.only:
        figures["threads"] = measure_threads(options)
    if "cpu" in options.only and has_valgrind():
        figures["cpu"] = count()
    met = judge(figures)
    write_json(options, figures=figures)
    if options.plot:
        plot(figures, options)
    return 0 if options.smoke or all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
