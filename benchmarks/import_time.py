"""What `import aiokv` and `aiokv --help` cost: in milliseconds beside `import aiohttp`, and in instructions under valgrind.

Milliseconds are those of `python -X importtime`, alternating, medians. Instructions are the same from run to run; those of an
empty program are subtracted. The exit status is 1 where an aim is missed.
"""

import argparse
import subprocess
import sys

from harness import (
    add_json_option,
    count_instructions,
    has_valgrind,
    note_aim,
    note_table,
    progress,
    report,
    verdict,
    where,
    write_json,
)

FLOOR = "import asyncio, orjson"
# In millions, less an empty program. The decorator's machinery loads at the first use of its name.
PROGRAMS: dict[str, tuple[list[str], float | None]] = {
    FLOOR: (["-c", FLOOR], None),
    "import aiokv": (["-c", "import aiokv"], 260),
    "from aiokv import kv_cached": (["-c", "from aiokv import kv_cached"], 300),
    "aiokv --help": (["-m", "aiokv", "--help"], 300),
    "import aiohttp": (["-c", "import aiohttp"], None),
}


def import_milliseconds(module: str) -> float:
    """Import a module in a new process and give its cumulative time."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"], capture_output=True, text=True, check=True
    )
    cumulative = [line.split("|") for line in done.stderr.splitlines() if line.rstrip().endswith(f"| {module}")]
    return float(cumulative[-1][1]) / 1000


def milliseconds(batches: int, aim: float) -> bool:
    """Measure time; return whether the aim is met."""
    samples: dict[str, list[float]] = {"import aiohttp": [], "import aiokv": []}
    for batch in range(batches + 1):
        progress(batch, batches, "batches")
        for name, values in samples.items():
            taken = import_milliseconds(name.split()[1])
            # The first round reads files from the disk.
            if batch:
                values.append(taken)
    ratio = report("Import time", "ms", samples, "import aiohttp")
    return verdict("import aiokv to import aiohttp", ratio, aim)


def instructions() -> bool:
    """Count instructions; return whether every aim is met."""
    counts: dict[str, float] = {}
    for done, (name, (arguments, _)) in enumerate(PROGRAMS.items()):
        progress(done, len(PROGRAMS), "programs under valgrind")
        # The first run writes the bytecode that the second reads.
        counts[name] = min(count_instructions(arguments) for _ in range(2)) / 1e6
    progress(len(PROGRAMS), len(PROGRAMS), "programs under valgrind")
    empty = min(count_instructions(["-c", "pass"]) for _ in range(2)) / 1e6
    print(f"\nInstructions of an import, less those of an empty program ({empty:.0f} M)\n{where()}")
    width = max(map(len, counts))
    for name, count in counts.items():
        print(f"  {name:<{width}}  {count - empty:7.1f} M  {(count - empty) / (counts[FLOOR] - empty):5.2f} x {FLOOR}")
    rows = {name: [count - empty, (count - empty) / (counts[FLOOR] - empty)] for name, count in counts.items()}
    note_table("Instructions of an import, less those of an empty program", ["million instructions", f"x {FLOOR}"], rows)
    all_met = True
    for name, (_, aim) in PROGRAMS.items():
        if aim is not None:
            met = counts[name] - empty <= aim
            all_met &= note_aim(name, counts[name] - empty, aim, "M instructions", is_met=met)
            print(f"  aim: {name} at most {aim:g} M: {'met' if met else 'MISSED'} ({counts[name] - empty:.1f} M)")
    return all_met


def main() -> int:
    """Run both measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=11)
    parser.add_argument("--aim", type=float, default=1.15, help="largest ratio of time to aiohttp's that is no failure")
    parser.add_argument("--only", choices=("time", "instructions"), help="make one measurement")
    add_json_option(parser)
    options = parser.parse_args()
    results = []
    if options.only != "instructions":
        results.append(milliseconds(options.batches, options.aim))
    if options.only != "time" and has_valgrind():
        results.append(instructions())
    write_json(options)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
