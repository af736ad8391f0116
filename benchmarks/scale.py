"""How many nodes, how much money, how much latency: a model, not a measurement, from what one call costs on one core.

It plans four shapes for 10^4 to 10^9 keys and 10^3 to 10^7 requests a second, and prints the cheapest that works:

  memory    one `aiokv serve --store memory://`: one process
  sqlite    one machine: `aiokv serve --workers N` over one file; one writer at a time, durable
  redis     any number of `aiokv serve` over one Redis with its replica
  cluster   any number of `aiokv serve` over a Redis or Valkey Cluster

Where something breaks first, such as the hottest key, it says what and what to do; where no shape works as it is, it does that.

  python benchmarks/engines.py --json engines.json
  python benchmarks/scale.py --figures engines.json --plot scale.svg
  python benchmarks/scale.py --measure                      measures for half a minute first
  python benchmarks/scale.py --figures engines.json --zipf 0 --value-bytes 10000 --server-price 60

The figures are as good as the machine that they were measured on; prices are examples. All assumptions are printed and options.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import engines
from harness import add_json_option, note_table, where, write_json
from scale_model import PLANNERS, Assumptions, Cost, Plan, best_plan, highest_rate, load_of

KEYS = (10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
RATES = (10**3, 10**4, 10**5, 10**6, 10**7)
SHAPES = tuple(PLANNERS)


def load_at(contender: Mapping[str, Any], kind: str, *, one_task: bool = False) -> Mapping[str, float]:
    """Return the figures of a load of a contender, that of the most tasks or of one: of each the best of all rounds.

    Other programs on the machine can only make a call dearer, so the best is what it costs on a node of its own.
    """
    loads = {int(name.split(" at ")[1]): name for name in contender["batches"] if name.startswith(f"{kind} at ")}
    batches = contender["batches"][loads[min(loads) if one_task else max(loads)]]
    return {name: (max if name == "rate" else min)(batch[name] for batch in batches) for name in batches[0]}


def costs_of(figures: Mapping[str, Any], given: Assumptions) -> dict[str, Cost]:
    """Return what each shape costs, from the JSON of `engines.py`; shapes that were not measured are left out, and named."""
    costs = {}
    measured_bytes = figures["options"]["value_bytes"]
    for shape in SHAPES:
        try:
            served, embedded = figures["contenders"][f"{shape}, served"], figures["contenders"][shape]
        except KeyError as missing:
            print(f"{shape} is left out: {missing.args[0]!r} was not measured", file=sys.stderr)
            continue
        # An aiokv without batches sends every get alone.
        alone = load_at(figures["contenders"].get(f"{shape}, served, alone", served), "get")
        batched, set_ = load_at(served, "get"), load_at(served, "set")
        server_us, engine_us = (
            (1 - given.batched_share) * alone[part] + given.batched_share * batched[part] for part in ("server_us", "engine_us")
        )
        costs[shape] = Cost(
            server_get_us=server_us,
            server_set_us=set_["server_us"],
            engine_get_us=engine_us,
            # On a cluster the primary and its replica both apply a set, and their CPU was measured together.
            engine_set_us=set_["engine_us"] / (2 if shape == "cluster" else 1),
            entry_overhead_bytes=max(0.0, embedded["entry_bytes"] - measured_bytes),
            sets_ps=load_at(embedded, "set")["rate"] if shape == "sqlite" else math.inf,
            commit_ms=load_at(embedded, "set", one_task=True)["p50_us"] / 1e3 if shape == "sqlite" else 0.0,
        )
    return costs


def measured_here(*, smoke: bool) -> dict[str, Any]:
    """Measure what the model needs; takes half a minute."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engines.json"
        names = [f"{shape}{door}" for shape in SHAPES for door in ("", ", served", ", served, alone")]
        options = ["--only", *names, "--rounds", "3", "--json", str(path), *(["--smoke"] if smoke else [])]
        if engines.main(options) != 0:
            raise RuntimeError("nothing could be measured")
        figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def power(number: float) -> str:
    """Return a power of ten as `10^n`."""
    return f"10^{round(math.log10(number))}"


def count(number: float) -> str:
    """Return a large number in short."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"


def milliseconds(number: float) -> str:
    """Return milliseconds; a dash where a queue would grow for ever."""
    return f"{number:.2f}" if math.isfinite(number) else "-"


def describe_assumptions(given: Assumptions, costs: Mapping[str, Cost], measured_at: str) -> None:
    """Print everything that the plans rest on."""
    print(f"Measured: {measured_at}\n")
    heads = "".join(f"{head:>12}" for head in ("server get", "set", "engine get", "set", "entry bytes", "sets/s"))
    print(f"{'CPU of a call, us':<20}{heads}")
    for shape, cost in costs.items():
        cells = [f"{figure:,.1f}" for figure in cost[:4]]
        cells += [f"+{cost.entry_overhead_bytes:,.0f}", "-" if math.isinf(cost.sets_ps) else count(cost.sets_ps)]
        print(f"  {shape:<18}{''.join(f'{cell:>12}' for cell in cells)}")
    print("\nAssumed, each an option:")
    for one in dataclasses.fields(given):
        print(f"  --{one.name.replace('_', '-'):<24}{getattr(given, one.name):>12,}")
    print(
        """
And always:
- Load is steady. Peaks, restarts and failovers need room beside this: plan with your peak, or with a lower --utilisation.
- Requests are spread evenly over servers, connections over their worker processes, and all keys but the hottest over primaries.
- A server process and an engine node are each a queue M/G/1 with one core. The 99th percentile is the slowest stage's, taken as
  exponential, beside the means of the others.
- CPU of a call is that of the best round, since other programs on the machine only make it dearer.
- CPU of a call does not grow with the value; network and memory do. CPU was measured with the values of the JSON.
- Servers bear no state. Memory of connections, TLS, access logs and backups are not counted.
- A set on the cluster takes the same CPU on its primary and on each replica."""
    )


def describe_plans(plans: Mapping[tuple[int, int], Plan]) -> None:
    """Print the cheapest plan for each size."""
    columns = ["servers", "engine nodes", "price a month", "get ms", "get p99 ms", "set ms", "set p99 ms"]
    rows = {
        f"{power(keys)} keys, {power(rate)} requests/s: {plan.shape}{'' if plan.works else ', breaks'}": [
            plan.servers,
            plan.engines,
            plan.price,
            plan.get_ms,
            plan.get_p99_ms,
            plan.set_ms,
            plan.set_p99_ms,
        ]
        for (keys, rate), plan in plans.items()
    }
    note_table("The cheapest that works, by the model", columns, rows, drawn=2)
    heads = f"{'a month':>12}{'get ms':>9}{'p99':>7}{'set ms':>9}{'p99':>7}"
    print(f"\nThe cheapest that works\n{'keys':>6}{'req/s':>7}  {'shape':<9}{'servers':>8}{'engines':>8}{heads}  decided by")
    for (keys, rate), plan in plans.items():
        limit = f"{plan.tightest.name} {plan.tightest.used:.0%}"
        how = f"; with {', '.join(plan.remedies)}" if plan.remedies else ""
        verdict = f"{limit}{how}" if plan.works else f"BREAKS: {limit}: {plan.tightest.remedy}{how}"
        print(
            f"{power(keys):>6}{power(rate):>7}  {plan.shape:<9}{plan.servers:8,}{plan.engines:8,}{plan.price:12,.0f}"
            f"{milliseconds(plan.get_ms):>9}{milliseconds(plan.get_p99_ms):>7}{milliseconds(plan.set_ms):>9}"
            f"{milliseconds(plan.set_p99_ms):>7}  {verdict}"
        )


def describe_ends(costs: Mapping[str, Cost], given: Assumptions) -> None:
    """Print for each shape how far it goes, what breaks first, and what to do."""
    print("\nHow far each shape goes as it is, and what breaks first")
    for shape, cost in costs.items():
        before: tuple[str, str] | None = None
        for keys in KEYS:
            rate, limit = highest_rate(shape, keys, cost, given)
            now = (count(rate), limit.name)
            if now != before:
                print(f"  {shape:<9}{power(keys):>6} keys: {now[0]:>7} requests/s, then {limit.name}. Do: {limit.remedy}")
            before = now


def describe_breaks(costs: Mapping[str, Cost], given: Assumptions) -> None:
    """Print what each of the limits that more nodes do not lift allows, and what to do."""
    print("\nWhat more nodes do not help against")
    if "cluster" in costs:
        cost = costs["cluster"]
        mean_us = (1 - given.set_share) * cost.engine_get_us + given.set_share * cost.engine_set_us
        for keys in KEYS:
            load = load_of(keys, 1.0, given)
            share = load.hot_gets_ps + load.hot_sets_ps
            full = count(given.utilisation * 1e6 / mean_us / share)
            print(f"  The hottest of {power(keys)} keys gets {share:.2%} of the requests: {full} requests/s fill its primary.")
        near = f"NearCache(ttl={given.near_ttl_seconds:g}) in {given.client_processes} processes"
        print(f"    {near} leaves {count(given.client_processes / given.near_ttl_seconds)} reads a second of a key.")
        print("    A key that is written too often must become several, of which each writer takes one.")
    if "sqlite" in costs:
        sets = costs["sqlite"].sets_ps * given.utilisation
        requests = sets / given.set_share if given.set_share else math.inf
        print(f"  One SQLite writer takes {count(sets)} sets/s, so {count(requests)} requests/s.")
        print("    Several servers, each with its namespaces, have a writer each.")
    if given.watchers:
        sets = given.utilisation * 1e6 / given.event_us
        print(f"  One watcher follows {count(sets)} changes/s of its namespace. Past that it gets Lost, without a near cache.")
        for shape, cost in costs.items():
            calls = (1 - given.set_share) * cost.server_get_us + given.set_share * cost.server_set_us
            extra = given.set_share * given.watchers * given.event_us / calls
            print(
                f"  {given.watchers} watchers of each change cost {extra:.0%} of the CPU of the requests on servers of {shape}."
            )
        print("    More namespaces, fewer watchers, or near caches with a ttl alone.")


def plot(plans: Mapping[tuple[int, int], Plan], costs: Mapping[str, Cost], given: Assumptions, path: str) -> None:
    """Draw price, nodes and latency by requests a second, a line for each number of keys, and where each shape ends."""
    import matplotlib as mpl  # noqa: PLC0415 (only for those who want a plot)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 (after the choice of the backend)

    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    panels = (
        (axes[0][0], "price a month", lambda plan: plan.price),
        (axes[0][1], "nodes, servers and engines", lambda plan: plan.servers + plan.engines),
        (axes[1][0], "p99 of a get, ms", lambda plan: plan.get_p99_ms),
    )
    colors = {"memory": "C0", "sqlite": "C1", "redis": "C2", "cluster": "C3"}
    for panel, title, figure_of in panels:
        for position, keys in enumerate(KEYS):
            row = [plans[keys, rate] for rate in RATES]
            values = [figure_of(plan) for plan in row]
            panel.plot(RATES, values, color="0.6", linewidth=0.5 + position / 3, label=f"{power(keys)} keys")
            for rate, plan, value in zip(RATES, row, values, strict=True):
                panel.plot(
                    [rate], [value], color=colors[plan.shape], marker="x" if not plan.works else "D" if plan.remedies else "o"
                )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("requests a second")
        panel.set_title(title)
    axes[0][0].legend(fontsize="small")
    ends = axes[1][1]
    for shape, cost in costs.items():
        highest = {keys: highest_rate(shape, keys, cost, given)[0] for keys in KEYS}
        fitting = {keys: rate for keys, rate in highest.items() if rate}
        ends.plot(list(fitting), list(fitting.values()), color=colors[shape], marker=".", label=shape)
    ends.set_xscale("log")
    ends.set_yscale("log")
    ends.set_xlabel("keys")
    ends.set_title("most requests a second of each shape, without remedies")
    ends.legend()
    figure.suptitle("A model from measured CPU: colour is the shape, a diamond needs remedies, a cross breaks")
    figure.savefig(path)
    print(f"\nplot: {path}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; each assumption is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--figures", metavar="FILE", help="the JSON of engines.py")
    source.add_argument("--measure", action="store_true", help="measure here first")
    parser.add_argument("--smoke", action="store_true", help="with --measure: a few seconds, which mean nothing")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw a plot (needs matplotlib)")
    add_json_option(parser)
    for one in dataclasses.fields(Assumptions):
        kind = int if isinstance(one.default, int) else float
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=kind, default=one.default, help="(default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the model."""
    options = parse(arguments)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        print("--plot needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    given = Assumptions(**{one.name: getattr(options, one.name) for one in dataclasses.fields(Assumptions)})
    figures = measured_here(smoke=options.smoke) if options.measure else json.loads(Path(options.figures).read_text())
    costs = costs_of(figures, given)
    if not costs:
        print("no shape was measured", file=sys.stderr)
        return 2
    plans = {(keys, rate): best_plan(load_of(keys, rate, given), costs, given) for keys in KEYS for rate in RATES}
    print(f"\nA model of {', '.join(shape for shape in costs)}; computed on {where()}")
    describe_assumptions(given, costs, figures["where"])
    describe_plans(plans)
    describe_ends(costs, given)
    describe_breaks(costs, given)
    if options.plot:
        plot(plans, costs, given, options.plot)
    if options.json:
        rows = [
            {"keys": keys, "requests_ps": rate, **dataclasses.asdict(plan), "tightest": plan.tightest._asdict()}
            for (keys, rate), plan in plans.items()
        ]
        costs_of_shapes = {name: cost._asdict() for name, cost in costs.items()}
        write_json(options, assumptions=dataclasses.asdict(given), costs=costs_of_shapes, plans=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
