"""`aiokv serve` beside other servers: CPU for each request, latency, and memory of idle connections.

Every server runs at once, in processes of its own, with its defaults and every bound in force, and is loaded in turn:

  get    gets of a 100-byte value over 1,000 keys, from --concurrency kept-alive connections in a closed loop (wrk)
  set    sets of such values: durable with aiokv over SQLite, where 200 means that the value is on the disk. Redis keeps
         them in memory alone (`--save "" --appendonly no`), so its sets are not durable
  idle   memory for each of 1,000 connections that have sent one request and stay open

Requests bear the headers that aiokv's own client sends. CPU is that of the server's processes, their children and threads,
user and system; the load generator is a process of its own and does not count. In odd rounds the servers come in the opposite
order. Figures are medians over the rounds, ratios are taken round by round. Other programs on the machine raise CPU times, most
those of servers in Python, since they take cores and caches: "lowest" is the round that met the least of that.

  python benchmarks/server.py                          about four minutes
  python benchmarks/server.py --rounds 1               a smoke run
  python benchmarks/server.py --plot server.png --json server.json

The exit status is 1 where an aim is missed. What is not installed is left out and named.
"""

import argparse
import importlib.util
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import add_json_option, note_aim, note_table, paired_ratio, progress, verdict, where, write_json
from server_contenders import CONTENDERS, INSTALLED_BY, KEYS, VALUE, WEBDIS, Contender, Running, is_installed, started

IDLE_CONNECTIONS = 1_000
# For each load: the contender that is judged against webdis with Redis, and the highest ratio of their CPU.
AIMS = (("get", "memory", 0.5), ("get", "sqlite", 0.9), ("set", "sqlite", 1.4))
MAX_IDLE_KB = 5.0

# wrk calls `request` for each request, so all are made beforehand.
SCRIPT = """
local requests, at = {{}}, 0
function init()
  for number = 0, {keys} - 1 do
    requests[number] = wrk.format("{method}", "{path}" .. number .. "{query}", nil, {body})
  end
end
function request()
  at = (at + 1) % {keys}
  return requests[at]
end
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format("RESULT %d %d %d %d %d\\n", summary.requests, summary.duration,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""

Batch = dict[str, float]
Figures = dict[str, dict[str, list[Batch]]]


def load(running: Running, kind: str, folder: Path, options: argparse.Namespace) -> Batch:
    """Load a server; return CPU microseconds for each request, microseconds of latency, and requests a second."""
    get_method, get_path, set_method, set_path, query = running.calls
    is_set = kind == "set"
    script = folder / "load.lua"
    script.write_text(
        SCRIPT.format(
            keys=KEYS,
            method=set_method if is_set else get_method,
            path=set_path if is_set else get_path,
            query=query if is_set else "",
            body=f'"{VALUE}"' if is_set else "nil",
        )
    )
    headers = [word for name, value in running.headers.items() for word in ("-H", f"{name}: {value}")]
    before = running.cpu_seconds()
    answer = subprocess.run(
        [
            *("wrk", "-t", "1", "-c", str(options.concurrency), "-d", f"{options.seconds}s"),
            *("-s", str(script), *headers, running.address),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    cpu_seconds = running.cpu_seconds() - before
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)", answer)
    if found is None:
        raise RuntimeError(f"wrk did not finish: {answer}")
    requests, duration_us, errors, p50_us, p99_us = map(int, found.groups())
    if errors or not requests:
        raise RuntimeError(f"{errors} of {requests} requests to {running.address} failed")
    return {"cpu_us": cpu_seconds / requests * 1e6, "p50_us": p50_us, "p99_us": p99_us, "rate": requests / duration_us * 1e6}


def idle_kilobytes(running: Running) -> float:
    """Return the memory for each connection that has sent a request and stays open."""
    before = running.resident_bytes()
    connections = [running.connect() for _ in range(IDLE_CONNECTIONS)]
    for number, connection in enumerate(connections):
        connection.request("GET", running.get_path(number % KEYS), headers=running.headers)
        connection.getresponse().read()
    time.sleep(0.5)
    grown = running.resident_bytes() - before
    for connection in connections:
        connection.close()
    return grown / IDLE_CONNECTIONS / 1024


def measure(contenders: Sequence[Contender], folder: Path, options: argparse.Namespace) -> tuple[Figures, dict[str, float]]:
    """Run every load on every contender that gets it, alternating."""
    figures: Figures = {kind: {one.name: [] for one in contenders if kind in one.loads} for kind in ("get", "set")}
    total = options.rounds * sum(map(len, figures.values()))
    with started(contenders, folder) as running:
        # At first, before anything else could leave room that connections then take.
        idle = {one.name: idle_kilobytes(running[one.name]) for one in contenders if "idle" in one.loads}
        done = 0
        for number in range(options.rounds):
            for kind, of_contenders in figures.items():
                for name in list(of_contenders)[:: -1 if number % 2 else 1]:
                    progress(done, total, "batches")
                    of_contenders[name].append(load(running[name], kind, folder, options))
                    done += 1
        progress(done, total, "batches")
    return figures, idle


def describe(figures: Figures, idle: Mapping[str, float], contenders: Sequence[Contender], options: argparse.Namespace) -> None:
    """Print all figures."""
    notes = {one.name: one.note for one in contenders}
    titles = {"get": "Gets of a 100-byte value", "set": "Sets of a 100-byte value, durable with aiokv"}
    print(f"{where()}\n{options.rounds} rounds of {options.seconds} s, {options.concurrency} connections, kept alive")
    for kind, of_contenders in figures.items():
        heads = "".join(f"{head:>10}" for head in ("CPU us", "lowest", "x webdis", "p50 ms", "p99 ms", "a second"))
        print(f"\n{titles[kind]}\n  {'':<22}{heads}")
        base = [batch["cpu_us"] for batch in of_contenders.get(WEBDIS, ())]
        rows: dict[str, Sequence[float | None]] = {}
        for name, batches in of_contenders.items():
            cpu = [batch["cpu_us"] for batch in batches]
            middle = {key: statistics.median(batch[key] for batch in batches) for key in batches[0]}
            ratio = f"{paired_ratio(cpu, base):.2f}" if base else "-"
            print(
                f"  {name:<22}{middle['cpu_us']:10.1f}{min(cpu):10.1f}{ratio:>10}{middle['p50_us'] / 1e3:10.2f}"
                f"{middle['p99_us'] / 1e3:10.2f}{middle['rate']:10,.0f}  {notes[name]}"
            )
            times = paired_ratio(cpu, base) if base else None
            rows[name] = [middle["cpu_us"], min(cpu), times, middle["p50_us"] / 1e3, middle["p99_us"] / 1e3, middle["rate"]]
        note_table(titles[kind], ["CPU us", "lowest", "x webdis", "p50 ms", "p99 ms", "calls/s"], rows)
    print(f"\nMemory of {IDLE_CONNECTIONS:,} idle connections, KB for each")
    note_table("Memory of an idle connection", ["KB"], {name: [kilobytes] for name, kilobytes in idle.items()})
    for name, kilobytes in idle.items():
        print(f"  {name:<22}{kilobytes:9.1f}")


def judge(figures: Figures, idle: Mapping[str, float]) -> dict[str, bool]:
    """Print the aims; return which were met."""
    met: dict[str, bool] = {}
    print()
    for kind, name, aim in AIMS:
        for contender in (name, f"{name}, no uvloop"):
            if contender in figures[kind] and WEBDIS in figures[kind]:
                cpu, base = ([batch["cpu_us"] for batch in figures[kind][one]] for one in (contender, WEBDIS))
                what = f"CPU of a {kind} over {contender}, to {WEBDIS}{', which is not durable' if kind == 'set' else ''},"
                met[f"{kind}: {contender}"] = verdict(what, paired_ratio(cpu, base), aim)
    for name, kilobytes in idle.items():
        if name in {"memory", "memory, no uvloop"}:
            print(f"  aim: an idle connection over {name} under {MAX_IDLE_KB:g} KB: {kilobytes:.1f} KB")
            met[f"idle: {name}"] = kilobytes < MAX_IDLE_KB
            note_aim(f"an idle connection over {name}", kilobytes, MAX_IDLE_KB, "KB", is_met=kilobytes < MAX_IDLE_KB)
    return met


def plot(figures: Figures, idle: Mapping[str, float], options: argparse.Namespace) -> None:
    """Draw the CPU, the latency and the memory of each contender."""
    import matplotlib as mpl  # noqa: PLC0415 (only for those who want a plot)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 (after the choice of the backend)

    figure, axes = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
    ours = {one.name for one in CONTENDERS if one.ours}
    panels = [
        (axes[0][0], "get", "cpu_us", 1.0, "CPU of a get, us"),
        (axes[0][1], "set", "cpu_us", 1.0, f"CPU of a set, us (durable, but for {WEBDIS})"),
        (axes[1][0], "get", "p99_us", 1e3, "p99 of a get, ms"),
    ]
    for panel, kind, key, unit, title in panels:
        values = {name: [batch[key] / unit for batch in batches] for name, batches in figures[kind].items()}
        middle = [statistics.median(of_one) for of_one in values.values()]
        panel.barh(list(values), middle, color=["C0" if name in ours else "C7" for name in values])
        for position, of_one in enumerate(values.values()):
            panel.plot([min(of_one), max(of_one)], [position, position], color="black", linewidth=1)
        panel.set_title(title)
    axes[1][1].barh(list(idle), list(idle.values()), color=["C0" if name in ours else "C7" for name in idle])
    axes[1][1].set_title("memory of an idle connection, KB")
    for panel in axes.flat:
        panel.invert_yaxis()
    figure.suptitle(f"Servers at {options.concurrency} connections, medians and extremes of {options.rounds} rounds\n{where()}")
    figure.savefig(options.plot, dpi=120)
    print(f"\nplot: {options.plot}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=1, help="of each batch, at least 1 (default: %(default)g)")
    parser.add_argument("--rounds", type=int, default=9, help="batches of each server and load (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=64, help="connections (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[one.name for one in CONTENDERS], help="default: all")
    parser.add_argument("--folder", help="where to put the files; sets wait for its disk (default: this folder)")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw a plot (needs matplotlib)")
    add_json_option(parser)
    return parser.parse_args()


def present(options: argparse.Namespace) -> list[Contender]:
    """Return the contenders that can run here; name the others."""
    contenders = []
    for one in CONTENDERS:
        if options.only and one.name not in options.only:
            continue
        missing = [name for name in one.needs if not is_installed(name)]
        if missing:
            commands = ", ".join(INSTALLED_BY[name] for name in missing)
            print(f"{one.name} is left out, something is not installed: {commands}", file=sys.stderr)
        else:
            contenders.append(one)
    return contenders


def main() -> int:
    """Run the measurement."""
    options = parse()
    missing = [] if is_installed("wrk") else [INSTALLED_BY["wrk"]]
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        missing.append("pip install matplotlib")
    if missing or sys.platform != "linux":
        print(f"this needs Linux{''.join(f', and: {command}' for command in missing)}", file=sys.stderr)
        return 2
    # For the idle connections; servers that are started here inherit it.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard) if hard != resource.RLIM_INFINITY else 8192, hard))
    contenders = present(options)
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd()) as folder:
        figures, idle = measure(contenders, Path(folder), options)
    describe(figures, idle, contenders, options)
    met = judge(figures, idle)
    if options.plot:
        plot(figures, idle, options)
    write_json(options, figures=figures, idle_kb=idle)
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
