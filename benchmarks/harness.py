"""Shared parts of the measuring scripts: medians, aims, and a line that says where they ran."""

import contextlib
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def where() -> str:
    """Return the machine, the Python and the commit that the figures belong to."""
    commit = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, commit {commit or 'unknown'}"


def report(title: str, unit: str, samples: Mapping[str, Sequence[float]], base: str) -> float:
    """Print each contender's median and spread, and its ratio to `base` taken pair by pair; return the last ratio."""
    print(f"\n{title}\n{where()}, {len(samples[base])} alternating batches")
    width = max(map(len, samples))
    ratio = 1.0
    for name, values in samples.items():
        ratio = statistics.median(value / other for value, other in zip(values, samples[base], strict=True))
        print(
            f"  {name:<{width}}  median {statistics.median(values):10.2f} {unit}"
            f"  (min {min(values):.2f}, max {max(values):.2f})  {ratio:5.2f} x {base}"
        )
    return ratio


def progress(done: int, total: int, what: str) -> None:
    """Show the progress of a measurement, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done} of {total} ", end="" if done < total else "\n", file=sys.stderr, flush=True)


def verdict(what: str, ratio: float, aim: float) -> bool:
    """Print and return whether a ratio is at most its aim."""
    met = ratio <= aim
    print(f"  aim: {what} at most {aim:g} x: {'met' if met else 'MISSED'} ({ratio:.3g} x)")
    return met


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
