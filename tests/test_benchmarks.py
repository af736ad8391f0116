"""The benchmarks of engines, of scale and of blocking calls run, in a form too short to mean anything."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the CPU of other processes is counted on Linux only"),
]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )


def test_engines_are_measured_and_scale_is_computed_from_it(tmp_path: Path) -> None:
    figures = tmp_path / "engines.json"
    names = ["a dict", "memory", "memory, served", "sqlite", "sqlite, served"]
    done = run(
        "engines.py", "--smoke", "--concurrency", "4", "--only", *names, "--folder", str(tmp_path), "--json", str(figures)
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"Get at 4 tasks\n.*\n  a dict +[\d.]+ .*\n  memory +[\d.]+ +0\.0 +0\.0 ", done.stdout)
    measured = json.loads(figures.read_text())["contenders"]
    assert list(measured) == names
    served = measured["sqlite, served"]["medians"]["set at 4"]
    assert served["total_us"] == pytest.approx(served["client_us"] + served["server_us"] + served["engine_us"])
    assert served["server_us"] > 0
    assert 0 < served["p50_us"] <= served["p99_us"]

    plans = tmp_path / "plans.json"
    done = run("scale.py", "--figures", str(figures), "--set-share", "0.5", "--json", str(plans))
    assert done.returncode == 0, done.stderr
    assert "redis is left out: 'redis, served' was not measured" in done.stderr
    assert re.search(r"--set-share +0\.5\n", done.stdout)
    assert re.search(r"BREAKS: .*: several servers, each with its namespaces", done.stdout)
    rows = json.loads(plans.read_text())["plans"]
    assert len(rows) == 30
    assert {row["shape"] for row in rows} == {"memory", "sqlite"}


def test_contenders_of_other_packages_are_measured_or_left_out_with_the_reason(tmp_path: Path) -> None:
    names = ["py-key-value, memory", "py-key-value, disk"]
    done = run("engines.py", "--smoke", "--only", *names, "--folder", str(tmp_path))
    for name in names:
        assert f"{name} is left out: pip install" in done.stderr or re.search(rf"\n  {name} +[\d.]+ ", done.stdout), done.stderr


def test_blocking_calls_are_measured(tmp_path: Path) -> None:
    figures = tmp_path / "blocking.json"
    done = run("blocking.py", "--smoke", "--json", str(figures))
    assert done.returncode == 0, done.stderr
    of_load = json.loads(figures.read_text())["figures"]["threads"]["get by 4"]
    assert {"KVStore", "KVStore, no batching"} <= set(of_load)
    assert all(rate > 0 for of_client in of_load.values() for rate in of_client["calls_per_second"])


def test_plot_without_what_draws_it_says_what_to_install() -> None:
    hidden = (
        "import sys; sys.modules['matplotlib'] = None; sys.path.insert(0, 'benchmarks'); import {0}; sys.exit({0}.main({1}))"
    )
    for module, arguments in (("engines", ["--plot", "x.svg"]), ("scale", ["--measure", "--plot", "x.svg"])):
        done = subprocess.run(
            [sys.executable, "-c", hidden.format(module, arguments)],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            check=False,
        )
        assert (done.returncode, "pip install matplotlib" in done.stderr) == (2, True), done.stderr


def test_interrupted_imports_lose_nothing() -> None:
    done = run("import_rows.py", "--rows", "30000", "--rounds", "1", "--stops", "2", "--longest", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"sqlite, round 1: 30,000 rows .* 0 lost, .*: met\nserved, round 1: .* 0 lost, .*: met\n", done.stdout)
