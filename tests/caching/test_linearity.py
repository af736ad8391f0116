"""The random checker of `benchmarks/linearity.py`, for a few seconds: it finds nothing, unless an invalidation is left out."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, clean_environment

pytestmark = pytest.mark.slow


def _check(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks/linearity.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(home),
        timeout=18,
    )


def _count(name: str, output: str) -> int:
    found = re.search(rf"([\d,]+) {name}", output)
    assert found is not None, output
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize(
    ("seed", "arguments"),
    [
        (1, ["--processes", "2", "--threads", "2"]),
        (2, ["--processes", "1", "--threads", "3", "--skip", "sqlite"]),
    ],
)
def test_nothing_older_is_served_after_an_invalidation_a_prime_or_a_refresh(
    seed: int, arguments: list[str], tmp_path: Path
) -> None:
    # A busy machine takes longer until it has done enough for it to mean something.
    for seconds in ("2.5", "10"):
        done = _check(tmp_path, "--seconds", seconds, "--seed", str(seed), *arguments)
        assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-2_000:]
        assert "Traceback" not in done.stderr
        kinds = min(_count(name, done.stdout) for name in ("invalidations", "primes", "refreshes", "changed"))
        is_enough = _count("calls", done.stdout) > 100 and kinds > 0
        if is_enough:
            break
    assert is_enough


def test_checker_finds_invalidations_that_are_not_made(tmp_path: Path) -> None:
    done = _check(
        tmp_path,
        "--seconds",
        "10",
        "--processes",
        "1",
        "--skip",
        "change,leave,prime,refresh,faults,sqlite",
        "--forget-invalidations",
    )
    assert done.returncode == 1
    assert "FOUND with --seed 1" in done.stdout
    assert "floor is" in done.stdout
