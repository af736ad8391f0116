"""Gets and sets over each engine, embedded and behind `aiokv serve`, beside the engine's own client and py-key-value.

Every contender is a client in a process of its own; it keeps its keys and connections while all of them take their turns, in
odd rounds in the opposite order. Each turn is a closed loop of so many tasks over all keys:

  get    of a value of --value-bytes. Behind a server, the gets of one turn of the loop travel as a batch, unless "alone"
  set    of such a value for a day. With aiokv over SQLite it is on the disk when the call returns; Redis here keeps it in
         memory alone (`--save "" --appendonly no`), and py-key-value's disk store does not flush

CPU is microseconds for each call, user and system, of the client's process, of `aiokv serve` and of the engine's processes (of
all six nodes of the cluster: three primaries, three replicas). All of them share this machine, so latency includes waiting for
each other's CPU; only ratios mean something elsewhere. Figures are medians over the rounds, ratios are taken round by round.

  python benchmarks/engines.py                                     about three minutes
  python benchmarks/engines.py --only redis redis-py --rounds 9    some
  python benchmarks/engines.py --smoke                             a few seconds, which mean nothing
  python benchmarks/engines.py --json engines.json --plot engines.svg

What is not installed is left out, and why. `scale.py` reads the JSON.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from engines_contenders import BASES, CONTENDERS, Client, Contender, Figures, reason_to_leave_out, started
from harness import add_json_option, note_table, paired_ratio, progress, where, write_json

# Of each contender, by `get at 64` and so on: its batches.
Measured = dict[str, dict[str, list[Figures]]]


def measure(clients: Mapping[str, Client], options: argparse.Namespace) -> Measured:
    """Run every load on every contender, alternating."""
    loads = [(kind, concurrency) for concurrency in options.concurrency for kind in ("get", "set")]
    measured: Measured = {name: {f"{kind} at {number}": [] for kind, number in loads} for name in clients}
    total, done = options.rounds * len(loads) * len(clients), 0
    for turn in range(options.rounds):
        for kind, concurrency in loads:
            for name in list(clients)[:: -1 if turn % 2 else 1]:
                progress(done, total, "batches")
                measured[name][f"{kind} at {concurrency}"].append(clients[name].measure(kind, concurrency, options.seconds))
                done += 1
    progress(done, total, "batches")
    return measured


def medians(batches: Sequence[Figures]) -> Figures:
    """Return the median of each figure."""
    return {key: statistics.median(batch[key] for batch in batches) for key in batches[0]}


def describe(measured: Measured, contenders: Sequence[Contender], options: argparse.Namespace) -> None:
    """Print all figures."""
    print(
        f"{where()}\n{options.rounds} rounds of {options.seconds:g} s, {options.keys:,} keys, "
        f"values of {options.value_bytes:,} bytes; CPU in microseconds for each call"
    )
    heads = ("client", "server", "engine", "total", "lowest", "x peer", "p50 us", "p99 us", "a second")
    for load in next(iter(measured.values())):
        print(f"\n{load.capitalize()} task{'' if load.endswith(' at 1') else 's'}")
        print(f"  {'':<24}{''.join(f'{one:>10}' for one in heads)}")
        rows: dict[str, Sequence[float | None]] = {}
        for contender in contenders:
            batches = measured[contender.name][load]
            middle = medians(batches)
            base = measured.get(BASES[contender.engine], {}).get(load)
            totals = [batch["total_us"] for batch in batches]
            ratio = f"{paired_ratio(totals, [batch['total_us'] for batch in base]):.2f}" if base else "-"
            line = (
                f"  {contender.name:<24}{middle['client_us']:10.1f}{middle['server_us']:10.1f}{middle['engine_us']:10.1f}"
                f"{middle['total_us']:10.1f}{min(totals):10.1f}{ratio:>10}{middle['p50_us']:10,.0f}{middle['p99_us']:10,.0f}"
                f"{middle['rate']:10,.0f}  "
            )
            rows[contender.name] = [
                *(middle[part] for part in ("client_us", "server_us", "engine_us", "total_us")),
                min(totals),
                paired_ratio(totals, [batch["total_us"] for batch in base]) if base else None,
                *(middle[part] for part in ("p50_us", "p99_us", "rate")),
            ]
            note = contender.set_note if load.startswith("set") else contender.get_note
            print(f"{line}{note}".rstrip())
        columns = ["client CPU us", "server us", "engine us", "total us", "lowest", "x peer", "p50 us", "p99 us", "calls/s"]
        note_table(f"{load.capitalize()} task{'' if load.endswith(' at 1') else 's'}", columns, rows, drawn=3)
    print(f"\n'x peer' is the total CPU against {'; '.join(BASES.values())}")


def plot(measured: Measured, contenders: Sequence[Contender], options: argparse.Namespace) -> None:
    """Draw the CPU of each part and the latency of each contender, for each load."""
    import matplotlib as mpl  # noqa: PLC0415 (only for those who want a plot)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 (after the choice of the backend)

    loads = list(next(iter(measured.values())))
    figure, axes = plt.subplots(2, len(loads), figsize=(5 * len(loads), 0.6 * len(contenders) + 4), layout="constrained")
    names = [contender.name for contender in contenders]
    for column, load in enumerate(loads):
        middle = [medians(measured[name][load]) for name in names]
        cpu, latency = axes[0][column], axes[1][column]
        left = [0.0] * len(names)
        for part, color in (("client_us", "C0"), ("server_us", "C1"), ("engine_us", "C2")):
            widths = [one[part] for one in middle]
            cpu.barh(names, widths, left=left, color=color, label=part.removesuffix("_us"))
            left = [one + width for one, width in zip(left, widths, strict=True)]
        cpu.set_title(f"{load}: CPU of a call, us")
        latency.scatter([one["p50_us"] for one in middle], names, color="C0", label="p50")
        latency.scatter([one["p99_us"] for one in middle], names, color="C3", marker="|", label="p99")
        latency.set_xscale("log")
        latency.set_title(f"{load}: latency, us")
        for panel in (cpu, latency):
            panel.invert_yaxis()
            panel.legend()
    figure.suptitle(f"Engines, medians of {options.rounds} rounds\n{where()}")
    figure.savefig(options.plot)
    print(f"\nplot: {options.plot}")


def write_figures(
    measured: Measured, clients: Mapping[str, Client], contenders: Sequence[Contender], options: argparse.Namespace
) -> None:
    """Write the figures, and what `scale.py` needs to know about each contender."""
    of_contenders = {
        one.name: {
            "engine": one.engine,
            "door": one.door,
            # A peer may keep its entries elsewhere than the engine's files, and a server in its own memory.
            "entry_bytes": clients[one.name].entry_bytes if one.door == "embedded" else None,
            "medians": {load: medians(batches) for load, batches in measured[one.name].items()},
            "batches": measured[one.name],
        }
        for one in contenders
    }
    write_json(options, contenders=of_contenders)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [one.name for one in CONTENDERS]
    parser.add_argument("--seconds", type=float, default=0.4, help="of each batch (default: %(default)g)")
    parser.add_argument("--rounds", type=int, default=5, help="batches of each contender and load (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 64], help="tasks of a client (default: 1 and 64)")
    parser.add_argument("--keys", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--value-bytes", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"some of: {'; '.join(names)}")
    parser.add_argument("--folder", help="where to put the files; sets wait for its disk (default: this folder)")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw a plot (needs matplotlib)")
    add_json_option(parser)
    parser.add_argument("--smoke", action="store_true", help="try the script itself: one round, few keys")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.rounds, options.seconds, options.keys = 1, 0.05, 200
    return options


def present(only: Sequence[str] | None) -> list[Contender]:
    """Return the contenders that can run here; name the others."""
    contenders = []
    for one in CONTENDERS:
        if only and one.name not in only:
            continue
        reason = reason_to_leave_out(one)
        if reason is None:
            contenders.append(one)
        else:
            print(f"{one.name} is left out: {reason}", file=sys.stderr)
    return contenders


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement."""
    options = parse(arguments)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        print("--plot needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    if sys.platform != "linux":
        print("this needs Linux, for the CPU of other processes", file=sys.stderr)
        return 2
    contenders = present(options.only)
    if not contenders:
        print("nothing is left to measure", file=sys.stderr)
        return 2
    with (
        tempfile.TemporaryDirectory(dir=options.folder or Path.cwd()) as folder,
        started(contenders, Path(folder), options.keys, options.value_bytes) as clients,
    ):
        measured = measure(clients, options)
        describe(measured, contenders, options)
        if options.json:
            write_figures(measured, clients, contenders, options)
    if options.plot:
        plot(measured, contenders, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
