"""What the measuring scripts share: alternating batches, medians, and a line that says where they ran."""

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def where() -> str:
    """Say what machine, Python and commit the figures are of."""
    commit = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, commit {commit or 'unknown'}"


def report(title: str, unit: str, samples: Mapping[str, Sequence[float]], base: str) -> float:
    """Print each contender's median and spread, and its ratio to `base` taken pair by pair; give the last ratio."""
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
    """Show how far a measurement is, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done} of {total} ", end="" if done < total else "\n", file=sys.stderr, flush=True)
