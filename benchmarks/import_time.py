"""What `import aiokv` costs, against `import aiohttp`, as `python -X importtime` counts it; alternating, medians."""

import argparse
import subprocess
import sys

from harness import progress, report


def import_milliseconds(module: str) -> float:
    """Import a module in a new process and give its cumulative time."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"], capture_output=True, text=True, check=True
    )
    cumulative = [line.split("|") for line in done.stderr.splitlines() if line.rstrip().endswith(f"| {module}")]
    return float(cumulative[-1][1]) / 1000


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=11)
    parser.add_argument("--aim", type=float, default=1.15, help="largest ratio that is no failure")
    options = parser.parse_args()
    samples: dict[str, list[float]] = {"import aiohttp": [], "import aiokv": []}
    for batch in range(options.batches + 1):
        progress(batch, options.batches, "batches")
        for name, values in samples.items():
            milliseconds = import_milliseconds(name.split()[1])
            # The first round reads files from the disk.
            if batch:
                values.append(milliseconds)
    ratio = report("Import time", "ms", samples, "import aiohttp")
    print(f"  aim: at most {options.aim} x: {'met' if ratio <= options.aim else 'MISSED'}")
    return 0 if ratio <= options.aim else 1


if __name__ == "__main__":
    sys.exit(main())
