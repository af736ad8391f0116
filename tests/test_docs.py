"""The examples and the benchmarks run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, clean_environment

EXAMPLES = sorted(path.name for path in (REPOSITORY / "examples").glob("*.py"))


def run(arguments: list[str], home: Path) -> str:
    environment = {**clean_environment(home), "AIOKV_URL": f"sqlite:///{home}/kv.db"}
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", *arguments], capture_output=True, text=True, env=environment, check=False
    )
    # On a busy machine asyncio's debug mode logs steps that took long.
    errors = [line for line in done.stderr.splitlines() if not re.match(r"Executing <.*> took [\d.]+ seconds$", line)]
    assert (done.returncode, errors) == (0, [])
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(tmp_path: Path, name: str) -> None:
    if name == "tables.py":
        pytest.importorskip("pandas", reason="pip install 'aiokv[pandas]'")
    output = run([str(REPOSITORY / "examples" / name)], tmp_path)
    if name in {"quickstart.py", "demo.py"}:
        assert re.search(r"expiry +'v' after 59.999 s, None after 60 s", output)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["decorator.py", "--only", "near", "--batches", "1", "--calls", "200"], "x async-lru|pip install"),
        (["outage.py", "--seconds", "1", "--rate", "20", "--read-timeout", "0.1", "--only", "cached"], "refused .* 0 wrong"),
        (["stampede.py", "--duration", "3", "--processes", "2", "--rate", "10", "--ttl", "1", "--ways", "early=1"], "expir"),
        (
            [
                *("faults.py", "--quick", "--calls", "20", "--unpaced-calls", "50", "--outage-seconds", "0.3"),
                *("--contenders", "aiokv", "aiokv-hedged", "tenacity"),
            ],
            r"(?s)20 % resets +aiokv +20 .*, 0 retries refused.* attempts to connect.* aim: p99",
        ),
        (
            [
                *("batches.py", "--only", "at once", "bulk", "--rounds", "1", "--calls", "128", "--keys", "1000"),
                *("--folder", "{home}", "--json", "{home}/batches.json"),
            ],
            r"(?s)64 gets at once: .* aim: .*Keys in bulk: .* aim: .*json: ",
        ),
    ],
    ids=["decorator", "outage", "stampede", "faults", "batches"],
)
@pytest.mark.slow
def test_benchmark_that_may_miss_its_aim_runs(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "benchmarks" / arguments[0]),
            *(word.format(home=tmp_path) for word in arguments[1:]),
        ],
        capture_output=True,
        text=True,
        env=clean_environment(tmp_path),
        check=False,
    )
    # An aim that is missed, in a run too short to mean anything, is no fault of the script.
    assert done.returncode in {0, 1}, done.stderr
    assert re.search(words, done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize(
    "subject",
    [
        "near, int",
        "near, method",
        "near, 1,000 keys",
        "hit",
        "miss",
        "by hand, miss",
        "key of a model of 8 fields",
        "many, near hit",
        "many, miss",
        "cancel, 100 waiters",
    ],
)
@pytest.mark.slow
def test_subject_whose_instructions_are_counted_runs(subject: str) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "instructions_subjects.py"), subject, "200", "unused"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["client_overhead.py", "sqlite_sets.py", "import_time.py"])
@pytest.mark.slow
def test_benchmark_runs_and_reports_a_ratio(tmp_path: Path, name: str) -> None:
    few = {
        "client_overhead.py": ["--calls", "100"],
        "sqlite_sets.py": ["--sets", "100", "--folder", str(tmp_path)],
        "import_time.py": ["--only", "time"],
    }
    # Too short to mean anything: an aim of zero or of infinity, for only the script itself is tried here.
    aim = "0" if name == "sqlite_sets.py" else "inf"
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / name), "--batches", "1", "--aim", aim, *few.get(name, [])],
        capture_output=True,
        text=True,
        env={**os.environ, "AIOKV_URL": "memory://"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"median +[\d.]+ .* x ", done.stdout)
