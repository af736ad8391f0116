"""The benchmark of HTTP responses runs, in a form too short to mean anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, clean_environment

pytest.importorskip("hishel", reason="pip install 'aiokv[http-cache]'")


@pytest.mark.slow
def test_each_contender_is_measured_or_left_out_with_the_reason(tmp_path: Path) -> None:
    figures = tmp_path / "http.json"
    done = subprocess.run(
        [
            *(sys.executable, str(REPOSITORY / "benchmarks" / "http_responses.py")),
            *("--calls", "20", "--batches", "1", "--aim", "inf", "--json", str(figures)),
        ],
        capture_output=True,
        text=True,
        env=clean_environment(tmp_path),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(figures.read_text())["contenders"]
    assert {"aiohttp GET", "aiokv, memory", "aiokv, SQLite"} <= set(measured)
    for name in ("aiohttp-client-cache", "httpx GET", "hishel with httpx, aiokv", "hishel with httpx, SQLite"):
        assert name in measured or f"{name} is left out: pip install" in done.stderr
