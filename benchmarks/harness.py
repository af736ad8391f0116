"""Shared parts of the measuring scripts: medians, aims, a line that says where they ran, and the figures as JSON.

What a script prints of tables and aims it also notes here; `--json FILE` writes that, in one form for all scripts.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def where() -> str:
    """Return the machine, the Python and the commit that the figures belong to."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    has_git = shutil.which("git") is not None
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() if has_git else ""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, commit {commit or 'unknown'}"


# Of the script that runs: tables and aims as they are printed.
_tables: list[dict[str, Any]] = []
_aims: list[dict[str, Any]] = []


def note_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], drawn: int = 0) -> None:
    """Note a table for `--json`: columns name their units, a row is a contender, None is a figure that it lacks.

    `drawn` is the column that a picture shows.
    """
    if rows:
        # JSON has no infinity.
        noted = {name: [one if one is not None and math.isfinite(one) else None for one in row] for name, row in rows.items()}
        _tables.append({"title": title, "columns": list(columns), "rows": noted, "drawn": drawn})


def note_aim(what: str, figure: float, aim: float, unit: str, *, is_met: bool) -> bool:
    """Note an aim and what was reached for `--json`; return whether it is met."""
    _aims.append({"what": what.rstrip(","), "figure": figure, "aim": aim, "unit": unit, "is_met": is_met})
    return is_met


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")


def write_json(options: argparse.Namespace, **more: Any) -> None:
    """Write what was noted, and more, where `--json` says so."""
    if not options.json:
        return
    chosen = {name: value for name, value in vars(options).items() if name not in {"json", "plot", "folder", "figures"}}
    result = {"where": where(), "options": chosen, "tables": _tables, "aims": _aims, **more}
    Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\njson: {options.json}")


def report(title: str, unit: str, samples: Mapping[str, Sequence[float]], base: str) -> float:
    """Print each contender's median and spread, and its ratio to `base` taken pair by pair; return the last ratio."""
    print(f"\n{title}\n{where()}, {len(samples[base])} alternating batches")
    width = max(map(len, samples))
    ratio = 1.0
    rows: dict[str, Sequence[float]] = {}
    for name, values in samples.items():
        ratio = statistics.median(value / other for value, other in zip(values, samples[base], strict=True))
        print(
            f"  {name:<{width}}  median {statistics.median(values):10.2f} {unit}"
            f"  (min {min(values):.2f}, max {max(values):.2f})  {ratio:5.2f} x {base}"
        )
        rows[name] = [statistics.median(values), min(values), max(values), ratio]
    note_table(title, [unit, "lowest", "highest", f"x {base}"], rows)
    return ratio


def progress(done: int, total: int, what: str) -> None:
    """Show the progress of a measurement, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done} of {total} ", end="" if done < total else "\n", file=sys.stderr, flush=True)


def verdict(what: str, ratio: float, aim: float) -> bool:
    """Print and return whether a ratio is at most its aim."""
    met = ratio <= aim
    print(f"  aim: {what} at most {aim:g} x: {'met' if met else 'MISSED'} ({ratio:.3g} x)")
    return note_aim(what, ratio, aim, "x", is_met=met)


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Return the median ratio of two contenders, taken batch by batch."""
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


@contextlib.contextmanager
def served(store_url: str) -> Generator[str]:
    """Run `aiokv serve` in a process of its own; yield its address, and stop it at the end."""
    with subprocess.Popen(
        [sys.executable, "-m", "aiokv", "serve", "--port", "0", "--store", store_url], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            line = server.stderr.readline() if server.stderr else ""
            if " at " not in line:
                raise RuntimeError(f"the server did not start: {line.strip()}")
            yield line.split(" at ", 1)[1].split(",")[0].strip()
        finally:
            server.terminate()


def has_valgrind() -> bool:
    """Return whether instructions can be counted here; say how, where they cannot."""
    found = shutil.which("valgrind") is not None
    if not found:
        print("instructions are left out, valgrind is not installed: apt-get install valgrind")
    return found


def count_instructions(arguments: Sequence[str]) -> int:
    """Run Python under valgrind and return all instructions that the process executed, the kernel's left out."""
    # Bytecode may be written, or each run would compile; one order of every dictionary and set, or two runs differ.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(
        ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null", sys.executable, *arguments],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "PYTHONHASHSEED": "0"},
    )
    counted = re.search(r"I\s+refs:\s+([\d,]+)", run.stderr)
    if run.returncode != 0 or counted is None:
        raise RuntimeError(f"{' '.join(arguments)} failed under valgrind: {run.stderr[-2000:]}")
    return int(counted[1].replace(",", ""))
