"""The public types, as type checkers see them."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

pytest.importorskip("mypy", reason="mypy is not installed: pip install 'aiokv[dev]'")
pytest.importorskip("pyright", reason="pyright is not installed: pip install 'aiokv[dev]'")


@pytest.mark.parametrize(
    "checker",
    [
        ["mypy", "--strict", "--warn-unused-ignores", "--no-incremental", "tests/typing/cached.py"],
        ["pyright", "tests/typing/cached.py"],
    ],
    ids=["mypy", "pyright"],
)
@pytest.mark.slow
def test_assertions_about_types_hold(checker: list[str]) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name(checker[0])), *checker[1:]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
